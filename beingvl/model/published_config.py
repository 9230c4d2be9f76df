"""Translate config.json and tokenizer files to the published form, and back.

    ours (llama)                          published (chameleon)
    rope_parameters | rope_scaling        rope_theta, rope_scaling: null, linear or dynamic only
    vqgan/config.json                     vq_config
    tokenizer.json                        the same, with merges named by token id; vocabulary_map
    vocab_layout.json                     boi_token_id, eoi_token_id, image_token_id

The published class computes the same as LLaMA, but does not know llama3 RoPE scaling.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from operator import itemgetter
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import ChameleonConfig, LlamaConfig, PreTrainedTokenizerFast
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from beingvl.artefact.files import to_json, write_atomically
from beingvl.errors import InputError
from beingvl.images.vqgan import PREPROCESSOR_FILE, VQGAN
from beingvl.model.base_model import read_json
from beingvl.published_form import PUBLISHED_MODEL_TYPE
from beingvl.vocab import VocabLayout, image_token_text

_SAME_KEYS = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads", "hidden_act", "max_position_embeddings"),
    *("initializer_range", "rms_norm_eps", "use_cache", "tie_word_embeddings"),
    *("attention_bias", "attention_dropout", "mlp_bias"),
)
_KEPT_KEYS = (
    *("bos_token_id", "eos_token_id", "rope_theta", "rope_scaling", "torch_dtype"),
    *("rope_parameters", "dtype"),  # transformers 5 saves these in place of the last three
)
_PLAIN = ("default", "linear", "dynamic")


# ---- config ----


def to_llama_config(config: Mapping[str, Any], layout: VocabLayout, source: Path) -> dict[str, Any]:
    """config.json of a published model's language model as a stock LLaMA.

    Raises InputError for features that LLaMA or the published class does not have.
    """
    if config.get("swin_norm"):
        raise InputError(
            f"{source} has swin_norm {config['swin_norm']}: it normalises after attention and "
            "MLP, which no stock LLaMA does; only false can be imported"
        )
    rope = config.get("rope_parameters") or config.get("rope_scaling")
    kind = rope.get("rope_type", rope.get("type")) if isinstance(rope, dict) else rope
    if kind not in (None, *_PLAIN):
        raise InputError(
            f"{source} scales its rope by {kind!r}, which the published class does not know, so "
            'the model was trained without it; write "rope_scaling": null'
        )
    defaults = ChameleonConfig().to_dict()  # values of absent keys
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **{key: config.get(key, defaults[key]) for key in _SAME_KEYS},
        **{key: config[key] for key in _KEPT_KEYS if key in config},
        "pad_token_id": layout.pad_id,
    }


def to_published_config(folder: Path, leave_rope_scaling_out: bool) -> dict[str, Any]:
    """See `published_names.published_config`."""
    fields = read_json(folder / "config.json", "a model folder")
    if fields.get("model_type") != "llama":
        raise InputError(
            f"{folder} is a {fields.get('model_type')!r} model; the published form holds LLaMA only"
        )
    config = LlamaConfig.from_dict(fields)
    if config.head_dim != config.hidden_size // config.num_attention_heads:
        raise InputError(
            f"{folder} has heads of width {config.head_dim}; the published form holds only "
            f"{config.hidden_size} / {config.num_attention_heads}"
        )
    rope = dict(config.rope_parameters or {})
    kind = rope.get("rope_type", "default")
    scaling = None if kind == "default" else {"type": kind, "factor": rope.get("factor")}
    if kind != "default" and leave_rope_scaling_out:
        print(f"rope scaling {kind!r} is left out: {_what_changes(config)}")
        scaling = None
    elif kind not in _PLAIN:
        raise InputError(
            f"{folder} scales its rope by {kind!r}, which the published class does not know; with "
            f"--rope_scaling none the scaling is left out, and {_what_changes(config)}"
        )
    dtype = fields.get("dtype", fields.get("torch_dtype"))
    return {
        "architectures": ["ChameleonForConditionalGeneration"],
        "model_type": PUBLISHED_MODEL_TYPE,
        **{key: getattr(config, key) for key in _SAME_KEYS},
        **{key: fields.get(key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")},
        "rope_theta": rope.get("rope_theta", 10000.0),
        "rope_scaling": scaling,
        "swin_norm": False,
        **({"torch_dtype": dtype} if dtype else {}),
    }


def _what_changes(config: LlamaConfig) -> str:
    plain = LlamaConfig.from_dict(config.to_dict())
    theta = (config.rope_parameters or {}).get("rope_theta", 10000.0)
    plain.rope_parameters = {"rope_type": "default", "rope_theta": theta}
    ours, theirs = (LlamaRotaryEmbedding(one).inv_freq for one in (config, plain))
    return f"{int((ours != theirs).sum())} of {len(ours)} frequencies and all answers change"


# ---- tokenizer and processor ----


def write_published_tokenizer(source: Path, target: Path, layout: VocabLayout) -> dict[str, int]:
    """Write tokenizer.json and its settings as tokenizers 0.19 and transformers 4 read them;
    returns the vocabulary, token text -> id.
    """
    fields = read_json(source / "tokenizer.json", "a model folder")
    for token in fields["added_tokens"]:
        token["content"] = layout.published_name(token["id"]) or token["content"]
    merges = fields["model"].get("merges", [])
    pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in merges]
    if spaced := [pair for pair in pairs if len(pair) != 2 or " " in "".join(pair)]:
        raise InputError(
            f"{source / 'tokenizer.json'} merges {spaced[0]}: the published form separates the two "
            "by a space, so neither may contain one"
        )
    if pairs:
        fields["model"]["merges"] = [" ".join(pair) for pair in pairs]
    text = json.dumps(fields, ensure_ascii=False)
    write_atomically(target / "tokenizer.json", text)

    settings = read_json(source / "tokenizer_config.json", "a model folder")
    settings["processor_class"] = "ChameleonProcessor"
    write_atomically(target / "tokenizer_config.json", to_json(settings))
    named = ("bos_token", "eos_token", "pad_token")
    specials = {name: settings[name] for name in named if settings.get(name)}
    write_atomically(target / "special_tokens_map.json", to_json(specials))
    return dict(sorted(Tokenizer.from_str(text).get_vocab().items(), key=itemgetter(1)))


def write_processor(vqgan: VQGAN, target: Path, image_token: str) -> None:
    """Write preprocessor_config.json and processor_config.json."""
    fields = json.loads(vqgan.processor.to_json_string())
    own: dict[str, Any] = {"processor_class": "ChameleonProcessor"}
    write_atomically(target / PREPROCESSOR_FILE, to_json(fields | own))
    height, width = vqgan.grid
    own |= {"image_seq_length": height * width, "image_token": image_token}
    write_atomically(target / "processor_config.json", to_json(own))


def check_ids(config: Mapping[str, Any], expected: Mapping[str, int | None], source: Path) -> None:
    """Raises InputError naming the first id in config.json that differs from the tokenizer's;
    absent ids are skipped.
    """
    for name, token_id in expected.items():
        found = config.get(name)
        if None not in (found, token_id) and token_id not in _as_list(found):
            raise InputError(
                f"{source} has {name} {found}, the tokenizer beside it {token_id}; take both from "
                "one folder"
            )


def _as_list(ids: Any) -> list[Any]:
    return ids if isinstance(ids, list) else [ids]


def layout_of_tokens(
    tokenizer: PreTrainedTokenizerFast, config: Mapping[str, Any], num_vq: int, source: Path
) -> VocabLayout:
    """The layout of a published folder, derived from the ids of its image tokens.

    Raises InputError if the tokenizer has none, if they are inside the text, or if its bos or eos
    differs from the config's.
    """
    vocabulary = tokenizer.get_vocab()
    first = vocabulary.get(image_token_text(0))
    if first is None:
        raise InputError(
            f"{source}: its tokenizer has no {image_token_text(0)!r}, so it is not Being-VL's; "
            "copy the published tokenizer's files into the folder"
        )
    specials = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    check_ids(config, specials, source / "config.json")
    ids = [config.get(name) for name in specials]
    bos_id, eos_id = (next(iter(_as_list(one)), None) for one in ids)
    if not isinstance(bos_id, int) or not isinstance(eos_id, int):
        raise InputError(f"{source / 'config.json'} has no bos_token_id or no eos_token_id; add it")
    return VocabLayout.around_codes(range(first, first + num_vq), len(vocabulary), bos_id, eos_id)
