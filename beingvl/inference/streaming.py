"""Streaming answers: their text piece by piece, and where a stop text ends them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from transformers import StoppingCriteria


def cut_at(answer: str, until: str | Iterable[str] | None) -> str:
    """The answer up to the first stop text, stripped."""
    for stop in [until] if isinstance(until, str) else until or []:
        answer = answer.split(stop)[0] if stop else answer
    return answer.strip()


class TextPieces:
    """Token ids in, new text out; the pieces join to the text up to the first of `stops`."""

    def __init__(self, decode: Callable[[Sequence[int]], str], stops: Sequence[str] = ()) -> None:
        """`decode` turns token ids into text."""
        self._decode, self._stops = decode, stops
        self._ids: list[int] = []
        self._num_shown = 0
        self.is_stopped = False

    def add(self, token_ids: Iterable[int]) -> str:
        """The text that can be shown now. Incomplete characters and possible stop texts wait."""
        self._ids.extend(token_ids)
        text = self._decode(self._ids)
        self.is_stopped = any(stop in text for stop in self._stops)
        waits = text.endswith("\N{REPLACEMENT CHARACTER}") or self._begins_stop(text)
        return "" if waits and not self.is_stopped else self._new(text)

    def _begins_stop(self, text: str) -> bool:
        ends = [(stop, min(len(stop) - 1, len(text))) for stop in self._stops]
        return any(text.endswith(stop[:end]) for stop, most in ends for end in range(1, most + 1))

    def rest(self) -> str:
        """The text that was still waiting; call it after the last ids."""
        return self._new(self._decode(self._ids))

    def _new(self, text: str) -> str:
        piece = cut_at(text, self._stops)[self._num_shown :]
        self._num_shown += len(piece)
        return piece


class TextStreamer:
    """`TextPieces` of one answer as a streamer of transformers' `generate`."""

    def __init__(self, pieces: TextPieces, on_text: Callable[[str], None]) -> None:
        self._pieces, self._on_text = pieces, on_text
        self._has_prompt = False

    def put(self, token_ids: torch.Tensor) -> None:
        if self._has_prompt:
            self._say(self._pieces.add(token_ids.flatten().tolist()))
        self._has_prompt = True  # the first call passes the prompt

    def end(self) -> None:
        self._say(self._pieces.rest())

    def _say(self, piece: str) -> None:
        if piece:
            self._on_text(piece)


class EndsRows(StoppingCriteria):
    """Ends answers by their new tokens. `width`: length of the padded prompts, set by
    `BeingVL.continue_batch`.
    """

    width = 0


class StopAtText(EndsRows):
    """Ends an answer that spells `text`, in whatever tokens (`.</` and `s>`, for example)."""

    def __init__(self, decode: Callable[[Sequence[int]], str], text: str) -> None:
        self._decode, self._text = decode, text

    def __call__(
        self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs: Any
    ) -> torch.BoolTensor:
        # Each token spells at least one byte, so earlier tokens cannot be part of the text.
        last = input_ids[:, self.width :][:, -len(self._text) :].tolist()
        spelt = [self._text in self._decode(row) for row in last]
        return torch.tensor(spelt, device=input_ids.device)
