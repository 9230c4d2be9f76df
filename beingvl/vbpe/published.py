"""Published Being-VL vocabularies: a pickled list of `((token1, token2), new_token)`, encoded
exactly as the released code does.

They are no `VisualBPE`: their first merge works on the grid and flattens it, every later one works
on the flat stream. So a token has no fixed shape, and a stream does not give its grid back. They
are here so that models trained with them keep working.

    grid     first merge (7, 8) -> 9: the right neighbour, else the lower one     flat
        second merge (5, 9) -> 10
    7 8 5    9 # 5                                                                9 5 9 6     9 10 6
    7 6      9 6
    8        #

The released code also knows an L of both neighbours; it never comes to that, because such a cell
already merged to the right.
"""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import pickletools
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from beingvl.artefact.files import write_atomically
from beingvl.errors import InputError
from beingvl.vbpe import kernels as fast
from beingvl.vbpe.grids import MAX_CODES, MAX_IDS, checked_grids, encode_in_chunks
from beingvl.vbpe.vbpe_file import write_vbpe_json

# Everything that a pickled list of tuples of integers needs, in any protocol; nothing that imports,
# calls or builds an object.
_HARMLESS_OPCODES = {"PROTO", "FRAME", "STOP", "MARK", "EMPTY_LIST", "LIST", "APPEND", "APPENDS"}
_HARMLESS_OPCODES |= {
    "EMPTY_TUPLE",
    "TUPLE",
    "TUPLE1",
    "TUPLE2",
    "TUPLE3",
    "INT",
    "BININT",
    "BININT1",
    "BININT2",
    "LONG",
    "LONG1",
}
_HARMLESS_OPCODES |= {"PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE", "GET", "BINGET", "LONG_BINGET"}


class _Refusing(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def read_published_pickle(path: Path | str) -> list[tuple[int, int, int]]:
    """(token1, token2, new_token) in rank order.

    Raises InputError for anything but lists, tuples and integers, before any of it is executed.
    """
    path = Path(path)
    data = path.read_bytes()
    try:
        for opcode, _, _ in pickletools.genops(data):
            if opcode.name not in _HARMLESS_OPCODES:
                raise InputError(
                    f"{path} holds more than lists, tuples and integers (pickle opcode "
                    f"{opcode.name}), so it is not a published "
                    "vBPE vocabulary and was not opened"
                )
        content = _Refusing(io.BytesIO(data)).load()
    except InputError:
        raise
    except Exception as error:  # unpickling damaged bytes raises almost anything
        raise InputError(
            f"{path} is not a readable pickle ({type(error).__name__}: {error})"
        ) from error
    if not isinstance(content, list):
        raise InputError(
            f"{path} holds one {type(content).__name__}, expected a list of ((token1, "
            "token2), new_token)"
        )
    merges = []
    for rank, entry in enumerate(content):
        match entry:
            case ((int() as first, int() as second), int() as new):
                merges.append((first, second, new))
            case _:
                raise InputError(
                    f"{path}: entry {rank} is {str(entry)[:60]}, expected ((token1, token2), "
                    "new_token)"
                )
    return merges


@dataclass
class LegacyVisualBPE:
    """A published vocabulary in image ids: `merges` int32 `[R, 2]`, the merge of rank r makes id
    `num_codes + r`.
    """

    num_codes: int
    merges: np.ndarray
    lineage: dict[str, str] = field(default_factory=dict, compare=False)
    parameters: dict[str, Any] = field(default_factory=dict, compare=False)
    grid: tuple[int, int] | None = field(default=None, compare=False)
    source: str = field(default="legacy vBPE", compare=False)

    kind = "legacy"

    def __post_init__(self) -> None:
        """Raises InputError for merges of ids that do not exist yet."""
        array = np.asarray(self.merges if len(self.merges) else np.zeros((0, 2), np.int64))
        if array.ndim != 2 or array.shape[1] != 2 or not np.issubdtype(array.dtype, np.integer):
            raise InputError(
                f"{self.source}: merges of shape {list(array.shape)} and type {array.dtype}, "
                "expected integers [R, 2]"
            )
        if not 1 <= self.num_codes <= MAX_CODES or self.num_codes + len(array) > MAX_IDS:
            limits = f"expected 1 to {MAX_CODES} and together at most {MAX_IDS}"
            raise InputError(
                f"{self.source}: {self.num_codes} codes and {len(array)} merges, {limits}"
            )
        good = ((array >= 0) & (array < self.num_codes + np.arange(len(array))[:, None])).all(
            axis=1
        )
        if not good.all():
            rank = int(np.argmin(good))
            raise InputError(
                f"{self.source}: merge {rank} is {array[rank].tolist()}, expected two ids "
                f"below {self.num_codes + rank}"
            )
        self.merges = array.astype(np.int32)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, LegacyVisualBPE) and self.fingerprint() == other.fingerprint()

    @property
    def num_merges(self) -> int:
        return len(self.merges)

    @property
    def num_ids(self) -> int:
        return self.num_codes + self.num_merges

    def fingerprint(self) -> str:
        content = json.dumps(
            [self.kind, self.num_codes, self.merges.tolist()], separators=(",", ":")
        )
        return "sha256:" + hashlib.sha256(content.encode()).hexdigest()

    def encode(self, grid: np.ndarray) -> np.ndarray:
        """Codes `[H, W]` to image ids `[n]` int32."""
        return self.encode_batch(np.asarray(grid)[None])[0]

    def encode_batch(
        self, grids: np.ndarray, num_threads: int = 1
    ) -> tuple[np.ndarray, np.ndarray]:
        """Codes `[N, H, W]` to (image ids flat int32, offsets int64 `[N + 1]`)."""
        return encode_in_chunks(
            self._encode_chunk, checked_grids(grids, self.num_codes, self.source), num_threads
        )

    def decode(self, ids: np.ndarray, height: int, width: int) -> np.ndarray:
        """Always raises InputError: the first merge joins right and lower neighbours into the
        same id, so the grid is lost.
        """
        raise InputError(
            f"{self.source} is a published (legacy) vocabulary, whose streams cannot be "
            "decoded; train one with vBPE"
        )

    def cells(self, image_id: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Always raises InputError: a token has no fixed shape."""
        raise InputError(
            f"{self.source} is a published (legacy) vocabulary, whose tokens have no fixed shape"
        )

    def save(self, path: Path | str) -> None:
        """Write it as `vbpe.json` with `"kind": "legacy"`."""
        write_atomically(path, write_vbpe_json(self))

    def _encode_chunk(self, grids: np.ndarray, ids: np.ndarray, lengths: np.ndarray) -> int:
        return fast.encode_legacy_images(grids, self.num_codes, self.merges, ids, lengths)


def import_published(
    path: Path | str, num_codes: int | None = None, vocab_pad: int = 0
) -> LegacyVisualBPE:
    """Read a published pickle. Codes are `token - vocab_pad`; without `num_codes` they end where
    the first new token begins.

    Raises InputError for tokens that are neither codes nor made by an earlier merge.
    """
    entries = read_published_pickle(path)
    if num_codes is None:
        if not entries:
            raise InputError(
                f"{path} holds no merges, so the number of codes is unknown: give --init_size"
            )
        num_codes = entries[0][2] - vocab_pad
    image_ids = {new: num_codes + rank for rank, (_, _, new) in enumerate(entries)}
    if len(image_ids) != len(entries):
        raise InputError(
            f"{path}: {len(entries)} merges make only {len(image_ids)} different new tokens"
        )

    def to_image_id(token: int, rank: int) -> int:
        image_id = image_ids.get(token, token - vocab_pad)
        if not 0 <= image_id < num_codes + rank or (
            token not in image_ids and image_id >= num_codes
        ):
            known = (
                f"a code {vocab_pad} … {vocab_pad + num_codes - 1} or the new token of an "
                "earlier merge"
            )
            raise InputError(
                f"{path}: merge {rank} uses token {token}, expected {known}; are --init_size "
                "and --vocab_pad right?"
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


def encode_legacy_reference(
    codes: np.ndarray, num_codes: int, merges: Sequence[tuple[int, int]]
) -> list[int]:
    """The readable twin: the first merge on the grid `[H, W]`, every later one from left to
    right on the flat stream.
    """
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
