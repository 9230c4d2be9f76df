"""Token ids in, token ids out: the back end that answers questions from the page and the API.

    prompt ids ──BackEnd.answer──> new ids, streamed ──Answer.pieces──> text, up to its stop

Questions that wait at the same time and use the same sampling share a batch. When a reader stops
reading, work on that answer ends; the batch continues for the others.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from beingvl.inference.model import BeingVL
from beingvl.inference.sampling import sampling_options
from beingvl.inference.streaming import EndsRows, TextPieces

MAX_BATCH = 16
GATHER_SECONDS = 0.01  # questions that arrive within this time start together
TICK_SECONDS = 0.25  # how often a waiting reader is told its place in the queue


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen. Temperature 0 takes the most likely one."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None

    def options(self) -> dict[str, Any]:
        """The arguments for transformers' `generate`."""
        return sampling_options(self.temperature, top_p=self.top_p)


class BackEnd(Protocol):
    def answer(
        self, prompt_ids: Sequence[int], max_new_tokens: int, sampling: Sampling
    ) -> Generator[list[int] | int, None, None]:
        """Yields new token ids as they are generated, up to eos, which is left out; while there are
        none, now and then the number of questions ahead. Closing the generator ends the work.
        """


class Answer:
    """One answer: its text while it is generated, and then why it ended."""

    def __init__(self, model: BeingVL, max_new_tokens: int, stops: Sequence[str] = ()) -> None:
        self._model, self._max_new_tokens = model, max_new_tokens
        self._pieces = TextPieces(model.decode_text, (*model.stop_texts, *stops))
        self.num_tokens = 0

    @property
    def finish_reason(self) -> str:
        """ "stop" at eos or a stop text, else "length"."""
        has_room = self.num_tokens < self._max_new_tokens
        return "stop" if has_room or self._pieces.is_stopped else "length"

    def pieces(
        self, back_end: BackEnd, prompt_ids: Sequence[int], sampling: Sampling
    ) -> Generator[str | int, None, None]:
        """Yields new text; while there is none, now and then the number of questions ahead."""
        new_ids = back_end.answer(prompt_ids, self._max_new_tokens, sampling)
        with closing(new_ids):
            for new in new_ids:
                if isinstance(new, int):
                    yield new
                    continue
                self.num_tokens += len(new)
                yield self._pieces.add(new)
                if self._pieces.is_stopped:
                    break
        yield self._pieces.rest()


class Row:
    """One reader's question, and the queue on which its tokens come back."""

    def __init__(self, prompt_ids: Sequence[int], max_new_tokens: int, sampling: Sampling) -> None:
        self.prompt_ids, self.max_new_tokens = prompt_ids, max_new_tokens
        self.sampling = sampling if sampling.temperature else Sampling()
        self.new: queue.SimpleQueue[int | BaseException | None] = queue.SimpleQueue()
        self.is_over = False

    def end(self, error: BaseException | None = None) -> None:
        if not self.is_over:
            self.is_over = True
            self.new.put(error)

    def pieces(self, num_before: Callable[[], int]) -> Generator[list[int] | int, None, None]:
        """Yields its tokens until the end; while there are none, now and then `num_before()`.
        Raises the error that it ended with.
        """
        while True:
            try:
                token = self.new.get(timeout=TICK_SECONDS)
            except queue.Empty:
                yield num_before()
                continue
            if token is None:
                return
            if isinstance(token, BaseException):
                raise token
            yield [token]


class TransformersBackEnd:
    """The model in this process. A single thread works, so that waiting questions form batches."""

    def __init__(self, model: BeingVL) -> None:
        self._model = model
        self._waiting: list[Row] = []
        self._num_answering = 0
        self._arrived = threading.Condition()
        threading.Thread(target=self._work, daemon=True).start()

    def answer(
        self, prompt_ids: Sequence[int], max_new_tokens: int, sampling: Sampling
    ) -> Generator[list[int] | int, None, None]:
        """As `BackEnd.answer`. Raises what the model's own code raises."""
        row = Row(prompt_ids, max_new_tokens, sampling)
        with self._arrived:
            self._waiting.append(row)
            self._arrived.notify()
        try:
            yield from row.pieces(lambda: self._num_before(row))
        finally:
            row.is_over = True
            with self._arrived:
                if row in self._waiting:
                    self._waiting.remove(row)

    def _num_before(self, row: Row) -> int:
        with self._arrived:
            if row not in self._waiting:
                return 0
            return self._num_answering + self._waiting.index(row)

    def _work(self) -> None:
        while True:
            rows = self._next_rows()
            try:
                if rows:
                    self._answer(rows)
            except Exception as error:  # raised in the readers' threads; the next batch may work
                for row in rows:
                    row.end(error)

    def _next_rows(self) -> list[Row]:
        """Wait for questions; returns the first one and those with the same sampling. One with a
        seed gets its own batch, because its answer must not depend on others.
        """
        with self._arrived:
            self._num_answering = 0
            self._arrived.wait_for(lambda: self._waiting)
        time.sleep(GATHER_SECONDS)
        with self._arrived:
            rows = self._waiting[:1]  # or none, if its reader has left
            sampling = rows[0].sampling if rows else Sampling()
            if sampling.seed is None:
                rows = [row for row in self._waiting if row.sampling == sampling][:MAX_BATCH]
            self._waiting = [row for row in self._waiting if row not in rows]
            self._num_answering = len(rows)
        return rows

    def _answer(self, rows: Sequence[Row]) -> None:
        stop_ids, sampling = self._model.stop_ids, rows[0].sampling
        prompts = [row.prompt_ids for row in rows]
        hands_out = _HandsOut(rows, stop_ids)
        if sampling.seed is not None:
            torch.manual_seed(sampling.seed)
        options = {"streamer": hands_out, **sampling.options()}
        longest = max(row.max_new_tokens for row in rows)
        self._model.continue_batch(prompts, longest, stop_ids, options, [hands_out])


class _HandsOut(EndsRows):
    """As a streamer of transformers' `generate`, gives each question its tokens; as a stopping
    criterion, ends those that are complete or whose reader has left.
    """

    def __init__(self, rows: Sequence[Row], stop_ids: Sequence[int]) -> None:
        self._rows, self._stop_ids = rows, stop_ids
        self._num_new = -1  # the prompts come first

    def put(self, token_ids: torch.Tensor) -> None:
        self._num_new += 1
        if not self._num_new:
            return
        for row, token in zip(self._rows, token_ids.tolist(), strict=True):
            if row.is_over:
                continue
            if token in self._stop_ids:
                row.end()
                continue
            row.new.put(token)
            if self._num_new == row.max_new_tokens:
                row.end()

    def end(self) -> None:
        for row in self._rows:
            row.end()

    def __call__(
        self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs: Any
    ) -> torch.BoolTensor:
        num_new = input_ids.shape[1] - self.width
        over = [row.is_over or num_new >= row.max_new_tokens for row in self._rows]
        return torch.tensor(over, device=input_ids.device)
