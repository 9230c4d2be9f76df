"""Packing: samples into sequences of at most `sequence_length` tokens, best fit within a window of the global order.

    lengths (window of 5) 6 3 4 5 2, capacity 8
      longest first:  6 -> [6]      5 -> [5]      4 -> [4]
                      3 -> fits 5 exactly: [5 3]  2 -> fits 6 exactly: [6 2]
      sequences, by their earliest sample:  (0 4) (1 3) (2)

A window never mixes with the next, so a range of steps sees the samples of its range of the global order and no others, but
for one window. The plan is the same on every rank and does not depend on their number.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass

import numpy as np

from beingvl.errors import InputError

WINDOW = 4096


@dataclass(frozen=True)
class PackingPlan:
    """`order` `[num_samples]` int64: positions in the global order, sequence by sequence.

    Sequence s is `order[starts[s] : starts[s + 1]]`; `efficiency` is the share of the sequences' tokens that are used.
    """

    order: np.ndarray
    starts: np.ndarray
    efficiency: float

    @property
    def num_sequences(self) -> int:
        return len(self.starts) - 1

    def sequence(self, number: int) -> np.ndarray:
        return self.order[self.starts[number] : self.starts[number + 1]]


def plan_packing(lengths: np.ndarray, sequence_length: int, window: int = WINDOW) -> PackingPlan:
    """Pack samples of `lengths` [num_samples] (tokens, in global order). Raises InputError when one does not fit at all."""
    _check_lengths(lengths, sequence_length)
    sequences: list[list[int]] = []
    for start in range(0, len(lengths), window):
        packed = pack_window(lengths[start : start + window], sequence_length)
        sequences += [[start + position for position in sequence] for sequence in packed]
    order = np.array([position for sequence in sequences for position in sequence], np.int64)
    starts = np.cumsum([0, *map(len, sequences)], dtype=np.int64)
    efficiency = float(lengths.sum()) / max(1, len(sequences) * sequence_length)
    return PackingPlan(order, starts, efficiency)


def plan_unpacked(lengths: np.ndarray, sequence_length: int) -> PackingPlan:
    """One sample a sequence, for comparison."""
    _check_lengths(lengths, sequence_length)
    efficiency = float(lengths.sum()) / max(1, len(lengths) * sequence_length)
    return PackingPlan(np.arange(len(lengths)), np.arange(len(lengths) + 1), efficiency)


def _check_lengths(lengths: np.ndarray, sequence_length: int) -> None:
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
