"""Families that packing leaves as they are, and those that it would change."""

import time

import pytest
import torch
import transformers
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

from beingvl.errors import InputError
from beingvl.model import packed_attention
from beingvl.model.packed_check import refuse_short_window, refuse_unlike_packed
from tests.model.small_models import LLAMA3_ROPE, family_config

LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0] * 48,
    "long_factor": [4.0] * 48,
}
LONG_ROPE |= {"original_max_position_embeddings": 4096}


def ask(name: str, **settings: object) -> None:
    config = getattr(transformers, f"{name}Config")(**settings)
    refuse_unlike_packed(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)], config)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("Llama", {"rope_parameters": LLAMA3_ROPE, "num_key_value_heads": 8, "dtype": "bfloat16"}),
        ("Llama", {"num_key_value_heads": 1, "tie_word_embeddings": True}),
        ("Mistral", {"sliding_window": 4096}),
        ("Mistral", {"sliding_window": 3}),
        ("Qwen2", {}),
        ("Qwen3", {}),
        ("Phi3", {"rope_parameters": LONG_ROPE, "max_position_embeddings": 131072}),
        ("GPT2", {}),
        ("Olmo2", {}),
        ("Granite", {}),
    ],
)
def test_models_that_packing_leaves_as_they_are(name, settings) -> None:
    state = torch.random.get_rng_state()
    started = time.process_time()
    ask(name, **settings)
    assert time.process_time() - started < 1
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("Phi", {}),  # a bias of the head
        ("Gemma", {}),  # a scaled embedding
        ("Gemma2", {}),  # that, and soft caps
        ("Cohere", {}),  # scaled logits
        ("Granite", {"logits_scaling": 8.0}),
        ("GptOss", {}),  # attention sinks
        ("Bloom", {}),  # positions that are no rotation
    ],
)
def test_models_that_would_become_others_are_refused(name, settings) -> None:
    with pytest.raises(
        InputError,
        match=r"compute something else when samples are packed \(a small random one is "
        r"[\d.]+ nats off",
    ):
        ask(name, **settings)


@pytest.mark.parametrize("feature", ["attn_logit_softcapping", "final_logit_softcapping"])
def test_each_soft_cap_alone_shows(feature, monkeypatch) -> None:
    caps = {"attn_logit_softcapping": None, "final_logit_softcapping": None}
    monkeypatch.setattr("beingvl.model.packed_check.build_packed_model", unscaled)
    ask("Gemma2", **caps)
    with pytest.raises(InputError, match="compute something else"):
        ask("Gemma2", **caps | {feature: 50.0 if feature.startswith("attn") else 30.0})


def unscaled(model_class, config, *sizes):
    """The stock model with its own scaled embedding, its head alone split: so that only the caps
    are left to differ.
    """
    from beingvl.model.extended_vocab import build_packed_model

    packed = build_packed_model(model_class, config, *sizes)
    embedding = packed.causal_lm.get_input_embeddings()
    plain = embedding.forward
    embedding.forward = lambda ids: plain(ids) * config.hidden_size**0.5
    return packed


def test_samples_that_see_each_other_are_refused(monkeypatch) -> None:
    def leaking(
        module, query, key, value, attention_mask, scaling=None, cu_seq_lens_q=None, **kwargs
    ):
        whole = torch.tensor([0, query.shape[2]], dtype=torch.int32)
        return packed_attention.packed_attention(
            module, query, key, value, None, scaling, cu_seq_lens_q=whole
        )

    monkeypatch.setattr(packed_attention, "register", lambda: register_as("leaking", leaking))
    with pytest.raises(InputError, match="compute something else"):
        ask("Llama")


def register_as(name, function) -> str:
    transformers.AttentionInterface.register(name, function)
    return name


def test_models_that_cannot_be_asked_are_refused() -> None:
    with pytest.raises(
        InputError, match=r"models of type 'mamba' cannot be packed \(.*\); use another base"
    ):
        ask("Mamba")


def test_a_window_shorter_than_a_sample_is_refused() -> None:
    config = family_config("mistral", 300, 0, 1)
    refuse_short_window(config, 16, "")
    with pytest.raises(InputError, match=r"look back 16 tokens .* 17; lower it to 16"):
        refuse_short_window(config, 17, "lower it to {window}")


LONGROPE = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}


@pytest.mark.parametrize(
    ("name", "settings", "found"),
    [
        (
            "Phi3",
            {"rope_scaling": LONGROPE, "original_max_position_embeddings": 32},
            "'longrope' RoPE",
        ),
        (
            "Llama",
            {"rope_parameters": {**LONGROPE, "original_max_position_embeddings": 32}},
            "'longrope' RoPE",
        ),
        ("Llama", {"rope_parameters": DYNAMIC, "max_position_embeddings": 32}, "'dynamic' RoPE"),
    ],
)
def test_positions_that_depend_on_the_longest_sample_of_a_row_are_refused(
    name, settings, found
) -> None:
    """Stock positions of a short sample beside a long one are others than those of the short one
    alone.
    """
    sizes = {
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "intermediate_size": 8,
        "vocab_size": 8,
    }
    sizes |= {"num_hidden_layers": 1, "pad_token_id": None}
    config = getattr(transformers, f"{name}Config")(
        **sizes, **{"max_position_embeddings": 128, **settings}
    )
    rotary = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config).model.rotary_emb
    beside = {
        longest: torch.cat([torch.arange(8), torch.arange(longest)])[None]
        for longest in (0, 32, 33)
    }
    alone, fits, too_long = (
        rotary(torch.zeros(1, 1, 64), positions)[0][0, :8] for positions in beside.values()
    )
    assert torch.equal(alone, fits) and not torch.equal(alone, too_long)
    refuse_short_window(config, 32, "")
    with pytest.raises(
        InputError,
        match=rf"{found}\) change for samples of more than 32 tokens.* 33; lower it to 32",
    ):
        refuse_short_window(config, 33, "lower it to {window}")


def test_positions_that_do_not_depend_on_the_length_are_trained() -> None:
    for rope in (
        LLAMA3_ROPE,
        {"rope_type": "default", "rope_theta": 10000.0},
        {**DYNAMIC, "rope_type": "linear"},
    ):
        refuse_short_window(
            transformers.LlamaConfig(rope_parameters=rope, max_position_embeddings=32), 4096, ""
        )
