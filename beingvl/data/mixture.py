"""The mixture: which sample is the k-th of the global order, as a pure function of (source sizes, weights, seed, k).

Draws come in blocks of 100. A block holds an exact quota of every source, shuffled; the j-th draw from a source walks
through a seeded permutation of that source, a new permutation for every pass, so nothing repeats within a pass.

    weights 80 / 20, block 0:  quotas 80 and 20  ->  slots shuffled:  0 0 1 0 0 0 1 0 …
    source 1, its 3rd draw  ->  permutation(seed, source 1, pass 0)[2]
"""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction

import numpy as np

from beingvl.errors import InputError

BLOCK = 100


class Mixture:
    """The infinite global order over samples `0 … num_samples-1` that belong to sources.

    Args:
        source_of: `[num_samples]` source index of every sample.
        sources: names of the sources, in index order.
        weights: name -> share of the draws; they need not sum to 1. Sources without a weight are never drawn.
        seed: of the order.
    """

    def __init__(self, source_of: np.ndarray, sources: list[str], weights: Mapping[str, float], seed: int) -> None:
        unknown = sorted(set(weights) - set(sources))
        if unknown:
            raise InputError(f"the mixture names the source {unknown[0]!r}, the shards hold {sources}; correct beingvl.mixture")
        drawn = {name: Fraction(str(weight)) for name, weight in weights.items() if weight > 0}
        if not drawn or min(weights.values()) < 0:
            raise InputError(f"the mixture weights are {dict(weights)}, expected none negative and at least one above 0")
        self.sources = sources
        self.seed = seed
        self._indices = [sources.index(name) for name in drawn]
        total = sum(drawn.values())
        self._shares = [weight / total for weight in drawn.values()]
        self._largest = max(range(len(self._shares)), key=lambda s: self._shares[s])
        self._members = [np.flatnonzero(source_of == index) for index in self._indices]
        self._permutations: dict[tuple[int, int], np.ndarray] = {}

    @property
    def num_samples(self) -> int:
        """Samples of all drawn sources together: the length of one epoch."""
        return sum(map(len, self._members))

    def draw(self, start: int, stop: int) -> np.ndarray:
        """Sample indices `[stop - start]` int64 at positions start … stop-1 of the global order."""
        blocks = [self._block(number) for number in range(start // BLOCK, -(-stop // BLOCK))]
        first = start // BLOCK * BLOCK
        return np.concatenate(blocks)[start - first : stop - first] if blocks else np.empty(0, np.int64)

    def _allotment(self, num_blocks: int) -> list[int]:
        """Draws per source in the first `num_blocks` blocks; what rounding leaves goes to the largest source."""
        counts = [int(share * BLOCK * num_blocks) for share in self._shares]
        counts[self._largest] += BLOCK * num_blocks - sum(counts)
        return counts

    def _block(self, number: int) -> np.ndarray:
        before, after = self._allotment(number), self._allotment(number + 1)
        slots = np.repeat(np.arange(len(self._shares)), np.subtract(after, before))
        slots = self._generator(0, number).permutation(slots)
        out = np.empty(BLOCK, np.int64)
        for source, first_draw in enumerate(before):
            places = np.flatnonzero(slots == source)
            out[places] = self._nth_draws(source, np.arange(first_draw, first_draw + len(places)))
        return out

    def _nth_draws(self, source: int, numbers: np.ndarray) -> np.ndarray:
        members = self._members[source]
        passes, positions = np.divmod(numbers, len(members))
        out = np.empty(len(numbers), np.int64)
        for pass_number in np.unique(passes):
            chosen = passes == pass_number
            out[chosen] = members[self._permutation(source, int(pass_number))[positions[chosen]]]
        return out

    def _permutation(self, source: int, pass_number: int) -> np.ndarray:
        key = (source, pass_number)
        if key not in self._permutations:
            self._permutations = {k: v for k, v in self._permutations.items() if k[0] != source or k[1] >= pass_number - 1}
            self._permutations[key] = self._generator(1 + source, pass_number).permutation(len(self._members[source]))
        return self._permutations[key]

    def _generator(self, stream: int, number: int) -> np.random.Generator:
        return np.random.Generator(np.random.Philox(np.random.SeedSequence([self.seed, stream, number])))
