"""Visual byte-pair encoding (vBPE): byte-pair encoding on a 2-D grid of VQ codes, lossless.

A *merge* `(a, b, dy, dx)` of rank r turns token a and the token b whose anchor lies (dy, dx) from a's anchor into one token with
image id `num_codes + r`. A token's *anchor* is its first cell in raster order, and a is the pair's earlier anchor, so every id is
one fixed polyomino of codes. Only tokens that share an edge may merge. The stream lists the tokens in raster order of anchors:

    grid      merge (7, 8, 0, 1) -> 9     merge (9, 7, 1, 0) -> 10     stream
    7 8 7     9 9 7                       10 10 7                      10 7 5 8
    7 5 8     7 5 8                       10  5 8

The stream alone gives the grid back, because the next token's anchor is always the first cell not yet covered.

Two twins live here and in `vbpe_numba.py`:

    train_reference, encode_reference, decode_reference     short, recount everything, obviously right: the oracle of the tests
    VisualBPE.encode / decode / encode_batch                the same results, bit for bit, from compiled kernels

Learning takes, in every round, the candidate with the highest priority `P = F + alpha * S` (arXiv 2506.23639): F is its count
divided by the largest count of the round, S the spatial consistency of its two tokens (`spatial_consistency`). Ties: higher
count, then smaller (a, b, dy, dx).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from beingvl.errors import InputError
from beingvl.artefact.manifest import write_atomically

if TYPE_CHECKING:
    from beingvl.vbpe.published import LegacyVisualBPE

Merge = tuple[int, int, int, int]
Cell = tuple[int, int]

VBPE_FILE = "vbpe.json"
FORMAT = "beingvl-vbpe"
FORMAT_VERSION = 1
MAX_CODES = 65_536
MAX_SIDE = 2047  # of a grid, in cells: dy and dx of a pair then fit 24 bits of its key
MAX_IDS = 1 << 19  # codes and merges: two ids then fit 39 bits
MAX_SHAPE_CELLS = 1 << 26  # of all tokens together: a file whose tokens double in size at every merge is refused


# ---- the readable twin ----


class TokenGrid:
    """One image while it is being merged: `ids` maps every anchor to its token, `owner` every cell to the anchor of its token."""

    def __init__(self, codes: np.ndarray) -> None:
        height, width = codes.shape
        self.ids: dict[Cell, int] = {(y, x): int(codes[y, x]) for y in range(height) for x in range(width)}
        self.owner: dict[Cell, Cell] = {cell: cell for cell in self.ids}

    def pairs(self) -> Iterator[Merge]:
        """Every pair of tokens that share an edge, once, as (a, b, dy, dx) with a the earlier anchor."""
        touching = set()
        for (y, x), anchor in self.owner.items():
            for neighbour in ((y, x + 1), (y + 1, x)):
                other = self.owner.get(neighbour, anchor)
                if other != anchor:
                    touching.add((min(anchor, other), max(anchor, other)))
        for a, b in touching:
            yield self.ids[a], self.ids[b], b[0] - a[0], b[1] - a[1]

    def apply(self, merge: Merge, new_id: int) -> None:
        """Merge every occurrence, in raster order of a's anchor; an overlapping later one (`a a a`) finds its token gone."""
        a, b, dy, dx = merge
        for anchor in sorted(self.ids):
            other = (anchor[0] + dy, anchor[1] + dx)
            if self.ids.get(anchor) == a and self.ids.get(other) == b:
                self.ids[anchor] = new_id
                del self.ids[other]
                self.owner.update({cell: anchor for cell, owner in self.owner.items() if owner == other})

    def stream(self) -> list[int]:
        return [self.ids[anchor] for anchor in sorted(self.ids)]


def spatial_consistency(counts: dict[Cell, int], sigma: float) -> float:
    """S of a pair of tokens (a, b) from the counts of its offsets u = (dy, dx).

    The mean over all occurrences of exp(-|u - mean u|² / (2 sigma²)): 1 when b always lies at the same place from a, e.g. 0.78
    (sigma 1) when it lies to the right half of the time and below otherwise. Rounded to 30 bits, so that the last bit of a
    machine's exp never decides a tie.
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
    """The candidate with the highest priority; None when no pair occurs `min_count` times."""
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
    images: Sequence[np.ndarray], num_codes: int, num_merges: int, alpha: float = 0.3, sigma: float = 1.0, min_count: int = 2
) -> tuple[list[Merge], list[list[int]]]:
    """Learn merges from code grids `[H, W]` (any mix of sizes), recounting all pairs in every round.

    Returns the merges in rank order and the stream of every image.
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
    """Apply every merge in rank order to a code grid `[H, W]`."""
    grid = TokenGrid(codes)
    for rank, merge in enumerate(merges):
        grid.apply(merge, num_codes + rank)
    return grid.stream()


def cells_reference(image_id: int, num_codes: int, merges: Sequence[Merge]) -> dict[Cell, int]:
    """The polyomino of an id: cell relative to the anchor -> code."""
    if image_id < num_codes:
        return {(0, 0): image_id}
    a, b, dy, dx = merges[image_id - num_codes]
    moved = {(y + dy, x + dx): code for (y, x), code in cells_reference(b, num_codes, merges).items()}
    return cells_reference(a, num_codes, merges) | moved


def decode_reference(ids: Sequence[int], height: int, width: int, num_codes: int, merges: Sequence[Merge]) -> np.ndarray:
    """The code grid `[height, width]` of a valid stream: put every token at the first cell not yet covered."""
    grid = np.full((height, width), -1)
    for image_id in ids:
        y, x = divmod(int(np.argmin(grid.ravel() >= 0)), width)
        for (dy, dx), code in cells_reference(image_id, num_codes, merges).items():
            assert grid[y + dy, x + dx] == -1
            grid[y + dy, x + dx] = code
    assert (grid >= 0).all()
    return grid


# ---- the vocabulary that everything uses ----


@dataclass
class VisualBPE:
    """A vBPE vocabulary: codes 0 … num_codes-1 and, for rank r, the merge `num_codes + r`.

    `merges` is int32 `[R, 4]` of (a, b, dy, dx). `lineage` names what it was made with (`vqgan`: hash), `parameters` how it was
    trained, `grid` the (height, width) of the images it was trained on when they all had one size. Two vocabularies are equal
    when their codes and merges are.
    """

    num_codes: int
    merges: np.ndarray
    lineage: dict[str, str] = field(default_factory=dict, compare=False)
    parameters: dict[str, Any] = field(default_factory=dict, compare=False)
    grid: tuple[int, int] | None = field(default=None, compare=False)
    source: str = field(default="vBPE", compare=False)

    kind = "2d"

    def __post_init__(self) -> None:
        """Raises InputError for merges that no training can have made."""
        self.merges = _checked_merges(self.merges, self.num_codes, self.source)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, VisualBPE) and self.fingerprint() == other.fingerprint()

    @property
    def num_merges(self) -> int:
        return len(self.merges)

    @property
    def num_ids(self) -> int:
        """Image ids in all: codes and merges."""
        return self.num_codes + self.num_merges

    def fingerprint(self) -> str:
        """Hash of codes and merges: what two artefacts must share to be used together."""
        content = json.dumps([self.kind, self.num_codes, self.merges.tolist()], separators=(",", ":"))
        return "sha256:" + hashlib.sha256(content.encode()).hexdigest()

    # ---- encode and decode ----

    def encode(self, grid: np.ndarray) -> np.ndarray:
        """Codes `[H, W]`, any integer type, to image ids `[n]` int32. Raises InputError for all but grids of known codes."""
        return self.encode_batch(np.asarray(grid)[None], num_threads=1)[0]

    def encode_batch(self, grids: np.ndarray, num_threads: int = 1) -> tuple[np.ndarray, np.ndarray]:
        """Codes `[N, H, W]` to (image ids, int32 flat; offsets, int64 `[N + 1]`): image n is ids[offsets[n]:offsets[n+1]].

        The kernels release the GIL; `num_threads` of them run at once.
        """
        from beingvl.vbpe import kernels as fast

        grids = checked_grids(grids, self.num_codes, self.source)
        tables = self.tables  # built once, before the threads ask for it

        def encode_chunk(chunk: np.ndarray, ids: np.ndarray, lengths: np.ndarray) -> int:
            return fast.encode_images(chunk, tables, ids, lengths)

        return encode_in_chunks(encode_chunk, grids, num_threads)

    def decode(self, ids: np.ndarray, height: int, width: int) -> np.ndarray:
        """Image ids `[n]` to codes `[height, width]` uint16. Raises InputError that names the position of the first wrong id."""
        from beingvl.vbpe import kernels as fast

        ids = np.asarray(ids)
        if ids.ndim != 1 or not (np.issubdtype(ids.dtype, np.integer) or ids.size == 0):
            raise InputError(f"an image stream of shape {list(ids.shape)} and type {ids.dtype}; expected integers [n]")
        _check_side(height, width, "decode")
        grid = np.full((height, width), -1, np.int32)
        # Ids beyond int32 become -1, which is as unknown as they are.
        known = np.where((ids >= 0) & (ids < self.num_ids), ids, -1).astype(np.int32)
        status, position = fast.decode_stream(known, self.tables, grid)
        if status != fast.STREAM_FINE:
            found = int(ids[position]) if position < len(ids) else None
            reason = {
                fast.STREAM_UNKNOWN_ID: f"id {found} is unknown, expected 0 … {self.num_ids - 1}",
                fast.STREAM_OUTSIDE: f"the token of id {found} reaches outside the {height} x {width} grid",
                fast.STREAM_OVERLAP: f"the token of id {found} overlaps an earlier one",
                fast.STREAM_TOO_LONG: f"the {height} x {width} grid is already full before id {found}",
                fast.STREAM_TOO_SHORT: f"the stream ends while cells of the {height} x {width} grid are left over",
            }[status]
            raise InputError(f"invalid image stream at position {position} of {len(ids)}: {reason}")
        return grid.astype(np.uint16)

    def cells(self, image_id: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The polyomino of an id in raster order: (dy, dx, code), int32 `[n]` each, relative to the anchor."""
        if not 0 <= image_id < self.num_ids:
            raise InputError(f"image id {image_id} is unknown, expected 0 … {self.num_ids - 1}")
        starts, dy, dx, codes = self.shapes
        part = slice(int(starts[image_id]), int(starts[image_id + 1]))
        return dy[part], dx[part], codes[part]

    @cached_property
    def shapes(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """The cells of all ids, end to end: where each id's start, int64 `[num_ids + 1]`, then dy, dx and code, int32."""
        from beingvl.vbpe import kernels as fast

        tables = self.tables
        dy = (tables.cells + fast.SPAN // 2) // fast.SPAN
        return tables.cell_start, dy, tables.cells - dy * fast.SPAN, tables.codes

    @property
    def sizes(self) -> np.ndarray:
        """Number of cells of every id, int64 `[num_ids]`."""
        return np.diff(self.tables.cell_start)

    @cached_property
    def tables(self) -> Any:
        return _build_tables(self.num_codes, self.merges, self.source)

    # ---- on disk ----

    def save(self, path: Path | str) -> None:
        """Write `vbpe.json`: one merge per line, so that two vocabularies can be compared with diff."""
        write_atomically(path, write_vbpe_json(self))

    @staticmethod
    def load(path: Path | str) -> VisualBPE | LegacyVisualBPE:
        """Read a `vbpe.json`, the folder it lies in, or a published `.pkl`. Raises InputError for anything else or a damaged one.

        Published vocabularies, pickled or imported, come back as `LegacyVisualBPE`: it encodes, but cannot decode.
        """
        path = Path(path)
        if path.is_dir():
            path = path / VBPE_FILE
        if not path.is_file():
            raise InputError(f"{path} does not exist; make it with `beingvl train-vbpe`")
        if path.suffix == ".pkl":
            from beingvl.vbpe.published import import_published

            return import_published(path)
        try:
            fields = json.loads(path.read_text())
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise InputError(f"{path} is not a vBPE vocabulary: no valid JSON ({error})") from error
        return _from_fields(fields, str(path))


def write_vbpe_json(vbpe: VisualBPE | LegacyVisualBPE) -> str:
    """The text of `vbpe.json`, with one merge per line."""
    head = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "kind": vbpe.kind,
        "num_codes": vbpe.num_codes,
        "num_merges": vbpe.num_merges,
        "fingerprint": vbpe.fingerprint(),
        "grid": list(vbpe.grid) if vbpe.grid else None,
        "lineage": vbpe.lineage,
        "parameters": vbpe.parameters,
    }
    lines = [f"  {json.dumps(key)}: {json.dumps(value)}," for key, value in head.items()]
    merges = ",\n".join(f"    {json.dumps(merge)}" for merge in vbpe.merges.tolist())
    return "\n".join(["{", *lines, '  "merges": [', *([merges] if merges else []), "  ]", "}"]) + "\n"


def _from_fields(fields: Any, source: str) -> VisualBPE | LegacyVisualBPE:
    from beingvl.vbpe.published import LegacyVisualBPE

    if not isinstance(fields, dict) or fields.get("format") != FORMAT:
        raise InputError(f'{source} is not a vBPE vocabulary: it has no "format": "{FORMAT}"; make one with `beingvl train-vbpe`')
    version = fields.get("format_version")
    if version != FORMAT_VERSION:
        raise InputError(f"{source} has format version {version}, this beingvl reads {FORMAT_VERSION}: update beingvl")
    try:
        kinds: dict[str, type[VisualBPE | LegacyVisualBPE]] = {"2d": VisualBPE, "legacy": LegacyVisualBPE}
        kind, num_codes, merges, grid = kinds[fields["kind"]], int(fields["num_codes"]), fields["merges"], fields["grid"]
        lineage, parameters = dict(fields["lineage"]), dict(fields["parameters"])
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{source} is damaged: {type(error).__name__} {error}; make it again") from error
    vbpe = kind(num_codes, merges, lineage, parameters, tuple(grid) if grid else None, source)
    if vbpe.fingerprint() != fields.get("fingerprint"):
        raise InputError(f"{source} does not have the fingerprint it says; it changed after it was written")
    return vbpe


# ---- checks and chunks ----


def encode_in_chunks(
    encode_chunk: Callable[[np.ndarray, np.ndarray, np.ndarray], int], grids: np.ndarray, num_threads: int
) -> tuple[np.ndarray, np.ndarray]:
    """Run `encode_chunk(grids int32 [n, H, W], ids, lengths) -> number of ids` over all grids, `num_threads` at once.

    Returns (image ids flat int32, offsets int64 [N + 1]).
    """

    def encode(start: int) -> tuple[np.ndarray, np.ndarray]:
        chunk = np.ascontiguousarray(grids[start : start + size], np.int32)
        ids, lengths = np.empty(chunk.size, np.int32), np.empty(len(chunk), np.int64)
        return ids[: encode_chunk(chunk, ids, lengths)].copy(), lengths

    size = max(1, min(256, -(-len(grids) // max(1, num_threads))))
    starts = range(0, len(grids), size)
    if num_threads > 1 and len(starts) > 1:
        with ThreadPoolExecutor(num_threads) as pool:
            parts = list(pool.map(encode, starts))
    else:
        parts = [encode(start) for start in starts]
    offsets = np.zeros(len(grids) + 1, np.int64)
    if parts:
        np.cumsum(np.concatenate([lengths for _, lengths in parts]), out=offsets[1:])
    return np.concatenate([ids for ids, _ in parts] or [np.zeros(0, np.int32)]), offsets


def checked_grids(grids: np.ndarray, num_codes: int, source: str) -> np.ndarray:
    """`grids` if it is `[N, H, W]` of integers 0 … num_codes-1; InputError that says what it is instead."""
    grids = np.asarray(grids)
    if grids.ndim != 3:
        raise InputError(f"{source}: codes of shape {list(grids.shape[1:])}, expected grids [height, width]")
    if not np.issubdtype(grids.dtype, np.integer):
        raise InputError(f"{source}: codes of type {grids.dtype}, expected integers")
    _check_side(grids.shape[1], grids.shape[2], source)
    if grids.size and not (grids.min() >= 0 and grids.max() < num_codes):
        raise InputError(f"{source}: codes {grids.min()} … {grids.max()}, expected 0 … {num_codes - 1}")
    return grids


def _check_side(height: int, width: int, source: str) -> None:
    if not (1 <= height <= MAX_SIDE and 1 <= width <= MAX_SIDE):
        raise InputError(f"{source}: a grid of {height} x {width} cells, expected 1 to {MAX_SIDE} on each side")


def _checked_merges(merges: Any, num_codes: int, source: str) -> np.ndarray:
    if not 1 <= num_codes <= MAX_CODES:
        raise InputError(f"{source}: {num_codes} codes, expected 1 to {MAX_CODES}")
    try:
        array = np.asarray(merges if len(merges) else np.zeros((0, 4), np.int64))
    except (TypeError, ValueError) as error:
        raise InputError(f"{source}: merges are not a list of [a, b, dy, dx]") from error
    if array.ndim != 2 or array.shape[1] != 4 or not np.issubdtype(array.dtype, np.integer):
        raise InputError(f"{source}: merges of shape {list(array.shape)} and type {array.dtype}, expected integers [R, 4]")
    if num_codes + len(array) > MAX_IDS:
        raise InputError(f"{source}: {num_codes} codes and {len(array)} merges, expected at most {MAX_IDS} together")
    known = num_codes + np.arange(len(array))[:, None]
    parts, dy, dx = array[:, :2], array[:, 2], array[:, 3]
    good = (
        ((parts >= 0) & (parts < known)).all(axis=1)
        & (abs(dx) <= MAX_SIDE)
        & (dy <= MAX_SIDE)
        & ((dy > 0) | (dy == 0) & (dx > 0))
    )
    if not good.all():
        rank = int(np.argmin(good))
        expected = f"two ids below {num_codes + rank} and an offset (dy, dx) after (0, 0) in raster order"
        raise InputError(f"{source}: merge {rank} is {array[rank].tolist()}, expected {expected}")
    return array.astype(np.int32)


def _build_tables(num_codes: int, merges: np.ndarray, source: str) -> Any:
    """Shapes and hash table for the kernels. Raises InputError for a merge whose parts overlap or do not touch."""
    from beingvl.vbpe import kernels as fast

    sizes = [1] * num_codes
    for a, b, _, _ in merges.tolist():
        sizes.append(sizes[a] + sizes[b])
        if sizes[-1] > MAX_SHAPE_CELLS:
            raise InputError(
                f"{source}: merge {len(sizes) - 1 - num_codes} makes a token of {sizes[-1]} cells, which no grid holds"
            )
    if sum(sizes) > MAX_SHAPE_CELLS:
        raise InputError(f"{source}: its tokens have {sum(sizes)} cells in all, expected at most {MAX_SHAPE_CELLS}")
    cell_start = np.concatenate([[0], np.cumsum(sizes)])
    edge_bounds = np.concatenate([[0], np.cumsum(2 * np.array(sizes) + 2)])
    cells = np.empty(cell_start[-1], np.int32)
    codes = np.empty(cell_start[-1], np.int32)
    edges = np.empty(edge_bounds[-1], np.int32)
    edge_end = np.empty(len(sizes), np.int64)
    steps = np.column_stack([merges[:, 0], merges[:, 1], merges[:, 2] * fast.SPAN + merges[:, 3]]).astype(np.int32)
    status, rank = fast.build_shapes(num_codes, steps, cell_start, edge_bounds[:-1], edge_end, cells, codes, edges)
    if status != fast.SHAPES_FINE:
        reason = "overlap" if status == fast.SHAPES_OVERLAP else "do not share an edge"
        raise InputError(f"{source}: the two tokens of merge {rank}, {merges[rank].tolist()}, {reason}")
    slot_keys = np.full(1 << max(4, (4 * len(merges)).bit_length()), -1, np.int64)
    slot_ranks = np.empty(len(slot_keys), np.int32)
    twice = fast.fill_slots(steps, slot_keys, slot_ranks)
    if twice >= 0:
        raise InputError(f"{source}: merge {twice}, {merges[twice].tolist()}, is there twice")
    return fast.Tables(num_codes, steps, cell_start, cells, codes, edge_bounds[:-1], edge_end, edges, slot_keys, slot_ranks)
