"""How well a vocabulary compresses images, for every number of merges, and where more merges stop
paying off.

    count_used        how often each id occurs in the images' streams           int64 [num_ids]
    count_applied     how often each merge was applied                          int64 [num_merges]
    Compression       mean tokens per image after 0, 1, … merges, and the knee of that curve

The first n merges are a vocabulary themselves, and a merge is applied before those of higher rank.
So encoding once with all merges gives the whole curve: each application of a merge saved one token,
whatever came later.

The knee is Kneedle's (Satopaa et al. 2011, "Finding a Kneedle in a Haystack"), without smoothing:
with both axes scaled to 0 … 1, the point farthest below the line between the curve's ends. Before
the knee a merge saves more than the average merge, after it less; so the knee depends on where the
curve ends.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from beingvl.vbpe.visual_bpe import VisualBPE

CHUNK = 4096  # images encoded at once
POINTS_KEPT = 64  # points of a curve that are saved


def count_used(vbpe: VisualBPE, arrays: Sequence[np.ndarray]) -> np.ndarray:
    """Encode arrays of codes `[N, H, W]`, whose sizes may differ."""
    used = np.zeros(vbpe.num_ids, np.int64)
    for array in arrays:
        for start in range(0, len(array), CHUNK):
            ids, _ = vbpe.encode_batch(array[start : start + CHUNK])
            used += np.bincount(ids, minlength=vbpe.num_ids)
    return used


def count_applied(vbpe: VisualBPE, used: np.ndarray) -> np.ndarray:
    """Each token in the final streams took all the merges that it is made of."""
    total = used.copy()
    for rank in range(vbpe.num_merges - 1, -1, -1):
        a, b = vbpe.merges[rank, :2]
        total[a] += total[vbpe.num_codes + rank]
        total[b] += total[vbpe.num_codes + rank]
    return total[vbpe.num_codes :]


@dataclass
class Compression:
    """A falling curve: after `merges` merges, an image has `tokens` tokens on average."""

    num_images: int
    merges: np.ndarray  # int64 [P], from 0
    tokens: np.ndarray  # float64 [P]

    @classmethod
    def of(cls, num_images: int, num_cells: int, applied: np.ndarray) -> Compression:
        saved = np.concatenate([[0], np.cumsum(applied)])
        return cls(num_images, np.arange(len(saved)), (num_cells - saved) / num_images)

    @classmethod
    def measure(cls, vbpe: VisualBPE, arrays: Sequence[np.ndarray]) -> Compression:
        """The curve for arrays of codes `[N, H, W]`, whose sizes may differ."""
        applied = count_applied(vbpe, count_used(vbpe, arrays))
        return cls.of(sum(map(len, arrays)), sum(array.size for array in arrays), applied)

    @property
    def knee(self) -> int:
        """Number of merges after which more stop paying off; 0 if none saves anything."""
        last, saved = self.merges[-1], self.tokens[0] - self.tokens[-1]
        if not saved:
            return 0
        below = (self.tokens[0] - self.tokens) / saved - self.merges / last
        return int(self.merges[below.argmax()])

    def at(self, num_merges: int) -> float:
        """Tokens per image after `num_merges`, which must be a point of the curve."""
        return float(self.tokens[np.searchsorted(self.merges, num_merges)])

    def describe(self) -> str:
        """The knee as a sentence."""
        last, knee = int(self.merges[-1]), self.knee
        return (
            f"merges stop paying off after the first {knee:,}: {self.at(knee):.1f} tokens per "
            f"image; it is {self.tokens[0]:.1f} with none and {self.tokens[-1]:.1f} with all "
            f"{last:,}"
        )

    # ---- in vbpe.json ----

    def to_dict(self) -> dict[str, object]:
        """The knee and about `POINTS_KEPT` points, denser where the curve is steep."""
        kept = (np.linspace(0, 1, POINTS_KEPT) ** 2 * (len(self.merges) - 1)).astype(int)
        kept = np.unique([*kept, np.searchsorted(self.merges, self.knee)])
        return {
            "num_images": self.num_images,
            "merges": self.merges[kept].tolist(),
            "tokens_per_image": self.tokens[kept].round(3).tolist(),
        }

    @classmethod
    def from_dict(cls, fields: dict) -> Compression:
        points = np.array(fields["merges"]), np.array(fields["tokens_per_image"], float)
        return cls(fields["num_images"], *points)
