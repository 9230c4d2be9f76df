"""Token rows (JSONL lines) to the columns of a shard.

    read_rows       the whole lines of a byte range -> ShardColumns, in blocks of 32 rows:
      parse_row     one line with simdjson; lists of integers become arrays, never Python integers
      are_fine      with a vBPE: a row's first image must decode to the row's own codes; the codes
                    of further images are not stored, so each must fill a grid of as many cells
      check_images  the readable twin, for one row; says what is wrong

A row's sequence is token_0 + image + token_1, where image is token_image_new if the row has it,
else token_image. Without target_spans, as in a published row, the target is token_1. A row without
an id is named after its file and line. Its category may be in `original`, the dataset row that it
was made from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from math import isqrt
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import simdjson

from beingvl.data.shard_columns import Row, ShardColumns, check_columns
from beingvl.errors import InputError
from beingvl.stage.mixture import NO_CATEGORY
from beingvl.vbpe.visual_bpe import VisualBPE
from beingvl.vocab import VocabLayout

ROWS_PER_BLOCK = 32  # a block stays in the processor's cache
MAX_LINE_BYTES = 1 << 28
READ_BYTES = 1 << 20  # with Python's default of 8 KiB, reading costs more than parsing
NOT_A_ROW = (ValueError, TypeError, RuntimeError)  # what `parse_row` raises
NOTHING = np.empty(0, np.int64)
# Constants, because `str | None` makes a new object each time.
TEXT_OR_NOTHING, TEXT_OR_NUMBER = (str, type(None)), (str, int, float)
LISTS = ("token_0", "token_image", "token_image_new", "token_1", "target_spans")


# ---- one line ----


class TokenRow(NamedTuple):
    """One line. `row.ids` are token_0, the image's tokens, and token_1; all integers are int64. A
    row without an id has an empty one.

    `codes` is token_image if the row also has token_image_new, else None.
    """

    row: Row
    codes: np.ndarray | None
    has_spans: bool = True


def parse_row(parser: simdjson.Parser, line: bytes) -> TokenRow:
    """Parse a line with simdjson. Raises one of NOT_A_ROW if it is not a token row.

    On return, nothing may refer to a part of the document, or the parser refuses the next line.
    """
    fields = parse_object(parser, line)
    before, codes, merged, after, spans = (_integers(fields, name) for name in LISTS)
    if before is None or after is None:
        raise ValueError(f"missing field '{'token_0' if before is None else 'token_1'}'")
    image = codes if merged is None else merged
    if image is None:
        image = NOTHING
    has_spans = spans is not None
    if spans is None:
        start = len(before) + len(image)
        spans = np.array([start, start + len(after)])
    row = Row(*head_of(fields), (before, image, after), spans)
    return TokenRow(row, None if merged is None else codes, has_spans)


def parse_object(parser: simdjson.Parser, line: bytes) -> Any:
    """The line's `simdjson.Object`; as Any, because simdjson's type hints are partly wrong."""
    fields = parser.parse(line)
    if not isinstance(fields, simdjson.Object):
        raise ValueError("the line is not an object")
    return fields


def head_of(fields: Any) -> tuple[str, str, str]:
    """(id, image, category) of a row; a missing id is empty. Raises ValueError for wrong types."""
    id_, image, category = fields.get("id"), fields.get("image"), fields.get("category")
    if id_ is None:
        id_ = ""
    if category is None and isinstance(original := fields.get("original"), simdjson.Object):
        category = original.get("category")
    if not isinstance(id_, TEXT_OR_NUMBER):
        raise ValueError("id is neither a text nor a number")
    if isinstance(image, simdjson.Array):
        image = image.mini.decode()  # type: ignore[attr-defined]  # it is bytes
    elif not isinstance(image, TEXT_OR_NOTHING):
        raise ValueError("image is neither a path nor a list of paths")
    if not isinstance(category, TEXT_OR_NOTHING):
        raise ValueError("category is not a text")
    return str(id_), image or "", category or NO_CATEGORY


def _integers(fields: Any, name: str) -> np.ndarray | None:
    """A list of integers `[n]` int64, flattened if nested; None if it is absent."""
    value = fields.get(name)
    if value is None:
        return None
    try:
        return np.frombuffer(value.as_buffer(of_type="i"), np.int64)
    except (TypeError, AttributeError) as error:
        raise ValueError(f"{name} is not a list of integers") from error


# ---- many lines ----


def read_rows(
    path: Path,
    start: int,
    stop: int,
    layout: VocabLayout,
    vbpe: VisualBPE | None = None,
    advance: Callable[[int], object] = lambda num_bytes: None,
    lines_before: int | None = None,
    has_spans: bool | None = None,
) -> ShardColumns:
    """The rows of the lines that start in bytes `start … stop - 1`.

    Args:
        vbpe: must decode the merged images.
        advance: called with the number of bytes after each block of rows.
        lines_before: number of lines that start before `start`, if known; it makes ids for rows
            that have none.
        has_spans: whether all rows must have target_spans; rows without, like published ones,
            must look like rows of this vocabulary.

    Raises InputError naming the file and the line or sample.
    """
    parser = simdjson.Parser()
    blocks = []
    with open(path, "rb", buffering=READ_BYTES) as file:
        lines = _lines(path, file, start, stop, lines_before)
        while block := list(islice(lines, ROWS_PER_BLOCK)):
            rows = [_parsed(path, line, parser) for line in block]
            if has_spans is not None:
                _check_template(path, block, rows, layout, has_spans)
            blocks.append(_checked(path, block, rows, layout, vbpe))
            advance(sum(len(line.text) for line in block))
    return ShardColumns.joined(blocks)


class Line(NamedTuple):
    """A line that starts at byte `at`. `known_number` counts from 1."""

    at: int
    known_number: int | None
    text: bytes

    def number(self, path: Path) -> int:
        """The line number, counted now if it is not known."""
        if self.known_number is not None:
            return self.known_number
        number, left = 1, self.at
        with open(path, "rb") as file:
            while left and (block := file.read(min(left, READ_BYTES))):
                number, left = number + block.count(b"\n"), left - len(block)
        return number

    def place(self, path: Path) -> str:
        return f"{path}, line {self.number(path)}"


def _lines(
    path: Path, file: BinaryIO, start: int, stop: int, lines_before: int | None
) -> Iterator[Line]:
    """All lines that start in bytes `start … stop - 1` and are not blank."""
    if start:
        file.seek(start - 1)
        _read_line(path, file)
    number = None if lines_before is None else lines_before + 1
    at = file.tell()
    while at < stop:
        line = _read_line(path, file)
        if not line:
            raise InputError(
                f"{path} became shorter while it was read; start again when it is complete"
            )
        if not line.isspace():
            yield Line(at, number, line)
        at += len(line)
        number = None if number is None else number + 1


def _read_line(path: Path, file: BinaryIO) -> bytes:
    line = file.readline(MAX_LINE_BYTES)
    if len(line) == MAX_LINE_BYTES:
        raise InputError(
            f"{path} has a line of more than {MAX_LINE_BYTES:,} bytes; expected JSONL, one token "
            "row per line"
        )
    return line


def _parsed(path: Path, line: Line, parser: simdjson.Parser) -> TokenRow:
    try:
        token_row = parse_row(parser, line.text)
    except NOT_A_ROW as error:
        raise _in_line(path, line, f"not a token row ({error})") from error
    if token_row.row.id:
        return token_row
    return token_row._replace(row=token_row.row._replace(id=f"{path.name}-{line.number(path)}"))


def _check_template(
    path: Path,
    block: Sequence[Line],
    rows: Sequence[TokenRow],
    layout: VocabLayout,
    has_spans: bool,
) -> None:
    """Raises InputError for a row whose template differs from the file's first row, or a published
    row whose ids are not from this vocabulary.
    """
    for line, (row, _, its_spans) in zip(block, rows, strict=True):
        if its_spans != has_spans:
            found = "has target_spans, the first row none"
            if has_spans:
                found = "has no target_spans, the first row has them"
            raise InputError(
                f"{line.place(path)} {found}: rows of two templates; put them into two files, or "
                "say with --template which one it is"
            )
        first_ids = row.ids[0][:1].tolist()
        if not its_spans and first_ids != [layout.bos_id]:
            found = f"begins with {first_ids[0] if first_ids else 'nothing'}"
        elif not its_spans and not layout.is_image_token(row.ids[1]).all():
            found = "has an image of other ids than the vocabulary's"
        elif not its_spans and len(row.ids[1]) and row.ids[0][-1] != layout.boi_id:
            found = f"has {row.ids[0][-1]} before its image"
        else:
            continue
        raise InputError(
            f"{line.place(path)}: the row {found}, but in this vocabulary {layout.bos_id} begins a "
            f"row, {layout.boi_id} an image, and images have the ids {layout.first_image_id} to "
            f"{layout.size - 1}; give as --model a model of the file's own vocabulary"
        )


def _checked(
    path: Path,
    block: Sequence[Line],
    rows: Sequence[TokenRow],
    layout: VocabLayout,
    vbpe: VisualBPE | None,
) -> ShardColumns:
    """The rows of a block of lines."""
    columns = ShardColumns.of_rows([row.row for row in rows])
    try:
        check_columns(columns, layout)
        columns = columns.narrow()
    except InputError as error:
        raise InputError(f"{path}: {error}; make the file again with `beingvl tokenize`") from error
    if vbpe is not None and not are_fine(rows, layout, vbpe):
        for line, row in zip(block, rows, strict=True):
            try:
                check_images(row, layout, vbpe)
            except ValueError as error:
                raise _in_line(path, line, f"sample {row.row.id!r}: {error}") from error
    return columns


def _in_line(path: Path, line: Line, found: str) -> InputError:
    return InputError(f"{line.place(path)}: {found}; make the file again with `beingvl tokenize`")


# ---- merged images ----


def are_fine(rows: Sequence[TokenRow], layout: VocabLayout, vbpe: VisualBPE) -> bool:
    """Whether all merged images of a block decode, in one call of the compiled decoder.

    False may be a false alarm: grids that are not square are left to `check_images`.
    """
    images = [(row, codes, isqrt(len(codes))) for row, codes, _ in rows if codes is not None]
    if not images:
        return True
    if any(side * side != len(codes) for _, codes, side in images):
        return False
    streams = [row.ids[1] for row, _, _ in images]
    sides = [side for _, _, side in images]
    if (np.concatenate([row.ids[2] for row, _, _ in images]) == layout.boi_id).any():
        for row, _, side in images:
            further = further_images(row, layout)
            streams += further
            sides += [side] * len(further)
    ids = np.concatenate(streams, dtype=np.int32, casting="unsafe")  # they are in the vocabulary
    ids -= layout.first_image_id
    starts = np.cumsum([0, *map(len, streams)])
    codes_of_all = np.concatenate([codes for _, codes, _ in images]) - layout.first_image_id
    return vbpe.decodes_to(ids, starts, np.array(sides), codes_of_all)


def further_images(row: Row, layout: VocabLayout) -> list[np.ndarray]:
    """The images in token_1, except one that `--too_long truncate` cut off at the row's end."""
    images, after = [], row.ids[2]
    for begin in np.flatnonzero(after == layout.boi_id).tolist():
        tokens = after[begin + 1 :]
        behind = np.flatnonzero(~layout.is_image_token(tokens))
        if len(behind):
            images.append(tokens[: behind[0]])
    return images


def check_images(token_row: TokenRow, layout: VocabLayout, vbpe: VisualBPE) -> None:
    """The readable twin of `are_fine`, for one row: raises ValueError saying what is wrong."""
    row, token_image, _ = token_row
    if token_image is None:
        return
    merged, codes = layout.token_to_image_ids(row.ids[1]), layout.token_to_image_ids(token_image)
    other = "is it a different vBPE?"
    if codes.size and codes.max() >= vbpe.num_codes:
        raise ValueError(
            f"token_image holds the image id {codes.max()}, the vBPE has {vbpe.num_codes} codes: "
            f"{other}"
        )
    try:
        decoded = _decode(merged, len(codes), vbpe)
    except ValueError as error:
        raise ValueError(f"token_image_new {error}: {other}") from error
    if decoded is not None and not np.array_equal(decoded, codes):
        raise ValueError(f"token_image_new does not decode to token_image: {other}")
    for image in further_images(row, layout):
        try:
            _decode(layout.token_to_image_ids(image), len(codes), vbpe)
        except ValueError as error:
            raise ValueError(f"an image of token_1 {error}") from error


def _decode(image_ids: np.ndarray, num_cells: int, vbpe: VisualBPE) -> np.ndarray | None:
    """The codes `[num_cells]` of a stream; None if `num_cells` is not a square.

    Raises ValueError unless the stream covers `num_cells` cells, each exactly once.
    """
    if image_ids.size and image_ids.max() >= vbpe.num_ids:
        raise ValueError(
            f"holds the image id {image_ids.max()}, the vBPE's ids end at {vbpe.num_ids - 1}"
        )
    if (found := int(vbpe.sizes[image_ids].sum())) != num_cells:
        raise ValueError(f"covers {found} cells, token_image has {num_cells}")
    side = isqrt(num_cells)
    if side * side != num_cells:
        return None
    return vbpe.decode(image_ids, side, side).ravel()
