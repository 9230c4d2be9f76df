"""The readable twin: short, recounts everything, obviously correct. It is the tests' oracle.

visual_bpe.py explains merges, anchors and the stream.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import groupby

import numpy as np

Merge = tuple[int, int, int, int]


Cell = tuple[int, int]


class TokenGrid:
    """One image during merging: `ids` maps each anchor to its token, `owner` each cell to its
    token's anchor.
    """

    def __init__(self, codes: np.ndarray) -> None:
        height, width = codes.shape
        self.ids: dict[Cell, int] = {
            (y, x): int(codes[y, x]) for y in range(height) for x in range(width)
        }
        self.owner: dict[Cell, Cell] = {cell: cell for cell in self.ids}

    def pairs(self) -> Iterator[Merge]:
        """All pairs of tokens that share an edge, as (a, b, dy, dx); a has the earlier anchor."""
        touching = set()
        for (y, x), anchor in self.owner.items():
            for neighbour in ((y, x + 1), (y + 1, x)):
                other = self.owner.get(neighbour, anchor)
                if other != anchor:
                    touching.add((min(anchor, other), max(anchor, other)))
        for a, b in touching:
            yield self.ids[a], self.ids[b], b[0] - a[0], b[1] - a[1]

    def apply(self, merge: Merge, new_id: int) -> None:
        """Merge every occurrence, in raster order of a's anchor. Of overlapping occurrences (`a a
        a`) the later one finds its token gone.
        """
        a, b, dy, dx = merge
        for anchor in sorted(self.ids):
            other = (anchor[0] + dy, anchor[1] + dx)
            if self.ids.get(anchor) == a and self.ids.get(other) == b:
                self.ids[anchor] = new_id
                del self.ids[other]
                self.owner.update(
                    {cell: anchor for cell, owner in self.owner.items() if owner == other}
                )

    def stream(self) -> list[int]:
        return [self.ids[anchor] for anchor in sorted(self.ids)]


def spatial_consistency(counts: dict[Cell, int], sigma: float) -> float:
    """S of a pair of tokens (a, b) from the counts of its offsets u = (dy, dx).

    The mean over all occurrences of exp(-|u - mean u|² / (2 sigma²)): 1 if b is always at the same
    offset from a, or 0.78 (sigma 1) if it is half of the time on the right and half of the time
    below. Rounded to 30 bits, so that the last bit of a machine's exp never decides a tie.
    """
    total = sum(counts.values())
    mean_y = sum(dy * count for (dy, _), count in counts.items()) / total
    mean_x = sum(dx * count for (_, dx), count in counts.items()) / total
    consistency = 0.0
    for (dy, dx), count in sorted(counts.items()):
        squared_distance = (dy - mean_y) * (dy - mean_y) + (dx - mean_x) * (dx - mean_x)
        consistency += count * math.exp(-squared_distance / (2.0 * sigma * sigma))
    return math.floor(consistency / total * 2.0**30 + 0.5) / 2.0**30


def best_pair(counts: Counter[Merge], alpha: float, sigma: float, min_count: int) -> Merge | None:
    """The candidate with the highest priority; None if no pair occurs `min_count` times."""
    candidates = [pair for pair, count in counts.items() if count >= min_count]
    if not candidates:
        return None
    largest = max(counts.values())
    offsets: dict[tuple[int, int], dict[Cell, int]] = {}
    for (a, b, dy, dx), count in counts.items():
        offsets.setdefault((a, b), {})[dy, dx] = count

    def rank(pair: Merge) -> tuple[float, int, Merge]:
        priority = counts[pair] / largest + alpha * spatial_consistency(offsets[pair[:2]], sigma)
        return -priority, -counts[pair], pair

    return min(candidates, key=rank)


def train_reference(
    images: Sequence[np.ndarray],
    num_codes: int,
    num_merges: int,
    alpha: float = 0.3,
    sigma: float = 1.0,
    min_count: int = 2,
) -> tuple[list[Merge], list[list[int]]]:
    """Learn merges from code grids `[H, W]` (sizes may differ), recounting all pairs in each round.

    Returns the merges in rank order and each image's stream.
    """
    grids = [TokenGrid(image) for image in images]
    merges: list[Merge] = []
    while len(merges) < num_merges:
        counts = Counter(pair for grid in grids for pair in grid.pairs())
        merge = best_pair(counts, alpha, sigma, min_count)
        if merge is None:
            break
        for grid in grids:
            grid.apply(merge, num_codes + len(merges))
        merges.append(merge)
    return merges, [grid.stream() for grid in grids]


def encode_reference(codes: np.ndarray, num_codes: int, merges: Sequence[Merge]) -> list[int]:
    """Apply all merges in rank order to a code grid `[H, W]`."""
    grid = TokenGrid(codes)
    for rank, merge in enumerate(merges):
        grid.apply(merge, num_codes + rank)
    return grid.stream()


def cells_reference(image_id: int, num_codes: int, merges: Sequence[Merge]) -> dict[Cell, int]:
    """An id's polyomino: cell relative to the anchor -> code."""
    if image_id < num_codes:
        return {(0, 0): image_id}
    a, b, dy, dx = merges[image_id - num_codes]
    moved = {
        (y + dy, x + dx): code for (y, x), code in cells_reference(b, num_codes, merges).items()
    }
    return cells_reference(a, num_codes, merges) | moved


def decode_reference(
    ids: Sequence[int], height: int, width: int, num_codes: int, merges: Sequence[Merge]
) -> np.ndarray:
    """The code grid `[height, width]`: each token goes to the first cell not covered so far."""
    grid = np.full((height, width), -1)
    for image_id in ids:
        y, x = divmod(int(np.argmin(grid.ravel() >= 0)), width)
        for (dy, dx), code in cells_reference(image_id, num_codes, merges).items():
            assert grid[y + dy, x + dx] == -1
            grid[y + dy, x + dx] = code
    assert (grid >= 0).all()
    return grid


def positions_reference(
    image_ids: Sequence[int], num_codes: int, merges: Sequence[Merge]
) -> list[int]:
    """The position of each token in a token row if image tokens are at their anchors' cells. The id
    -1 is any token outside images.
    """
    positions: list[int] = []
    next_position = 0
    for is_image, run in groupby(image_ids, key=lambda image_id: image_id >= 0):
        shapes = [cells_reference(i, num_codes, merges) if is_image else {(0, 0): i} for i in run]
        num_cells = sum(map(len, shapes))
        side, covered = math.isqrt(num_cells), set()
        for cells in shapes:
            anchor = next(cell for cell in range(num_cells) if cell not in covered)
            positions.append(next_position + anchor)
            covered |= {anchor + dy * side + dx for dy, dx in cells}
        next_position += num_cells
    return positions
