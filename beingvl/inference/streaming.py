"""Answers while they are made: their text piece by piece, and where a stop text ends them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import StoppingCriteria


class TextStreamer:
    """Hands on the text of one answer piece by piece, as transformers' `generate` makes it."""

    def __init__(
        self,
        decode: Callable[[Sequence[int]], str],
        on_text: Callable[[str], None],
        stop_text: str = "",
    ) -> None:
        self._decode = decode
        self._on_text = on_text
        self._beginnings = tuple(stop_text[:length] for length in range(1, len(stop_text)))
        self._ids: list[int] | None = None
        self._num_shown = 0

    def put(self, token_ids: torch.Tensor) -> None:
        if self._ids is None:  # the prompt comes first
            self._ids = []
            return
        self._ids.extend(token_ids.flatten().tolist())
        text = self._decode(self._ids)
        # Half a character, or what may become the stop text: the rest will come.
        if not text.endswith(("\N{REPLACEMENT CHARACTER}", *self._beginnings)):
            self._show(text)

    def end(self) -> None:
        self._show(self._decode(self._ids or []))

    def _show(self, text: str) -> None:
        if len(text) > self._num_shown:
            self._on_text(text[self._num_shown :])
            self._num_shown = len(text)


class StopAtText(StoppingCriteria):
    """Ends a row when its answer spells `text`, which tokens do in many ways (`.</` and `s>`)."""

    def __init__(self, decode: Callable[[Sequence[int]], str], text: str, width: int) -> None:
        """`width`: tokens of the prompts, padding included."""
        self._decode, self._text, self._width = decode, text, width

    def __call__(
        self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs: Any
    ) -> torch.BoolTensor:
        # Each token spells a byte or more, so no earlier one takes part.
        last = input_ids[:, self._width :][:, -len(self._text) :].tolist()
        spelt = [self._text in self._decode(row) for row in last]
        return torch.tensor(spelt, device=input_ids.device)
