"""Packing: samples into sequences of at most `sequence_length` tokens, best fit within a window
of the global order.

    lengths (window of 5) 6 3 4 5 2, capacity 8
      longest first:  6 -> [6]      5 -> [5]      4 -> [4]
                      3 -> fits 5 exactly: [5 3]  2 -> fits 6 exactly: [6 2]
      sequences, scattered:  (0 4) (2) (1 3)

The order of sequences is independent of lengths. Sorted by their earliest samples, sequences of
many short samples would come first, and every window would go from short samples to long ones.

Windows never mix, so a range of steps sees exactly the samples of its range of the global order, up
to one window. The plan is the same on every rank and for any number of ranks. It holds only the
number of sequences per window; which samples a sequence holds is recomputed, in milliseconds, when
its window is read.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right, insort
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import accumulate
from threading import Condition, Thread
from typing import Any

import numpy as np

from beingvl.errors import InputError

WINDOW = 4096
WINDOWS_AT_ONCE = 16  # drawn together, after a few smaller draws at the start
LONGEST_REST_SECONDS = 0.1
# 2**32 divided by the golden ratio: neighbours land far apart (Knuth, The Art of Computer
# Programming 3, 6.4)
SCATTER = 2654435761


class PackingPlan:
    """The number of sequences in each window of samples 0 … num_samples - 1, counted in order by a
    thread.

    Callers wait only for what their answer needs: the first sequences are known at once, the total
    at the end. The thread rests while a batch is made (`resting`).

    Args:
        lengths_of: (start, stop) -> tokens of these samples of the global order. Its errors are
            raised in the callers.
        known: `counts` of an earlier plan.
        advance: called from the thread after each window.
    """

    def __init__(
        self,
        lengths_of: Callable[[int, int], np.ndarray],
        num_samples: int,
        sequence_length: int,
        packing: bool = True,
        known: Mapping[str, Any] | None = None,
        advance: Callable[[], object] = lambda: None,
    ) -> None:
        self._starts: list[int] = [0]
        self._num_tokens, self._sequence_length = 0, sequence_length
        self._is_finished = False
        self._error: Exception | None = None
        self._grown = Condition()  # notified when windows were added or no batch is being made
        self._num_at_work, self._advance = 0, advance
        if known is not None:
            self._add(known["sequences"], known["tokens"])
            self._is_finished = True
        else:
            Thread(target=self._run, args=(lengths_of, num_samples, packing), daemon=True).start()

    def _run(
        self, lengths_of: Callable[[int, int], np.ndarray], num_samples: int, packing: bool
    ) -> None:
        try:
            start, num_windows = 0, 1
            while start < num_samples:
                self._rest()
                stop = min(start + num_windows * WINDOW, num_samples)
                lengths = lengths_of(start, stop)
                check_lengths(lengths, self._sequence_length)
                for at in range(0, len(lengths), WINDOW):
                    self._rest()
                    window = lengths[at : at + WINDOW]
                    count = (
                        count_sequences(window, self._sequence_length) if packing else len(window)
                    )
                    self._add([count], int(window.sum(dtype=np.int64)))
                    self._advance()
                start, num_windows = stop, min(2 * num_windows, WINDOWS_AT_ONCE)
        except Exception as error:
            self._error = error
        finally:
            with self._grown:
                self._is_finished = True
                self._grown.notify_all()

    def _rest(self) -> None:
        """Pause while others work, but not forever: a caller may wait for the total."""
        with self._grown:
            self._grown.wait_for(lambda: not self._num_at_work, LONGEST_REST_SECONDS)

    @contextmanager
    def resting(self) -> Iterator[None]:
        """For work of many short calls: the thread would take the interpreter's lock after each,
        and the work would wait 5 ms to get it back.
        """
        with self._grown:
            self._num_at_work += 1
        try:
            yield
        finally:
            with self._grown:
                self._num_at_work -= 1
                self._grown.notify_all()

    def _add(self, counts: Sequence[int], num_tokens: int) -> None:
        with self._grown:
            self._num_tokens += num_tokens
            self._starts += accumulate(counts[1:], initial=self._starts[-1] + counts[0])
            self._grown.notify_all()

    def _wait(self, num_sequences: float) -> None:
        """Wait until `num_sequences`, or all, are known."""
        with self._grown:
            self._grown.wait_for(lambda: self._is_finished or self._starts[-1] >= num_sequences)
        if self._error is not None and self._starts[-1] < num_sequences:
            raise self._error

    @property
    def starts(self) -> np.ndarray:
        """`[num_windows + 1]` int64: window w has sequences `starts[w]` … `starts[w + 1] - 1`."""
        self._wait(math.inf)
        return np.array(self._starts)

    @property
    def num_sequences(self) -> int:
        self._wait(math.inf)
        return self._starts[-1]

    @property
    def efficiency(self) -> float:
        """Share of the sequences' token places that are used."""
        capacity = self.num_sequences * self._sequence_length  # waits
        return self._num_tokens / max(1, capacity)

    @property
    def counts(self) -> dict[str, Any]:
        """The whole plan, for JSON."""
        sequences = np.diff(self.starts).tolist()  # waits
        return {"sequences": sequences, "tokens": self._num_tokens}

    def at_most(self, sequence: int) -> int:
        """`sequence`, or the number of sequences if there are fewer."""
        self._wait(sequence)
        return min(sequence, self._starts[-1])

    def window_of(self, sequence: int) -> tuple[int, int, int]:
        """(window, number of the sequence within it, number of sequences in it)."""
        self._wait(sequence + 1)
        window = bisect_right(self._starts, sequence) - 1
        return (
            window,
            sequence - self._starts[window],
            self._starts[window + 1] - self._starts[window],
        )


def check_lengths(lengths: np.ndarray, sequence_length: int) -> None:
    num_too_long = int((lengths > sequence_length).sum())
    if num_too_long:
        found = (
            f"{num_too_long} of {len(lengths)} samples are longer than sequence_length "
            f"{sequence_length}"
        )
        remedy = "raise beingvl.sequence_length or tokenize with --max_length"
        raise InputError(f"{found} (the longest has {lengths.max()} tokens); {remedy}")


def pack_window(lengths: np.ndarray, capacity: int) -> list[list[int]]:
    """Best-fit decreasing. Ties: the earlier sample first; among sequences with equal free space,
    the one that reached it last. Positions ascend within a sequence.

    Sequences are scattered by the position of their longest sample.
    """
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
    return [
        sorted(sequence)
        for sequence in sorted(sequences, key=lambda sequence: sequence[0] * SCATTER % 2**32)
    ]


def count_sequences(lengths: np.ndarray, capacity: int) -> int:
    """`len(pack_window(lengths, capacity))`, without assigning samples to sequences.

    Sequences with equally many free tokens are interchangeable, so `open_with[free]` counts them. A
    best-fitting sequence takes samples of one length until no more fit, so they go in together.
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
