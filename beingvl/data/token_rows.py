"""Lines of token rows to the columns of a shard, read in blocks and parsed by compiled code.

    RowReader.read    the whole lines of a byte range -> ShardColumns, checked
      block           half a MiB at a time, cut at the last newline
      parse_lines     the fast twin (token_rows_numba.py), integers from text to int32 without
                      Python objects
      parse_row       the readable twin: simdjson; for the lines that the fast one leaves over,
                      and for every error
      check_images    with a vBPE: a row's first image, merged, stands for the row's own codes;
                      every further one, whose codes
                  are in no row, fills a grid of as many cells; the fast twin does the same

The sequence of a row is token_0 + image + token_1, where image is token_image_new when the row has
it, else token_image; without target_spans its target is token_1.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import simdjson

from beingvl.data.arrow_shards import ShardColumns
from beingvl.data.token_rows_numba import (
    BYTES_AHEAD,
    FIELDS,
    Buffers,
    Images,
    hash_texts,
    parse_lines,
    words_of,
)
from beingvl.errors import InputError
from beingvl.vbpe.visual_bpe import VisualBPE
from beingvl.vocab import VocabLayout

BLOCK_BYTES = 1 << 19  # a block stays in the processor's cache between reading and parsing
MAX_LINE_BYTES = 1 << 28
BYTES_OF_THE_SHORTEST_ROW = 32  # {"id":1,"token_0":[1],"token_1":[]} has more
MOST_CELLS = 1 << 16  # of an image that the fast twin compares
NEWLINE = 10
NOT_A_ROW = (ValueError, TypeError, RuntimeError)  # what `parse_row` raises


# ---- the readable twin ----


@dataclass(frozen=True)
class TokenRow:
    """One line. Integers are int64; `target_spans` is flat: start, end, start, end, …

    `codes` and `merged` are its token_image and token_image_new when it has both, else empty;
    `after` is token_1.
    """

    id: str
    image: str
    category: str
    input_ids: np.ndarray
    target_spans: np.ndarray
    codes: np.ndarray
    merged: np.ndarray
    after: np.ndarray


NOTHING = np.empty(0, np.int64)


def parse_row(parser: Any, line: bytes) -> TokenRow:
    """A line with simdjson. Raises one of NOT_A_ROW when it is not a token row.

    When it returns, no name may refer to a part of the document, or the parser refuses the next
    line.
    """
    fields = parser.parse(line)
    if not isinstance(fields, simdjson.Object):
        raise ValueError("the line is no object")
    before, after = _integers(fields, "token_0"), _integers(fields, "token_1")
    has_merged = fields.get("token_image_new") is not None
    image = _integers(fields, "token_image_new" if has_merged else "token_image", required=False)
    input_ids = np.concatenate((before, image, after))
    if fields.get("target_spans") is None:
        spans = np.array([len(input_ids) - len(after), len(input_ids)])
    else:
        spans = _integers(fields, "target_spans")
    has_both = has_merged and fields.get("token_image") is not None
    return TokenRow(
        id=_identifier(fields.get("id")),
        image=_image(fields.get("image")),
        category=_category(fields.get("category")),
        input_ids=input_ids,
        target_spans=spans,
        codes=_integers(fields, "token_image") if has_both else NOTHING,
        merged=image if has_both else NOTHING,
        after=after,
    )


def _integers(fields: Any, name: str, required: bool = True) -> np.ndarray:
    """A list of integers `[n]` int64, nested ones flattened. Raises ValueError when it is
    something else.
    """
    value = fields.get(name)
    if value is None and not required:
        return NOTHING
    if value is None:
        raise ValueError(f"missing field '{name}'")
    try:
        return np.frombuffer(value.as_buffer(of_type="i"), np.int64)
    except (TypeError, AttributeError) as error:
        raise ValueError(f"{name} is not a list of integers") from error


def _identifier(value: Any) -> str:
    if value is None:
        raise ValueError("missing field 'id'")
    if not isinstance(value, str | int | float):
        raise ValueError("id is neither a text nor a number")
    return str(value)


def _image(value: Any) -> str:
    """A path; a list of them as JSON."""
    if value is not None and type(value) not in (str, simdjson.Array):
        raise ValueError("image is neither a path nor a list of paths")
    return value if isinstance(value, str) else "" if value is None else value.mini.decode()


def _category(value: Any) -> str:
    if not isinstance(value, str | None):
        raise ValueError("category is not a text")
    return value or "default"


# ---- parts ----


class RowReader:
    """Reads one part after the other into the same room in memory, so a part's columns are gone
    with the next `read`.
    """

    def __init__(self, layout: VocabLayout, vbpe: VisualBPE | None = None) -> None:
        self._layout, self._vbpe = layout, vbpe
        self._images = images_of(layout, vbpe)
        self._block = bytearray(BLOCK_BYTES)
        self._buffers: Buffers | None = None
        self._room = 0
        self._parser = simdjson.Parser()

    def read(self, path: Path, start: int, stop: int) -> ShardColumns:
        """The rows of the lines that start in bytes `start … stop - 1`. Raises InputError that
        names file and line, or sample.
        """
        with open(path, "rb", buffering=1 << 16) as file:
            start, stop = _start_of_line(path, file, start), _start_of_line(path, file, stop)
            buffers = self._make_room(max(0, stop - start))
            at, row = start, 0
            while at < stop:
                size, end = self._read_block(file.fileno(), at, stop)
                if not size:
                    raise InputError(
                        f"{path} became shorter while it was read; start again when it is complete"
                    )
                if end:
                    row = self._parse_block(path, at, end, buffers, row)
                    at += min(end, size)
                elif len(self._block) >= MAX_LINE_BYTES:
                    raise _too_long(path)
                else:  # a line that is longer than the block
                    self._block = bytearray(2 * len(self._block))
        return _columns(buffers, row)

    def _make_room(self, num_bytes: int) -> Buffers:
        """Room for all rows that so many bytes can hold: memory is only taken for what is
        written.
        """
        if self._buffers is None or num_bytes > self._room:
            self._room = num_bytes
            self._buffers = make_buffers(num_bytes)
        return self._buffers

    def _read_block(self, file: int, at: int, stop: int) -> tuple[int, int]:
        """Fill the block; returns (bytes read, where its last whole line ends, 0 without one). A
        last line gets its newline.
        """
        size = os.preadv(
            file, [memoryview(self._block)[: min(len(self._block) - BYTES_AHEAD, stop - at)]], at
        )
        if size == stop - at and self._block[size - 1] != NEWLINE:
            self._block[size] = NEWLINE
            return size, size + 1
        return size, self._block.rfind(b"\n", 0, size) + 1

    def _parse_block(self, path: Path, offset: int, end: int, buffers: Buffers, row: int) -> int:
        """Append the rows of the block's first `end` bytes; returns how many rows there are now."""
        data = np.frombuffer(self._block, np.uint8)
        words = words_of(data)
        at = 0
        while True:
            at, row = parse_lines(data, words, at, end, buffers, self._images, row)
            if at >= end:
                return row
            line_end = self._block.index(b"\n", at) + 1
            line = bytes(memoryview(self._block)[at:line_end])
            if not line.isspace():
                try:
                    self._append_line(line, buffers, row)
                except ValueError as error:
                    where = f"{path}, line {_line_number(path, offset + at)}"
                    raise InputError(
                        f"{where}: {error}; make the file again with `beingvl tokenize`"
                    ) from error
                row += 1
            at = line_end

    def _append_line(self, line: bytes, buffers: Buffers, row: int) -> None:
        """Raises ValueError that says what is wrong with the line."""
        try:
            parsed = parse_row(self._parser, line)
            self._append(parsed, buffers, row)
        except NOT_A_ROW as error:
            raise ValueError(f"not a token row ({error})") from error
        try:
            if self._vbpe is not None:
                check_images(parsed, self._layout, self._vbpe)
        except ValueError as error:
            raise ValueError(f"sample {parsed.id!r}: {error}") from error

    def _append(self, line: TokenRow, buffers: Buffers, row: int) -> None:
        lists = (
            (line.input_ids, buffers.ids, buffers.id_starts),
            (line.target_spans, buffers.spans, buffers.span_starts),
        )
        for values, room, starts in lists:
            beyond = values[(values < -(2**31)) | (values >= 2**31)]
            if len(beyond):
                raise ValueError(
                    f"sample {line.id!r} has id {beyond[0]}, the vocabulary ends at "
                    f"{self._layout.size - 1}"
                )
            starts[row + 1] = starts[row] + len(values)
            room[starts[row] : starts[row + 1]] = values
        for column, text in enumerate((line.id, line.image, line.category)):
            encoded = np.frombuffer(text.encode(), np.uint8)
            starts = buffers.text_starts[column]
            starts[row + 1] = starts[row] + len(encoded)
            buffers.text[column, starts[row] : starts[row + 1]] = encoded


def make_buffers(num_bytes: int) -> Buffers:
    """Room for the rows of so many bytes: an integer takes two of them, a row at least
    BYTES_OF_THE_SHORTEST_ROW.
    """
    num_rows, num_integers = (
        num_bytes // BYTES_OF_THE_SHORTEST_ROW + 2,
        num_bytes // 2 + BYTES_AHEAD,
    )

    def integers() -> np.ndarray:
        return np.empty(num_integers, np.int32)

    def starts() -> np.ndarray:
        return np.zeros(num_rows, np.int64)

    return Buffers(
        place=np.empty((len(FIELDS), 2), np.int64),
        scratch=integers(),
        ids=integers(),
        id_starts=starts(),
        spans=integers(),
        span_starts=starts(),
        text=np.empty((3, num_bytes + 64), np.uint8),
        text_starts=np.zeros((3, num_rows), np.int32),
    )


def _columns(buffers: Buffers, num_rows: int) -> ShardColumns:
    """Views of the first rows."""
    texts = []
    for text, starts in zip(buffers.text, buffers.text_starts, strict=True):
        used = starts[: num_rows + 1]
        texts.append(
            pa.StringArray.from_buffers(
                num_rows, pa.py_buffer(used), pa.py_buffer(text[: used[-1]])
            )
        )
    id_starts, span_starts = buffers.id_starts[: num_rows + 1], buffers.span_starts[: num_rows + 1]
    return ShardColumns(
        texts[0],
        texts[1],
        texts[2],
        buffers.ids[: id_starts[-1]],
        id_starts,
        buffers.spans[: span_starts[-1]],
        span_starts,
    )


def hash_ids(ids: pa.StringArray) -> np.ndarray:
    """`[n]` uint64, equal for equal ids; of ten million different ones two are equal with a
    chance of 3 in a million.
    """
    _, starts, text = ids.buffers()
    hashes = np.empty(len(ids), np.uint64)
    if len(ids):
        hash_texts(np.frombuffer(text or b" ", np.uint8), np.frombuffer(starts, np.int32), hashes)
    return hashes


def _start_of_line(path: Path, file: Any, at: int) -> int:
    """Where the first line that starts at `at` or behind it starts. Raises InputError for a line
    that no memory should hold.
    """
    if not at:
        return 0
    file.seek(at - 1)
    if len(file.readline(MAX_LINE_BYTES)) == MAX_LINE_BYTES:
        raise _too_long(path)
    return file.tell()


def _too_long(path: Path) -> InputError:
    return InputError(
        f"{path} has a line of more than {MAX_LINE_BYTES:,} bytes; expected JSONL, one "
        "token row a line"
    )


def _line_number(path: Path, position: int) -> int:
    """The number, from 1, of the line that starts at `position`."""
    count, left = 1, position
    with open(path, "rb") as file:
        while left and (block := file.read(min(left, 1 << 20))):
            count, left = count + block.count(b"\n"), left - len(block)
    return count


# ---- merged images ----


def images_of(layout: VocabLayout, vbpe: VisualBPE | None) -> Images:
    """What the compiled reader knows of the vBPE; None: nothing."""
    if vbpe is None:
        starts, (dy, dx, codes), boxes = (
            np.zeros(1, np.int64),
            np.empty((3, 0), np.int32),
            np.empty((0, 3), np.int32),
        )
    else:
        starts, dy, dx, codes = vbpe.shapes
        of_id = starts[:-1]
        boxes = np.stack(
            [
                np.maximum.reduceat(dy, of_id),
                np.minimum.reduceat(dx, of_id),
                np.maximum.reduceat(dx, of_id),
            ],
            1,
        )
    covered = np.empty(MOST_CELLS // 64, np.uint64)
    num_codes = vbpe.num_codes if vbpe else 0
    return Images(
        vbpe is not None,
        layout.first_image_id,
        layout.boi_id,
        num_codes,
        starts,
        dy,
        dx,
        codes,
        boxes,
        covered,
    )


def check_images(row: TokenRow, layout: VocabLayout, vbpe: VisualBPE) -> None:
    """Raises ValueError when merged images do not stand for codes. Without merged codes there is
    nothing to say.

    An image at the end of its row is one that `--too_long truncate` has cut.
    """
    if not len(row.merged) and not len(row.codes):
        return
    check_decodes(row.merged, row.codes, layout, vbpe)
    for begin in np.flatnonzero(row.after == layout.boi_id).tolist():
        tokens = row.after[begin + 1 :]
        behind = np.flatnonzero(~layout.is_image_token(tokens))
        if len(behind):
            try:
                check_fills(layout.token_to_image_ids(tokens[: behind[0]]), len(row.codes), vbpe)
            except ValueError as error:
                raise ValueError(f"an image of token_1 {error}") from error


def check_decodes(
    merged: np.ndarray, codes: np.ndarray, layout: VocabLayout, vbpe: VisualBPE
) -> None:
    """Raises ValueError when the merged stream does not stand for the row's own codes, on a grid
    of some width.
    """
    image_ids, expected = layout.token_to_image_ids(merged), layout.token_to_image_ids(codes)
    if image_ids.size and image_ids.max() >= vbpe.num_ids:
        found = f"the image id {image_ids.max()}, the vBPE's ids end at {vbpe.num_ids - 1}"
        raise ValueError(f"token_image_new holds {found}: is it another vBPE?")
    if expected.size and expected.max() >= vbpe.num_codes:
        raise ValueError(
            f"token_image holds the image id {expected.max()}, the vBPE has "
            f"{vbpe.num_codes} codes: is it another vBPE?"
        )
    num_cells = int(vbpe.sizes[image_ids].sum())
    if num_cells != len(expected):
        raise ValueError(
            f"token_image_new covers {num_cells} cells, token_image has {len(expected)}: "
            "is it another vBPE?"
        )
    side = round(len(expected) ** 0.5)
    if (
        side
        and side * side == len(expected)
        and not np.array_equal(vbpe.decode(image_ids, side, side).ravel(), expected)
    ):
        raise ValueError("token_image_new does not decode to token_image: is it another vBPE?")


def check_fills(image_ids: np.ndarray, num_cells: int, vbpe: VisualBPE) -> None:
    """Raises ValueError when the merged stream does not fill so many cells; where they are a
    square, each exactly once.
    """
    if image_ids.size and image_ids.max() >= vbpe.num_ids:
        raise ValueError(
            f"holds the image id {image_ids.max()}, the vBPE's ids end at {vbpe.num_ids - 1}"
        )
    if (found := int(vbpe.sizes[image_ids].sum())) != num_cells:
        raise ValueError(f"covers {found} cells, the first image has {num_cells}")
    side = round(num_cells**0.5)
    if side * side == num_cells:
        vbpe.decode(image_ids, side, side)
