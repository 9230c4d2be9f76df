"""The accumulation window: all micro-batches of one optimizer step on this rank, fetched while the step before it computes."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import torch

from beingvl.data.loader import MicroBatch, TrainingData


@dataclass(frozen=True)
class Window:
    """`counts` `[4]` of this rank: target tokens, tokens, squared document lengths, tokens that are no text."""

    batches: list[MicroBatch]
    counts: np.ndarray


class WindowFetcher:
    """`get(step)` for ascending steps up to `num_steps`; the next window is collated in a thread meanwhile.

    With `pin` it is also brought into page-locked memory there, from which copies to the GPU run beside computation.
    """

    def __init__(
        self, data: TrainingData, accumulation_steps: int, micro_batch_size: int, rank: int, num_ranks: int, pin: bool = False
    ) -> None:
        self._data = data
        self._accumulation_steps = accumulation_steps
        self._micro_batch_size = micro_batch_size
        self._rank, self._num_ranks, self._pin = rank, num_ranks, pin
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="window")
        self._next: tuple[int, Future[Window]] | None = None

    def get(self, step: int, num_steps: int) -> Window:
        window = self._next[1].result() if self._next and self._next[0] == step else self.fetch(step)
        self._next = (step + 1, self._pool.submit(self.fetch, step + 1)) if step + 1 < num_steps else None
        return window

    def fetch(self, step: int) -> Window:
        place = (self._rank, self._num_ranks, self._micro_batch_size)
        batches = [self._data.micro_batch(step, micro_step, *place) for micro_step in range(self._accumulation_steps)]
        counts = [
            [b.num_target_tokens, len(b.input_ids), int((np.diff(b.cu_seqlens) ** 2).sum()), int((b.token_kinds > 0).sum())]
            for b in batches
        ]
        return Window([pinned(batch) for batch in batches] if self._pin else batches, np.sum(counts, axis=0))

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)

    def sample_ids(self, step: int) -> list[str]:
        """The samples that all ranks together see in a step."""
        return list(self._data.micro_batch(step, 0, 0, 1, self._data.sequences_per_step).sample_ids)


def pinned(batch: MicroBatch) -> MicroBatch:
    """The batch with what goes to the GPU in page-locked memory. Needs a GPU."""
    arrays = {name: getattr(batch, name) for name in ("input_ids", "target_ids", "position_ids", "cu_seqlens")}
    return replace(batch, **{name: torch.from_numpy(array).pin_memory().numpy() for name, array in arrays.items()})
