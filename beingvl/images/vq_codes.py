"""The folder of codes that `beingvl encode-images` writes.

codes.npy        [N, H, W] uint16, memory-mapped for reading
code_hashes.npy  [N] uint64: hash of each row and its key, so that reading a few rows can check them
keys.jsonl       line n is the key of row n, a JSON string: the image's path below the image folder;
                 sorted
key_offsets.npy  [N + 1] int64, in bytes: start of each line of keys.jsonl; keys are found by
                 bisection, without loading them
rejected.jsonl   {"key", "reason"} of every image that could not be read
manifest.json    lineage: the VQ-GAN's fingerprint; details: num_codes, grid, hashes of the
                 images and of their sizes and times
"""

from __future__ import annotations

import io
import json
import mmap
from bisect import bisect_left
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from tokenize import TokenError
from typing import Any

import numpy as np
from blake3 import blake3

from beingvl.artefact.files import printable, spellings, write_atomically
from beingvl.artefact.hashes import hash_bytes
from beingvl.artefact.manifest import Manifest, difference_of_file, read_manifest, write_manifest
from beingvl.errors import InputError, is_out_of_files
from beingvl.json_file import parse_json

CODES_FILE, KEYS_FILE = "codes.npy", "keys.jsonl"
CODE_HASHES_FILE = "code_hashes.npy"
KEY_OFFSETS_FILE, REJECTED_FILE = "key_offsets.npy", "rejected.jsonl"
REMEDY = "make it again with `beingvl encode-images`"


class DamagedError(InputError):
    """An input file changed after it was written. The step must end, not reject rows and go on."""


class CodeFolder:
    """A finished folder of codes. Raises InputError if it is missing, incomplete or damaged."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.manifest: Manifest = read_manifest(self.path, "vq_codes")
        for name in (CODES_FILE, CODE_HASHES_FILE, KEYS_FILE, KEY_OFFSETS_FILE):
            path, expected = self.path / name, self.manifest.files[name]["bytes"]
            found = path.stat().st_size if path.is_file() else 0
            if found != expected:
                raise _damaged(path, f"it has {found} bytes, the manifest says {expected}")
        self.codes = load_mapped(self.path / CODES_FILE, REMEDY)
        self._hashes = load_mapped(self.path / CODE_HASHES_FILE, REMEDY)
        details, shape = self.manifest.details, self.codes.shape
        if [*shape[1:]] != details["grid"] or type(details["num_codes"]) is not int:
            said = {name: details[name] for name in ("grid", "num_codes")}
            raise _damaged(
                self.path / CODES_FILE, f"its shape is {shape}, the manifest says {said}"
            )
        if self.codes.dtype != np.uint16 or self._hashes.shape != shape[:1]:
            held = f"{self.codes.dtype}, and {len(self._hashes)} hashes of {len(self.codes)} rows"
            raise _damaged(self.path / CODES_FILE, f"it holds {held}")

    @property
    def num_codes(self) -> int:
        """Size of the VQ-GAN's code book."""
        return self.manifest.details["num_codes"]

    @property
    def grid(self) -> tuple[int, int]:
        height, width = self.manifest.details["grid"]
        return height, width

    @cached_property
    def keys(self) -> MappedKeys:
        """Image keys in row order, sorted."""
        return MappedKeys(self.path)

    @cached_property
    def _reasons(self) -> dict[str, str]:
        """Key -> why it was rejected."""
        with open(self.path / REJECTED_FILE, encoding="utf-8", newline="\n") as file:
            entries = [parse_json(line, file.name, REMEDY) for line in file]
        return {entry["key"]: entry["reason"] for entry in entries}

    def grids(self, rows: Mapping[str, int]) -> np.ndarray:
        """Codes `[len(rows), H, W]` of images, given their keys and rows.

        Raises DamagedError if codes or a key changed after they were written.
        """
        grids = self.codes[list(rows.values())]
        for (key, row), grid in zip(rows.items(), grids, strict=True):
            if code_hash(self.keys[row], grid) != self._hashes[row].tobytes():
                raise DamagedError(
                    f"{self.path / CODES_FILE} is damaged (row {row} or its key, {key}, changed "
                    f"after it was written); {REMEDY}"
                )
        return grids

    @cached_property
    def _damage_of_keys(self) -> list[str]:
        names = (KEYS_FILE, KEY_OFFSETS_FILE)
        found = {name: difference_of_file(self.path, name, self.manifest) for name in names}
        return [f"{self.path / name} {damage}" for name, damage in found.items() if damage]

    def row(self, key: str) -> int:
        """Row of an image in `codes`. Raises InputError for a rejected or unknown image."""
        for spelling in spellings(key):
            row = bisect_left(self.keys, spelling)
            if row < len(self.keys) and self.keys[row] == spelling:
                return row
        if (name := printable(key)) in self._reasons:
            raise InputError(
                f"{name} was rejected when {self.path} was made: {self._reasons[name]}"
            )
        if damage := self._damage_of_keys:
            raise DamagedError(f"{damage[0]}; {REMEDY}")
        # Usually the keys are only relative to a different folder, so the message shows one.
        example = printable(self.keys[0])
        raise InputError(
            f"{self.path} has no codes of {key} (it has {len(self.codes)} images, {example} is "
            f"one); {REMEDY}"
        )


class MappedKeys:
    """keys.jsonl as a sequence of strings, each read when it is accessed."""

    def __init__(self, folder: Path) -> None:
        self._offsets = load_mapped(folder / KEY_OFFSETS_FILE, REMEDY)
        self._path = folder / KEYS_FILE
        try:
            with open(self._path, "rb") as file:
                self._lines = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except ValueError as error:  # it is empty
            raise _damaged(self._path, str(error)) from error

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, row: int) -> str:
        """Raises IndexError after the last row."""
        line = self._lines[int(self._offsets[row]) : int(self._offsets[row + 1])]
        key = parse_json(line, self._path, REMEDY)
        if not isinstance(key, str):
            raise _damaged(self._path, f"it holds {key!r} where a key is expected")
        return key


def load_mapped(path: Path, remedy: str) -> np.ndarray:
    """Memory-map a .npy file. Raises InputError with the remedy if it is damaged."""
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError, SyntaxError, TokenError) as error:
        # The last two come from numpy, which parses the header as Python.
        if is_out_of_files(error):
            raise
        raise InputError(f"{path} is damaged ({error}); {remedy}") from error


def _damaged(path: Path, found: str) -> InputError:
    return InputError(f"{path} is damaged ({found}); {REMEDY}")


def code_hash(key: str, grid: np.ndarray) -> bytes:
    """The eight bytes in `code_hashes.npy` for one image's codes `[H, W]` uint16."""
    content = key_line(key).encode() + grid.astype("<u2").tobytes()
    return blake3(content).digest(length=8)


def key_line(key: str) -> str:
    return json.dumps(key, ensure_ascii=False) + "\n"


def rejected_line(key: str, reason: str) -> str:
    fields = {"key": printable(key), "reason": printable(reason)}
    return json.dumps(fields, ensure_ascii=False) + "\n"


def npy_header(dtype: str, *shape: int) -> bytes:
    """The bytes before the values in a .npy file."""
    buffer = io.BytesIO()
    header = {"shape": shape, "fortran_order": False, "descr": dtype}
    np.lib.format.write_array_header_1_0(buffer, header)
    return buffer.getvalue()


def finish_codes(
    folder: Path,
    counts: Mapping[str, int],
    lineage: Mapping[str, str],
    details: Mapping[str, Any],
    known_hashes: Mapping[str, str],
) -> None:
    """Index the sorted keys and write the manifest; the other files exist already."""
    with open(folder / KEYS_FILE, "rb") as file:
        lengths = np.fromiter(map(len, file), np.int64)
    offsets = io.BytesIO()
    np.save(offsets, np.concatenate([[0], np.cumsum(lengths)]).astype("<i8"))
    write_atomically(folder / KEY_OFFSETS_FILE, offsets.getvalue())
    # A user's images in this folder are never listed or removed.
    own = {CODES_FILE, CODE_HASHES_FILE, KEYS_FILE, KEY_OFFSETS_FILE, REJECTED_FILE}
    write_manifest(folder, "vq_codes", counts, lineage, details, known_hashes, own.__contains__)


def hash_line(key: str, data: bytes | None) -> str:
    """One image's contribution to the hash of all images; `data` is None if it is missing."""
    return f"{json.dumps(key)} {'missing' if data is None else hash_bytes(data)}\n"


def stamp_line(key: str, stamp: str) -> str:
    """One image's contribution to the hash of all stamps."""
    return f"{json.dumps(key)} {stamp}\n"
