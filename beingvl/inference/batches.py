"""Prompts of different lengths as one batch for transformers' `generate`.

Padding is on the left: the attention mask hides it, and positions count from each prompt's first
token. If prompts share images, padding goes between images and text, and each image is processed
once; its keys and values are copied to all prompts about it.

    <pad> <pad>  bos  hi  sep                    bos boi IMG eoi │ <pad> one? sep
    bos   boi    IMG  eoi sep                    bos boi IMG eoi │ is    it   even? sep
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

Ids = Sequence[int]


def images_before_text(ids: Ids, eoi_id: int) -> tuple[int, ...]:
    """The start of a prompt, up to the end of its last image; at least one token follows it."""
    ends = [place for place, token in enumerate(ids[:-1]) if token == eoi_id]
    return tuple(ids[: ends[-1] + 1]) if ends else ()


def reading_order(sequences: Sequence[Ids], eoi_id: int) -> list[int]:
    """Prompt indices, ordered so that prompts of similar length share a batch or, if many prompts
    share images, those with the same images.
    """
    heads = [images_before_text(ids, eoi_id) for ids in sequences]
    are_shared = 2 * len({*heads}) <= len(heads)

    def key(index: int) -> tuple[Any, ...]:
        head, length = heads[index], len(sequences[index])
        return (len(head), head, length) if are_shared else (length,)

    return sorted(range(len(sequences)), key=key)


@torch.inference_mode()
def batch_inputs(
    model: PreTrainedModel,
    sequences: Sequence[Ids],
    positions_of: Callable[[Ids], np.ndarray],
    pad_id: int,
    eoi_id: int | None,
) -> dict[str, Any]:
    """`input_ids`, `attention_mask` and `position_ids` `[prompts, width]` on the model's device,
    and the images' KV cache if most prompts share theirs. Without `eoi_id` nothing is shared.
    """
    heads = [() if eoi_id is None else images_before_text(ids, eoi_id) for ids in sequences]
    distinct = list(dict.fromkeys(heads))
    # Sliding-window attention would count padding in the middle.
    has_window = getattr(model.config, "sliding_window", None)
    if () in distinct or has_window or 2 * len(distinct) > len(heads):
        return _padded(sequences, map(positions_of, sequences), pad_id, model.device)
    images = _padded(distinct, map(positions_of, distinct), pad_id, model.device)
    rest = [ids[len(head) :] for ids, head in zip(sequences, heads, strict=True)]
    positions = (positions_of(ids)[-len(text) :] for ids, text in zip(sequences, rest, strict=True))
    texts = _padded(rest, positions, pad_id, model.device)
    row_of = {head: row for row, head in enumerate(distinct)}
    rows = torch.tensor([row_of[head] for head in heads], device=model.device)
    cache = model.base_model(**images, use_cache=True).past_key_values
    cache.batch_select_indices(rows)
    inputs: dict[str, Any] = {
        name: torch.cat([images[name][rows], texts[name]], 1) for name in texts
    }
    return {**inputs, "past_key_values": cache}


def _padded(
    rows: Sequence[Ids], positions: Iterable[np.ndarray], pad_id: int, device: torch.device
) -> dict[str, torch.Tensor]:
    width = max(map(len, rows))
    shape = len(rows), width
    input_ids = torch.full(shape, pad_id)
    attention_mask, position_ids = (torch.zeros(shape, dtype=torch.long) for _ in range(2))
    for row, (ids, places) in enumerate(zip(rows, positions, strict=True)):
        start = width - len(ids)
        input_ids[row, start:] = torch.tensor(ids)
        attention_mask[row, start:] = 1
        position_ids[row, start:] = torch.from_numpy(places)
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
    inputs["position_ids"] = position_ids
    return {name: values.to(device) for name, values in inputs.items()}
