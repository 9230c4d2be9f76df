"""This rank's micro-batches of one optimizer step, fetched while the previous step computes."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import torch

from beingvl.data.loader import MicroBatch, TrainingData


@dataclass(frozen=True)
class Window:
    """`counts` `[4]`: target tokens, tokens, sum of squared document lengths, non-text tokens."""

    batches: list[MicroBatch]
    counts: np.ndarray


class WindowFetcher:
    """The windows of steps `state_dict()["step"] … stop - 1`, each collated one step ahead in a
    thread.

    With `pin`, the thread also moves them to page-locked memory, so that copies to the GPU overlap
    with computation. The state is the number of steps fetched; it fits any number of ranks.
    """

    def __init__(
        self,
        data: TrainingData,
        accumulation_steps: int,
        micro_batch_size: int,
        rank: int,
        num_ranks: int,
        stop: int = 0,
        pin: bool = False,
    ) -> None:
        self._data, self._accumulation_steps = data, accumulation_steps
        self._place = (rank, num_ranks, micro_batch_size)
        self._stop, self._pin = stop, pin
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="window")
        self._step = 0
        self._next: Future[Window] | None = None

    def state_dict(self) -> dict[str, int]:
        return {"step": self._step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._step, self._next = state["step"], None

    def __iter__(self) -> WindowFetcher:
        return self

    def __next__(self) -> Window:
        if self._step >= self._stop:
            raise StopIteration
        window = self._next.result() if self._next else self.fetch(self._step)
        self._step += 1
        self._next = self._pool.submit(self.fetch, self._step) if self._step < self._stop else None
        return window

    def fetch(self, step: int) -> Window:
        batches = [
            self._data.micro_batch(step, micro_step, *self._place)
            for micro_step in range(self._accumulation_steps)
        ]
        counts = [
            [
                b.num_target_tokens,
                len(b.input_ids),
                int((np.diff(b.cu_seqlens) ** 2).sum()),
                int((b.token_kinds > 0).sum()),
            ]
            for b in batches
        ]
        if self._pin:
            batches = [pinned(batch) for batch in batches]
        return Window(batches, np.sum(counts, axis=0))

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)

    def sample_ids(self, step: int) -> list[str]:
        """Ids of the samples that all ranks together see in a step."""
        return list(self._data.micro_batch(step, 0, 0, 1, self._data.sequences_per_step).sample_ids)


def pinned(batch: MicroBatch) -> MicroBatch:
    """The batch, with the arrays that go to the GPU in page-locked memory. Needs a GPU."""
    arrays = {
        name: getattr(batch, name)
        for name in ("input_ids", "target_ids", "position_ids", "cu_seqlens")
    }
    pinned_arrays = {
        name: torch.from_numpy(array).pin_memory().numpy() for name, array in arrays.items()
    }
    return replace(batch, **pinned_arrays)
