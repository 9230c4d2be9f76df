"""Packing: samples into sequences of at most `sequence_length` tokens, best fit within a window of the global order.

    lengths (window of 5) 6 3 4 5 2, capacity 8
      longest first:  6 -> [6]      5 -> [5]      4 -> [4]
                      3 -> fits 5 exactly: [5 3]  2 -> fits 6 exactly: [6 2]
      sequences, by their earliest sample:  (0 4) (1 3) (2)

A window never mixes with the next, so a range of steps sees the samples of its range of the global order and no others, but
for one window. The plan is the same on every rank and does not depend on their number. It is the number of sequences of every
window: which samples a sequence holds is found again, in milliseconds, when its window is read.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from beingvl.errors import InputError

WINDOW = 4096
WINDOWS_AT_ONCE = 64  # bounds the memory of a long plan


@dataclass(frozen=True)
class PackingPlan:
    """`starts` `[num_windows + 1]` int64: sequence s lies in the window w with `starts[w] <= s < starts[w + 1]`.

    `efficiency` is the share of the sequences' tokens that are used.
    """

    starts: np.ndarray
    efficiency: float

    @property
    def num_sequences(self) -> int:
        return int(self.starts[-1])

    def window_of(self, sequence: int) -> tuple[int, int]:
        """(window, number of the sequence in it)."""
        window = int(np.searchsorted(self.starts, sequence, side="right")) - 1
        return window, int(sequence - self.starts[window])


def plan_packing(
    lengths_of: Callable[[int, int], np.ndarray], num_samples: int, sequence_length: int, packing: bool = True
) -> PackingPlan:
    """Plan samples 0 … num_samples - 1 of the global order, whose tokens `lengths_of(start, stop)` says.

    Without `packing` every sample is a sequence. Raises InputError when a sample does not fit at all.
    """
    counts, tokens = [0], 0
    for start in range(0, num_samples, WINDOWS_AT_ONCE * WINDOW):
        lengths = lengths_of(start, min(start + WINDOWS_AT_ONCE * WINDOW, num_samples))
        check_lengths(lengths, sequence_length)
        tokens += int(lengths.sum(dtype=np.int64))
        windows = [lengths[at : at + WINDOW] for at in range(0, len(lengths), WINDOW)]
        counts += [count_sequences(window, sequence_length) if packing else len(window) for window in windows]
    starts = np.cumsum(counts, dtype=np.int64)
    return PackingPlan(starts, tokens / max(1, int(starts[-1]) * sequence_length))


def check_lengths(lengths: np.ndarray, sequence_length: int) -> None:
    num_too_long = int((lengths > sequence_length).sum())
    if num_too_long:
        found = f"{num_too_long} of {len(lengths)} samples are longer than sequence_length {sequence_length}"
        remedy = "raise beingvl.sequence_length or tokenize with --max_length"
        raise InputError(f"{found} (the longest has {lengths.max()} tokens); {remedy}")


def pack_window(lengths: np.ndarray, capacity: int) -> list[list[int]]:
    """Best-fit decreasing. Ties: the earlier sample first, the sequence opened last first. Positions ascend in a sequence."""
    open_with: dict[int, list[list[int]]] = {}  # free tokens -> sequences
    free_sizes: list[int] = []  # the keys of open_with, ascending
    sequences: list[list[int]] = []
    for position in np.argsort(-lengths, kind="stable"):
        length = int(lengths[position])
        found = bisect_left(free_sizes, length)
        if found == len(free_sizes):
            sequence: list[int] = []
            free = capacity
            sequences.append(sequence)
        else:
            free = free_sizes[found]
            sequence = open_with[free].pop()
            if not open_with[free]:
                del open_with[free], free_sizes[found]
        sequence.append(int(position))
        if free > length:
            if free - length not in open_with:
                insort(free_sizes, free - length)
            open_with.setdefault(free - length, []).append(sequence)
    return sorted(sorted(sequence) for sequence in sequences)


def count_sequences(lengths: np.ndarray, capacity: int) -> int:
    """`len(pack_window(lengths, capacity))`, without saying which sample is where.

    Sequences with as many free tokens are alike, so they are counted: `open_with[free]`. A best-fitting sequence takes samples of
    one length until none fits, so samples of one length go in together.
    """
    open_with = [0] * (capacity + 1)
    free_sizes: list[int] = []  # where open_with is not 0, ascending
    num_sequences = 0
    counts = np.bincount(lengths, minlength=1)
    present = np.flatnonzero(counts)[::-1]
    for length, left in zip(present.tolist(), counts[present].tolist(), strict=True):
        while left:
            found = bisect_left(free_sizes, length)
            is_new = found == len(free_sizes)
            free = capacity if is_new else free_sizes[found]
            available = left if is_new else open_with[free]
            each = min(left, free // length)
            used = min(available, left // each)
            left -= used * each
            if is_new:
                num_sequences += used
            else:
                open_with[free] -= used
                if used == available:
                    del free_sizes[found]
            rest = free - each * length
            if rest:
                if not open_with[rest]:
                    insort(free_sizes, rest)
                open_with[rest] += used
    return num_sequences
