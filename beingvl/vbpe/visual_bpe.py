"""Visual byte-pair encoding (vBPE): byte-pair encoding on a 2-D grid of VQ codes, lossless.

A *merge* `(a, b, dy, dx)` of rank r turns a token a, and a token b whose anchor is (dy, dx) from
a's anchor, into one token with image id `num_codes + r`. A token's *anchor* is its first cell in
raster order, and a has the earlier anchor; so every id is one fixed polyomino of codes. Only tokens
that share an edge may merge. The stream lists the tokens in raster order of anchors:

    grid      merge (7, 8, 0, 1) -> 9     merge (9, 7, 1, 0) -> 10     stream
    7 8 7     9 9 7                       10 10 7                      10 7 5 8
    7 5 8     7 5 8                       10  5 8

The stream alone determines the grid, because the next token's anchor is always the first cell that
is not covered yet.

`reference.py` is the readable twin: short, recounts everything, obviously correct. The compiled
`kernels.py`, used here, gives bit-identical results.

In each round, learning takes the candidate with the highest priority `P = F + alpha * S` (arXiv
2506.23639): F is its count divided by the round's largest count, S the spatial consistency of its
two tokens (`spatial_consistency`). Ties: higher count first, then smaller (a, b, dy, dx).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from beingvl.errors import InputError
from beingvl.json_file import read_json
from beingvl.vbpe import kernels as fast
from beingvl.vbpe.grids import MAX_SHAPE_CELLS, MAX_SIDE, EncodeChunk, check_side
from beingvl.vbpe.published import LegacyVisualBPE, import_published
from beingvl.vbpe.vbpe_file import FORMAT, FORMAT_VERSION, VBPE_FILE, Vocabulary
from beingvl.vocab import VocabLayout


@dataclass(eq=False)
class VisualBPE(Vocabulary):
    """A vBPE vocabulary: `merges` is int32 `[R, 4]` of (a, b, dy, dx)."""

    kind = "2d"
    columns = 4

    and_expected = " and an offset (dy, dx) after (0, 0) in raster order"

    def _are_good(self, merges: np.ndarray) -> np.ndarray:
        dy, dx = merges[:, 2], merges[:, 3]
        after = (dy > 0) | (dy == 0) & (dx > 0)
        return super()._are_good(merges) & after & (dy <= MAX_SIDE) & (abs(dx) <= MAX_SIDE)

    def _encoder(self) -> EncodeChunk:
        return partial(fast.encode_images, self.tables)

    def decode(self, ids: np.ndarray, height: int, width: int) -> np.ndarray:
        """Image ids `[n]` to codes `[height, width]` uint16. Raises InputError naming the position
        of the first wrong id.
        """
        ids = np.asarray(ids)
        if ids.ndim != 1 or not (np.issubdtype(ids.dtype, np.integer) or ids.size == 0):
            given = f"shape {list(ids.shape)} and type {ids.dtype}"
            raise InputError(f"an image stream of {given}, expected integers [n]")
        check_side(height, width, "decode")
        grid = np.full((height, width), -1, np.int32)
        # Ids beyond int32 become -1, which is also unknown.
        known = np.where((ids >= 0) & (ids < self.num_ids), ids, -1).astype(np.int32)
        anchors = np.empty(height * width, np.int64)
        status, position = fast.decode_stream(known, self.tables, grid, anchors)
        if status != fast.STREAM_FINE:
            found = int(ids[position]) if position < len(ids) else None
            token, whole = f"the token of id {found}", f"the {height} x {width} grid"
            reason = {
                fast.STREAM_UNKNOWN_ID: f"id {found} is unknown, expected 0 … {self.num_ids - 1}",
                fast.STREAM_OUTSIDE: f"{token} reaches outside {whole}",
                fast.STREAM_OVERLAP: f"{token} overlaps an earlier one",
                fast.STREAM_TOO_LONG: f"{whole} is already full before id {found}",
                fast.STREAM_TOO_SHORT: f"the stream ends while cells of {whole} are left over",
            }[status]
            raise InputError(f"invalid image stream at position {position} of {len(ids)}: {reason}")
        return grid.astype(np.uint16)

    def decodes_to(
        self, ids: np.ndarray, offsets: np.ndarray, sides: np.ndarray, codes: np.ndarray
    ) -> bool:
        """Whether many streams on square grids all decode to their codes, in one call that does
        not say which stream is wrong.

        Stream n is `ids[offsets[n]:offsets[n + 1]]` (int32); its grid has `sides[n]` rows and
        columns. `codes` are those of the first streams, end to end; the other streams only need to
        fill their grids exactly.
        """
        return bool(fast.streams_decode_to(ids, offsets, sides, codes, self.tables))

    def positions(self, image_ids: np.ndarray) -> np.ndarray:
        """Positions `[n]` int64 of a token row whose image tokens are at their anchors' cells, so
        that merging moves nothing. `image_ids` int32 `[n]` is -1 for other tokens.

            grid 7 8      row         bos  boi  10   5  eoi
                 7 5      positions    0    1    2   5   6

        Raises InputError for an image that does not fill a square grid.
        """
        positions = np.empty(len(image_ids), np.int64)
        wrong = fast.anchor_positions(image_ids, self.tables, positions)
        if wrong >= 0:
            raise InputError(
                f"the image that starts at token {wrong} does not fill a square grid, so its "
                "tokens have no positions; was it made with a different vBPE?"
            )
        return positions

    def cells(self, image_id: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """An id's polyomino in raster order: (dy, dx, code) from the anchor, int32 `[n]` each."""
        if not 0 <= image_id < self.num_ids:
            raise InputError(f"image id {image_id} is unknown, expected 0 … {self.num_ids - 1}")
        starts, dy, dx, codes = self.shapes
        part = slice(int(starts[image_id]), int(starts[image_id + 1]))
        return dy[part], dx[part], codes[part]

    @cached_property
    def shapes(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Cells of all ids: their starts, int64 `[num_ids + 1]`, then their dy, dx, code, int32."""
        tables = self.tables
        dy = (tables.cells + fast.SPAN // 2) // fast.SPAN
        return tables.cell_start, dy, tables.cells - dy * fast.SPAN, tables.codes

    @property
    def sizes(self) -> np.ndarray:
        """Number of cells of every id, int64 `[num_ids]`."""
        return np.diff(self.tables.cell_start)

    @cached_property
    def tables(self) -> fast.Tables:
        return _build_tables(self.num_codes, self.merges, self.source)

    # ---- on disk ----

    @staticmethod
    def load(path: Path | str, num_codes: int | None = None) -> AnyVBPE:
        """Read a `vbpe.json`, a folder that contains one, or a published `.pkl`, whose number of
        codes `import_published` determines. Raises InputError for anything else, or damaged files.

        Published vocabularies, pickled or imported, are returned as `LegacyVisualBPE`, which can
        encode but not decode.
        """
        path = Path(path)
        if path.is_dir():
            path = path / VBPE_FILE
        if not path.is_file():
            raise InputError(f"{path} does not exist; make it with `beingvl train-vbpe`")
        if path.suffix == ".pkl":
            return import_published(path, num_codes)
        return _from_fields(read_json(path, "make it again"), str(path))


AnyVBPE = VisualBPE | LegacyVisualBPE


def load_for_layout(
    path: Path | str,
    layout: VocabLayout,
    init_size: int | None = None,
    vocab_pad: int | None = None,
    vocab_end: int | None = None,
) -> AnyVBPE:
    """The vocabulary at `path` for a model with this layout. The three sizes, which the published
    commands pass, are only checked; without them, a pickle's first merge tells its first code.

    Raises InputError if vocabulary, layout and sizes contradict each other.
    """
    if init_size not in (None, layout.num_vq):
        raise InputError(
            f"--vbpe_init_size is {init_size}, the model's layout has {layout.num_vq} codes"
        )
    if vocab_pad is None and vocab_end is not None:
        vocab_pad = vocab_end - layout.num_vq
    if vocab_pad is not None:
        # Published vocabularies number codes from 0, from the end of the text, or as token ids.
        starts = (0, layout.num_text, layout.first_image_id)
        end = vocab_pad + layout.num_vq
        if vocab_pad not in starts or vocab_end not in (None, end):
            raise InputError(
                f"--vbpe_vocab_pad {vocab_pad} and --vbpe_vocab_end {vocab_end} do not fit the "
                f"model's layout, expected {' or '.join(map(str, starts))}, and {layout.num_vq} "
                "more as the end"
            )
    path = Path(path)
    is_published = path.suffix == ".pkl" and path.is_file()
    vbpe = (
        import_published(path, layout.num_vq, vocab_pad) if is_published else VisualBPE.load(path)
    )
    if vbpe.num_codes != layout.num_vq or vbpe.num_merges > layout.num_merges:
        raise InputError(
            f"{path} has {vbpe.num_codes} codes and {vbpe.num_merges} merges, the model's "
            f"vocabulary has room for {layout.num_vq} and {layout.num_merges}"
        )
    return vbpe


def _from_fields(fields: Any, source: str) -> AnyVBPE:
    if not isinstance(fields, dict) or fields.get("format") != FORMAT:
        raise InputError(
            f'{source} is not a vBPE vocabulary: it has no "format": "{FORMAT}"; make one with '
            "`beingvl train-vbpe`"
        )
    version = fields.get("format_version")
    if version != FORMAT_VERSION:
        raise InputError(
            f"{source} has format version {version}, this beingvl reads {FORMAT_VERSION}: "
            "update beingvl"
        )
    kinds: dict[str, type[AnyVBPE]] = {"2d": VisualBPE, "legacy": LegacyVisualBPE}
    try:
        vbpe = kinds[fields["kind"]](
            int(fields["num_codes"]),
            fields["merges"],
            dict(fields["lineage"]),
            dict(fields["parameters"]),
            tuple(fields["grid"]) if fields["grid"] else None,
            source,
        )
    except InputError:
        raise
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise InputError(f"{source} is damaged: {error!r}; make it again") from error
    if vbpe.fingerprint() != fields.get("fingerprint"):
        raise InputError(
            f"{source} does not have the fingerprint it says; it changed after it was written"
        )
    return vbpe


def _build_tables(num_codes: int, merges: np.ndarray, source: str) -> fast.Tables:
    """Shapes and hash table. Raises InputError if a merge's tokens overlap or do not touch."""
    sizes = [1] * num_codes
    for rank, (a, b, _, _) in enumerate(merges.tolist()):
        sizes.append(sizes[a] + sizes[b])
        if sizes[-1] > MAX_SHAPE_CELLS:
            raise InputError(
                f"{source}: merge {rank} makes a token of {sizes[-1]} cells, which no grid holds"
            )
    if sum(sizes) > MAX_SHAPE_CELLS:
        raise InputError(
            f"{source}: its tokens have {sum(sizes)} cells in all, expected at most "
            f"{MAX_SHAPE_CELLS}"
        )
    starts = np.concatenate([[0], np.cumsum(sizes)])
    edge_start = np.concatenate([[0], np.cumsum(2 * np.array(sizes) + 2)])
    num_slots = 1 << max(4, (4 * len(merges)).bit_length())
    tables = fast.Tables(
        num_codes=num_codes,
        merges=np.column_stack([merges[:, :2], merges[:, 2] * fast.SPAN + merges[:, 3]]),
        cell_start=starts,
        cells=np.empty(starts[-1], np.int32),
        codes=np.empty(starts[-1], np.int32),
        edge_start=edge_start[:-1],
        edge_end=np.empty(len(sizes), np.int64),
        edges=np.empty(edge_start[-1], np.int32),
        slot_keys=np.full(num_slots, -1, np.int64),
        slot_ranks=np.empty(num_slots, np.int32),
    )
    status, rank = fast.build_shapes(tables)
    if status != fast.SHAPES_FINE:
        reason = "overlap" if status == fast.SHAPES_OVERLAP else "do not share an edge"
        raise InputError(
            f"{source}: the two tokens of merge {rank}, {merges[rank].tolist()}, {reason}"
        )
    twice = fast.fill_slots(tables)
    if twice >= 0:
        raise InputError(f"{source}: merge {twice}, {merges[twice].tolist()}, appears twice")
    return tables


def owners(vbpe: VisualBPE, ids: np.ndarray, height: int, width: int) -> np.ndarray:
    """For each cell, its token's position in the stream, int `[height, width]`."""
    owner = np.full((height, width), -1)
    cell = 0
    for position, image_id in enumerate(ids.tolist()):
        while owner.flat[cell] >= 0:
            cell += 1
        dy, dx, _ = vbpe.cells(image_id)
        owner[cell // width + dy, cell % width + dx] = position
    return owner
