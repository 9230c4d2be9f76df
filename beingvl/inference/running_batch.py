"""Answers to many prompts in one batch that is never emptied: what ends makes room for the next.

    every ROUND tokens   rows whose answer has ended leave the batch
    a quarter is free    the next prompts are read, and join it

transformers' `generate` computes each round, and gets the keys and values of the one before. With
answers of different lengths this saves what a fixed batch computes for rows that have ended. The
tokens are those of one prompt at a time, but for rounding.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import pad
from transformers import DynamicCache

from beingvl.inference.batches import Ids

ROUND = 8  # tokens; 4 and 16 were as fast or slower

Inputs = dict[str, torch.Tensor]


@dataclass
class Rows:
    """Prompts that are being answered, by index. `inputs`: what `generate` gets, `[rows, width]`
    each; the cache has all but the last column.
    """

    indices: list[int]
    inputs: Inputs
    cache: DynamicCache

    def join(self, others: Rows) -> None:
        width = max(rows.inputs["input_ids"].shape[1] for rows in (self, others))
        for name, values in self.inputs.items():
            self.inputs[name] = _stacked(values, others.inputs[name], width, 1)
        for layer, other in zip(self.cache.layers, others.cache.layers, strict=True):
            layer.keys = _stacked(layer.keys, other.keys, width - 1, 2)
            layer.values = _stacked(layer.values, other.values, width - 1, 2)
        self.indices += others.indices

    def keep(self, numbers: Sequence[int]) -> None:
        """These rows, without the columns that are padding in all of them."""
        if len(numbers) == len(self.indices):
            return
        self.indices = [self.indices[number] for number in numbers]
        chosen = torch.tensor(numbers, device=self.inputs["input_ids"].device)
        self.cache.batch_select_indices(chosen)
        start = int(self.inputs["attention_mask"][chosen].argmax(1).min())
        self.inputs = {name: values[chosen, start:] for name, values in self.inputs.items()}
        for layer in self.cache.layers:
            layer.keys, layer.values = layer.keys[:, :, start:], layer.values[:, :, start:]


def _stacked(above: torch.Tensor, below: torch.Tensor, width: int, dim: int) -> torch.Tensor:
    """Rows of two batches, each with zeros on the left of `dim` up to `width`."""
    after = [0, 0] * (above.dim() - 1 - dim)  # `pad` counts from the last dimension
    pair = (pad(values, [*after, width - values.shape[dim], 0]) for values in (above, below))
    return torch.cat(list(pair))


class RunningBatch:
    """Prompts that are being answered. `add` and `advance` each compute a round, and return the
    answers that ended in it by prompt index.
    """

    def __init__(
        self,
        generate: Callable[..., Any],
        end_of: Callable[[list[int], int], int | None],
        max_new_tokens: int,
    ) -> None:
        """`generate`: transformers' own, with all options but inputs and length. `end_of`: the
        length of an answer (its ids, how many were seen before) if it has ended.
        """
        self._generate, self._end_of, self._max_new_tokens = generate, end_of, max_new_tokens
        self._answers: dict[int, list[int]] = {}
        self._rows: Rows | None = None

    def __len__(self) -> int:
        return len(self._answers)

    @torch.inference_mode()
    def add(self, indices: list[int], inputs: dict[str, Any]) -> dict[int, list[int]]:
        self._answers |= {index: [] for index in indices}
        rows, ended = self._round(indices, inputs)
        if rows and self._rows:
            self._rows.join(rows)
        self._rows = self._rows or rows
        return ended

    @torch.inference_mode()
    def advance(self) -> dict[int, list[int]]:
        assert self._rows
        inputs = {**self._rows.inputs, "past_key_values": self._rows.cache}
        self._rows, ended = self._round(self._rows.indices, inputs)
        return ended

    def _round(
        self, indices: list[int], inputs: dict[str, Any]
    ) -> tuple[Rows | None, dict[int, list[int]]]:
        seen = [len(self._answers[index]) for index in indices]
        num_tokens = min(ROUND, self._max_new_tokens - max(seen))
        out = self._generate(**inputs, max_new_tokens=num_tokens, return_dict_in_generate=True)
        new = out.sequences[:, inputs["input_ids"].shape[1] :]
        left, ended = [], {}
        for number, ids in enumerate(new.tolist()):
            answer = self._answers[indices[number]]
            answer += ids
            end = self._end_of(answer, seen[number])
            if end is None and len(answer) < self._max_new_tokens:
                left.append(number)
            else:
                ended[indices[number]] = self._answers.pop(indices[number])[:end]
        if not left:
            return None, ended
        mask, positions = inputs["attention_mask"], inputs["position_ids"]
        steps = torch.arange(1, new.shape[1] + 1, device=new.device)
        longer = {
            "input_ids": out.sequences,
            "attention_mask": torch.cat([mask, mask.new_ones(new.shape)], 1),
            "position_ids": torch.cat([positions, positions[:, -1:] + steps], 1),
        }
        rows = Rows(indices, longer, out.past_key_values)
        rows.keep(left)
        return rows, ended


def continue_in_turn(
    batch: RunningBatch,
    sequences: Sequence[Ids],
    order: Sequence[int],
    batch_size: int,
    inputs_of: Callable[[list[Ids]], dict[str, Any]],
) -> Iterator[dict[int, list[int]]]:
    """Answers to `sequences` by index, as they end. Neighbours in `order` should be of similar
    length; `inputs_of` makes the inputs of `generate` for some.
    """
    waiting = deque(order)
    while waiting or batch:
        room = batch_size - len(batch)
        if waiting and (not batch or 4 * room >= batch_size):
            indices = [waiting.popleft() for _ in range(min(room, len(waiting)))]
            yield batch.add(indices, inputs_of([sequences[index] for index in indices]))
        else:
            yield batch.advance()
