"""Does packed training compute the same as the stock model? We test a small random model first.

    config     the start model's, with one layer of each kind, few heads and a short vocabulary;
               everything else unchanged
    stock      two documents, one after the other, through transformers' own model
    packed     the same weights with split rows, both documents in one row (model/extended_vocab.py)

If the logits differ, the base is refused. This catches heads that do more than a matrix product,
attention with more than scaled dot products, positions that do not come from `position_ids`, layers
that carry state from one document to the next, and anything we do not know yet. It takes hundredths
of a second.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers.initialization import no_init_weights

from beingvl.errors import InputError
from beingvl.model.extended_vocab import build_packed_model, stored_slice

NUM_TEXT, NUM_VISUAL, NUM_HEADS, LONGEST_DOCUMENT = 32, 8, 4, 12
WEIGHT_SCALE = 0.3  # large enough for soft caps to change logits
LARGEST_DIFFERENCE_NATS = 1e-3  # float32 differs by 1e-5, refused families by at least 9e-2


def refuse_unlike_packed(model_class: Any, config: Any) -> None:
    """Raises InputError for models whose logits differ when packed, or that cannot be tested."""
    try:
        difference = _largest_difference(model_class, small_config(config))
    except Exception as error:  # from any model's code: what we cannot compare, we do not train
        raise InputError(
            f"models of type {config.model_type!r} cannot be packed "
            f"({type(error).__name__}: {error}); use another base"
        ) from error
    if not difference <= LARGEST_DIFFERENCE_NATS:
        raise InputError(
            f"models of type {config.model_type!r} compute something else when samples are packed "
            f"(a small random one is {difference:.2g} nats off); use another base"
        )


def refuse_short_window(config: Any, longest: int, remedy: str) -> None:
    """Raises InputError if `longest` exceeds a window, or the length at which positions change."""
    window = _window(config)
    if window is not None and window < longest:
        raise InputError(
            f"the model's layers look back {window} tokens (sliding_window), samples may have "
            f"{longest}; {remedy.format(window=window)}"
        )
    for name, limit in _changing_positions(config).items():
        if limit < longest:
            raise InputError(
                f"the model's positions ({name!r} RoPE) change for samples of more than "
                f"{limit} tokens, samples may have {longest}; {remedy.format(window=limit)}"
            )


def small_config(config: Any) -> Any:
    """The same kind of model, smaller: one layer of each kind, four heads of unchanged width."""
    small = copy.deepcopy(config)
    kinds = list(dict.fromkeys(getattr(config, "layer_types", None) or ["the only one"]))
    num_layers = max(2, len(kinds))
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    grouped = getattr(config, "num_key_value_heads", None) not in (None, config.num_attention_heads)
    sizes = {
        "vocab_size": NUM_TEXT + NUM_VISUAL,
        "num_hidden_layers": num_layers,
        "hidden_size": NUM_HEADS * head_dim,
        "intermediate_size": 48,
        "num_attention_heads": NUM_HEADS,
        "num_key_value_heads": NUM_HEADS // 2 if grouped else NUM_HEADS,
    }
    for name, size in sizes.items():
        if getattr(small, name, None) is not None:
            setattr(small, name, size)
    if getattr(small, "layer_types", None):
        small.layer_types = (2 * kinds)[:num_layers]
    small.dtype, small.pad_token_id, small.tie_word_embeddings = torch.float32, None, False
    for name in [name for name in small.to_dict() if name.endswith(("dropout", "_pdrop"))]:
        setattr(small, name, 0.0)
    return small


@torch.no_grad()
def _largest_difference(model_class: Any, config: Any) -> float:
    """Largest difference, in nats, between the log-probabilities of both models."""
    with no_init_weights():
        stock = model_class._from_config(config, attn_implementation="eager").eval()
    packed = build_packed_model(model_class, config, NUM_TEXT, NUM_VISUAL, 1, False).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in stock.parameters():
        parameter.normal_(0, WEIGHT_SCALE, generator=generator)
    weights = dict(stock.named_parameters())
    for name, parameter in packed.causal_lm.named_parameters():
        stored, rows = stored_slice(name, NUM_TEXT)
        parameter.copy_(weights[stored][rows])

    longest = min(LONGEST_DOCUMENT, _window(config) or LONGEST_DOCUMENT)
    lengths = [longest, longest - longest // 3]
    documents = [
        torch.randint(0, NUM_TEXT + NUM_VISUAL, (length,), generator=generator)
        for length in lengths
    ]
    expected = torch.cat(
        [stock(input_ids=ids[None], use_cache=False).logits[0] for ids in documents]
    )
    found = packed(
        torch.cat(documents)[None],
        torch.cat([torch.arange(length) for length in lengths])[None],
        torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32),
        torch.arange(sum(lengths)),
    )
    return float((expected.log_softmax(-1) - found.log_softmax(-1)).abs().max())


def _changing_positions(config: Any) -> dict[str, int]:
    """RoPE types with frequencies that depend on the length -> tokens up to which they do not."""
    stated = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    limits = {}
    by_kind_of_layer = [each for each in stated.values() if isinstance(each, dict)]
    for rope in (stated, *by_kind_of_layer):
        name = str(rope.get("rope_type") or rope.get("type"))
        if "dynamic" in name or name in ("longrope", "su"):
            key = "original_max_position_embeddings"
            original = rope.get(key) or getattr(config, key, None)
            limits[name] = original or config.max_position_embeddings
    return limits


def _window(config: Any) -> int | None:
    is_used = getattr(config, "use_sliding_window", True)
    return getattr(config, "sliding_window", None) if is_used else None
