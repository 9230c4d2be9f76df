"""The mixture: which sample is k-th in the global order, as a pure function of (source sizes,
weights, seed, k).

Draws come in blocks of 100, or several hundred with many sources. A block holds an exact quota of
each source, shuffled. Successive draws from a source follow a seeded permutation of it, a new one
for each pass, so nothing repeats within a pass.

    weights 80 / 20, block 0:  quotas 80 and 20  ->  slots shuffled:  0 0 1 0 0 0 1 0 …
    source 1, its 3rd draw  ->  permute(2, size of source 1, key of (seed, source 1, pass 0))

Nothing is stored: a permutation is a formula (`permute`), so the cost of any range of the order is
its length.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

import numpy as np

from beingvl.errors import InputError

BLOCK = 100
DRAWS_AT_ONCE = 200_000  # bounds the memory of a long draw
FEISTEL_ROUNDS = 6


class Mixture:
    """The infinite global order of samples from several sources.

    Args:
        members: sample numbers of each source, ascending (`ShardReader.members`).
        sources: names of the sources, in the same order.
        weights: name -> share of the draws. They need not sum to 1; sources without a weight are
            never drawn.
        seed: of the order.
    """

    def __init__(
        self,
        members: Sequence[np.ndarray],
        sources: list[str],
        weights: Mapping[str, float],
        seed: int,
    ) -> None:
        unknown = sorted(set(weights) - set(sources))
        if unknown:
            raise InputError(
                f"the mixture names the source {unknown[0]!r}, the shards hold {sources}; "
                "correct beingvl.mixture"
            )
        check_weights(weights)
        drawn = {name: Fraction(str(weight)) for name, weight in weights.items() if weight > 0}
        self.sources = sources
        self.seed = seed
        self._indices = [sources.index(name) for name in drawn]
        total = sum(drawn.values())
        self._shares = [weight / total for weight in drawn.values()]
        self._largest = max(range(len(self._shares)), key=lambda s: self._shares[s])
        # A share that is not a whole number of draws per block is sometimes rounded up, at the
        # expense of the largest source.
        num_rounded = sum((share * BLOCK).denominator > 1 for share in self._shares)
        self._block = BLOCK * max(1, math.ceil(num_rounded / self._shares[self._largest] / BLOCK))
        self._members = [members[index] for index in self._indices]
        for name, own in zip(drawn, self._members, strict=True):
            if not len(own):
                raise InputError(
                    f"the mixture draws from {name!r}, which has no sample; leave it out of "
                    "beingvl.mixture"
                )

    @property
    def identity(self) -> list[Any]:
        """What determines the order, besides the samples."""
        return [
            self.seed,
            [
                [self.sources[index], str(share)]
                for index, share in zip(self._indices, self._shares, strict=True)
            ],
        ]

    @property
    def num_samples(self) -> int:
        """Samples of all drawn sources together: the length of one epoch."""
        return sum(map(len, self._members))

    def draw(self, start: int, stop: int) -> np.ndarray:
        """Sample indices `[stop - start]` uint32 at these positions of the global order."""
        first, last = start // self._block, -(-stop // self._block)
        at_once = DRAWS_AT_ONCE // self._block
        blocks = [self._blocks(at, min(at + at_once, last)) for at in range(first, last, at_once)]
        drawn = np.concatenate(blocks) if blocks else np.empty(0, np.uint32)
        return drawn[start - first * self._block : stop - first * self._block]

    def counts(self, num_samples: int) -> dict[str, int]:
        """Number of draws from each source among the first `num_samples`."""
        whole, rest = divmod(num_samples, self._block)
        totals = np.array(self._allotment(whole))
        if rest:
            totals = totals + np.bincount(
                self._slots(whole, whole + 1)[0, :rest], minlength=len(totals)
            )
        return {
            self.sources[index]: int(count)
            for index, count in zip(self._indices, totals, strict=True)
        }

    def _allotment(self, num_blocks: int) -> list[int]:
        """Draws per source in `num_blocks` blocks; the largest source gets the remainder."""
        draws = self._block * num_blocks
        counts = [share.numerator * draws // share.denominator for share in self._shares]
        counts[self._largest] += draws - sum(counts)
        return counts

    def _slots(self, first: int, last: int) -> np.ndarray:
        """`[last - first, block]`: the source that each place of these blocks draws from."""
        quotas = np.diff(
            np.array([self._allotment(number) for number in range(first, last + 1)]), axis=0
        )
        sorted_slots = np.repeat(
            np.tile(np.arange(len(self._shares)), last - first), quotas.ravel()
        ).reshape(-1, self._block)
        places = np.arange(first * self._block, last * self._block, dtype=np.uint64)
        order = np.argsort(
            mix(places, self._key(0, 0)).reshape(-1, self._block), axis=1, kind="stable"
        )
        return np.take_along_axis(sorted_slots, order, axis=1)

    def _blocks(self, first: int, last: int) -> np.ndarray:
        slots = self._slots(first, last).ravel()
        out = np.empty(len(slots), np.uint32)
        for source, first_draw in enumerate(self._allotment(first)):
            places = np.flatnonzero(slots == source)
            out[places] = self._nth_draws(source, np.arange(first_draw, first_draw + len(places)))
        return out

    def _nth_draws(self, source: int, numbers: np.ndarray) -> np.ndarray:
        """Draws `numbers` (ascending) of a source: pass by pass, each in its own permutation."""
        members = self._members[source]
        out = np.empty(len(numbers), np.uint32)
        passes = numbers // len(members)
        for pass_number in np.unique(passes).tolist():
            chosen = slice(*np.searchsorted(passes, [pass_number, pass_number + 1]))
            key = self._key(1 + source, pass_number)
            out[chosen] = members[
                permute(numbers[chosen] - pass_number * len(members), len(members), key)
            ]
        return out

    def _key(self, stream: int, number: int) -> int:
        return int(
            np.random.SeedSequence([self.seed, stream, number]).generate_state(1, np.uint64)[0]
        )


def check_weights(weights: Mapping[str, Any]) -> None:
    """Raises InputError for weights that are negative, not finite, or all 0."""
    are_numbers = all(
        isinstance(weight, int | float) and not isinstance(weight, bool)
        for weight in weights.values()
    )
    if (
        not are_numbers
        or not all(0 <= weight < math.inf for weight in weights.values())
        or not any(weights.values())
    ):
        raise InputError(
            f"the mixture weights are {dict(weights)}, expected numbers, none negative and "
            "at least one above 0"
        )


def mix(values: np.ndarray, key: int) -> np.ndarray:
    """Scatter `values` uint64 over all 64 bits (splitmix64's finaliser applied to value + key)."""
    x = values + np.uint64(key)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def permute(numbers: np.ndarray, size: int, key: int) -> np.ndarray:
    """Images of `numbers` under a pseudo-random permutation of 0 … size-1, int64, each in constant
    time and memory.

    A Feistel network permutes all numbers of an even number of bits. Results outside 0 … size-1 go
    through it again until they are inside, which leaves a permutation of 0 … size-1 ("cycle
    walking": Black and Rogaway, 2002).
    """
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    out = numbers.astype(np.uint64)
    outside: Any = slice(None)
    while True:
        left, right = out[outside] >> half, out[outside] & mask
        for round_number in range(FEISTEL_ROUNDS):
            left, right = (
                right,
                left ^ (mix(right, (key + round_number * 0x9E3779B97F4A7C15) % 2**64) & mask),
            )
        out[outside] = (left << half) | right
        outside = np.flatnonzero(out >= size)
        if not len(outside):
            return out.astype(np.int64)
