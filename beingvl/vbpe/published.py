"""Published Being-VL vocabularies: a pickled list of `((token1, token2), new_token)`, with encoding
exactly as in the released code.

They are not a `VisualBPE`: the first merge works on the grid and flattens it, all others work on
the flat stream. So a token has no fixed shape, and a stream does not determine its grid. We support
them so that models trained with them keep working.

    grid     first merge (7, 8) -> 9: the right neighbour, else the lower one     flat
        second merge (5, 9) -> 10
    7 8 5    9 # 5                                                                9 5 9 6     9 10 6
    7 6      9 6
    8        #

The released code also has a case for an L of both neighbours, which never happens because such a
cell has already merged to the right.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import re
import reprlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from beingvl.errors import InputError
from beingvl.vbpe.grids import EncodeChunk
from beingvl.vbpe.kernels import Ints, kernel
from beingvl.vbpe.vbpe_file import Vocabulary

# All that a pickled list of tuples of integers needs, in any protocol; nothing that imports, calls
# or builds an object.
_HARMLESS_OPCODES = re.compile(
    "PROTO|FRAME|STOP|MARK|EMPTY_LIST|LIST|APPENDS?|EMPTY_TUPLE|TUPLE[123]?|INT|BININT[12]?|LONG1?|"
    "MEMOIZE|(LONG_)?BIN(PUT|GET)|PUT|GET"
)

PUBLISHED_CODES, PUBLISHED_PAD = 8192, 128256  # --init_size and --vocab_pad in its documentation
NUM_BYTES = 256  # a text vocabulary has at least this many tokens

MAX_PICKLE_BYTES = 1 << 26  # a thousand times the published file's size


class _Refusing(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def read_published_pickle(path: Path | str) -> list[tuple[int, int, int]]:
    """(token1, token2, new_token) in rank order.

    Raises InputError, before executing anything, unless there are only lists, tuples and integers.
    """
    path = Path(path)
    if (size := path.stat().st_size) > MAX_PICKLE_BYTES:
        raise InputError(f"{path} has {size:,} bytes, expected at most {MAX_PICKLE_BYTES:,}")
    data = path.read_bytes()
    try:
        for opcode, argument, _ in pickletools.genops(data):
            if not _HARMLESS_OPCODES.fullmatch(opcode.name):
                raise InputError(
                    f"{path} holds more than lists, tuples and integers (pickle opcode "
                    f"{opcode.name}), so it is not a published vocabulary and was not opened"
                )
            # The unpickler would allocate memory for as many objects as the largest index.
            if opcode.name.endswith("PUT") and (argument or 0) > size:
                raise InputError(f"{path} is not a readable pickle (memo {argument})")
        content = _Refusing(io.BytesIO(data)).load()
    except InputError:
        raise
    except Exception as error:  # unpickling damaged bytes raises almost anything
        raise InputError(
            f"{path} is not a readable pickle ({type(error).__name__}: {error})"
        ) from error
    expected = "((token1, token2), new_token)"
    if not isinstance(content, list):
        found = type(content).__name__
        raise InputError(f"{path} holds one {found}, expected a list of {expected}")
    merges = []
    for rank, entry in enumerate(content):
        match entry:
            case ((int() as first, int() as second), int() as new):
                merges.append((first, second, new))
            case _:
                found = reprlib.repr(entry)[:60]  # reprlib, because nesting may be endless
                raise InputError(f"{path}: entry {rank} is {found}, expected {expected}")
    return merges


@dataclass(eq=False)
class LegacyVisualBPE(Vocabulary):
    """A published vocabulary in image ids: `merges` is int32 `[R, 2]`."""

    source: str = "legacy vBPE"

    kind = "legacy"
    columns = 2

    def _encoder(self) -> EncodeChunk:
        return partial(encode_legacy_images, self.num_codes, self.merges)

    def decode(self, ids: np.ndarray, height: int, width: int) -> np.ndarray:
        """Always raises InputError: the first merge has one id for right and lower neighbours."""
        raise InputError(
            f"{self.source} is a published (legacy) vocabulary, whose streams cannot be decoded; "
            "train one with vBPE"
        )

    def cells(self, image_id: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Always raises InputError: a token has no fixed shape."""
        raise InputError(
            f"{self.source} is a published (legacy) vocabulary, whose tokens have no fixed shape"
        )


def import_published(
    path: Path | str, num_codes: int | None = None, vocab_pad: int | None = None
) -> LegacyVisualBPE:
    """Read a published pickle. Codes are `token - vocab_pad`; `_sizes` determines what is None.

    Raises InputError for tokens that are neither codes nor results of earlier merges.
    """
    entries = read_published_pickle(path)
    num_codes, vocab_pad = _sizes(path, entries, num_codes, vocab_pad)
    image_ids = {new: num_codes + rank for rank, (_, _, new) in enumerate(entries)}
    if len(image_ids) != len(entries):
        raise InputError(
            f"{path}: {len(entries)} merges make only {len(image_ids)} different new tokens"
        )

    def to_image_id(token: int, rank: int) -> int:
        image_id = image_ids.get(token, token - vocab_pad)
        known = num_codes + rank if token in image_ids else num_codes
        if not 0 <= image_id < known:
            raise InputError(
                f"{path}: merge {rank} uses token {token}, expected a code {vocab_pad} … "
                f"{vocab_pad + num_codes - 1} or the new token of an earlier merge; are "
                "--init_size and --vocab_pad right?"
            )
        return image_id

    merges = [
        (to_image_id(first, rank), to_image_id(second, rank))
        for rank, (first, second, _) in enumerate(entries)
    ]
    parameters = {"imported_from": Path(path).name, "vocab_pad": vocab_pad}
    return LegacyVisualBPE(
        num_codes, np.array(merges).reshape(-1, 2), {}, parameters, None, str(path)
    )


def _sizes(
    path: Path | str,
    entries: Sequence[tuple[int, int, int]],
    num_codes: int | None,
    vocab_pad: int | None,
) -> tuple[int, int]:
    """`num_codes` and `vocab_pad`: the first new token comes directly after the codes, so one of
    them gives the other. Without both, `vocab_pad` is 0 if a token is so small that no text
    vocabulary fits before it, or else the sizes must be those of the published commands.

    Raises InputError if they are not.
    """
    if not entries:
        if num_codes is None:
            raise InputError(
                f"{path} holds no merges, so the number of codes is unknown: give --init_size"
            )
        return num_codes, vocab_pad or 0
    first_new = entries[0][2]
    if num_codes is None and vocab_pad is None:
        if min(map(min, entries)) < NUM_BYTES:
            vocab_pad = 0
        elif first_new == PUBLISHED_PAD + PUBLISHED_CODES:
            vocab_pad = PUBLISHED_PAD
        else:
            raise InputError(
                f"{path} does not say how many codes come before its first new token {first_new}; "
                f"import it with `beingvl train-vbpe --import_pkl {path} --init_size CODES`"
            )
    if vocab_pad is None:
        vocab_pad = first_new - (num_codes or 0)
        if vocab_pad < 0:
            found = f"{path}: its first new token is {first_new}"
            raise InputError(f"{found}, so it is not for {num_codes} codes")
    return num_codes or first_new - vocab_pad, vocab_pad


# ---- the readable twin ----


def encode_legacy_reference(
    codes: np.ndarray, num_codes: int, merges: Sequence[tuple[int, int]]
) -> list[int]:
    """The readable twin: first merge on the grid `[H, W]`, others on the flat stream."""
    if len(merges) == 0:
        return codes.ravel().tolist()
    height, width = codes.shape
    grid, gone = codes.tolist(), set()
    first, second = merges[0]
    for y in range(height):
        for x in range(width):
            if (y, x) in gone or grid[y][x] != first:
                continue
            for row, column in ((y, x + 1), (y + 1, x)):
                if (
                    row < height
                    and column < width
                    and (row, column) not in gone
                    and grid[row][column] == second
                ):
                    grid[y][x] = num_codes
                    gone.add((row, column))
                    break
    stream = [grid[y][x] for y in range(height) for x in range(width) if (y, x) not in gone]
    for rank, (first, second) in enumerate(merges[1:], start=1):
        merged, at = [], 0
        while at < len(stream):
            if stream[at] == first and stream[at + 1 : at + 2] == [second]:
                merged.append(num_codes + rank)
                at += 2
            else:
                merged.append(stream[at])
                at += 1
        stream = merged
    return stream


# ---- the compiled twin ----


@kernel
def encode_legacy_images(
    num_codes: int, merges: Ints, grids: Ints, ids: Ints, lengths: Ints
) -> int:
    """Encode `grids` [N, H, W] int32 into `ids` and `lengths` [N]; returns the number of ids.

    `present` counts an image's ids: a merge whose tokens do not occur is skipped without reading
    the stream.
    """
    num_images, height, width = grids.shape
    present = np.zeros(num_codes + len(merges), np.int64)
    written = 0
    for image in range(num_images):
        stream = ids[written : written + height * width]
        size = flatten_first(grids[image], num_codes, merges, stream)
        present[:] = 0
        for i in range(size):
            present[stream[i]] += 1
        for rank in range(1, len(merges)):
            first, second = merges[rank]
            if present[first] and present[second]:
                merged = replace_pairs(stream, size, first, second, num_codes + rank)
                present[first] -= size - merged
                present[second] -= size - merged
                present[num_codes + rank] += size - merged
                size = merged
        lengths[image] = size
        written += size
    return written


@kernel
def flatten_first(grid: Ints, num_codes: int, merges: Ints, stream: Ints) -> int:
    """First merge on the grid, with the right, else the lower neighbour; returns the flat stream's
    length.
    """
    height, width = grid.shape
    gone = np.zeros((height, width), np.bool_)
    first, second = (merges[0, 0], merges[0, 1]) if len(merges) else (-1, -1)
    size = 0
    for y in range(height):
        for x in range(width):
            if gone[y, x]:
                continue
            stream[size] = grid[y, x]
            if grid[y, x] == first:
                if x + 1 < width and not gone[y, x + 1] and grid[y, x + 1] == second:
                    gone[y, x + 1] = True
                    stream[size] = num_codes
                elif y + 1 < height and not gone[y + 1, x] and grid[y + 1, x] == second:
                    gone[y + 1, x] = True
                    stream[size] = num_codes
            size += 1
    return size


@kernel
def replace_pairs(stream: Ints, size: int, first: int, second: int, new: int) -> int:
    """Replace (first, second) by `new` from left to right, in place; returns the new length."""
    read, write = 0, 0
    while read < size:
        if stream[read] == first and read + 1 < size and stream[read + 1] == second:
            stream[write] = new
            read += 2
        else:
            stream[write] = stream[read]
            read += 1
        write += 1
    return write
