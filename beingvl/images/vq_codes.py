"""The folder of codes that `beingvl encode-images` writes, and the image files it is made from.

codes.npy        [N, H, W] uint16, read through a memory map
keys.jsonl       line n is the key of row n, a JSON string: the image's path relative to the
                 image folder; sorted
key_offsets.npy  [N + 1] int64, bytes: where each line of keys.jsonl starts, so that a key is found
by bisection, in no memory
rejected.jsonl   {"key", "reason"} of every image that could not be read
manifest.json    lineage: the VQ-GAN's fingerprint; details: num_codes, grid, hashes of the
                 images and of their sizes and times
"""

from __future__ import annotations

import io
import json
import mmap
from bisect import bisect_left
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from tokenize import TokenError

import numpy as np
from tqdm import tqdm

from beingvl.artefact.files import printable
from beingvl.artefact.hashes import hash_bytes
from beingvl.artefact.manifest import Manifest, read_manifest, write_manifest
from beingvl.errors import InputError

IMAGE_SUFFIXES = frozenset(
    {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}
)
CODES_FILE, KEYS_FILE, KEY_OFFSETS_FILE, REJECTED_FILE = (
    "codes.npy",
    "keys.jsonl",
    "key_offsets.npy",
    "rejected.jsonl",
)


class CodeFolder:
    """A finished folder of codes. Raises InputError when it is missing, incomplete or damaged."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.manifest: Manifest = read_manifest(self.path, "vq_codes")
        for name in {CODES_FILE, KEYS_FILE, KEY_OFFSETS_FILE} & set(self.manifest.files):
            self._check_size(name, int(self.manifest.files[name]["bytes"]))
        self.codes = load_mapped(
            self.path / CODES_FILE, "make it again with `beingvl encode-images`"
        )

    def _check_size(self, name: str, expected: int) -> None:
        found = (self.path / name).stat().st_size if (self.path / name).is_file() else 0
        if found != expected:
            raise _damaged(self.path / name, f"it has {found} bytes, the manifest says {expected}")

    @property
    def num_codes(self) -> int:
        """Size of the VQ-GAN's code book."""
        return self.manifest.details["num_codes"]

    @property
    def grid(self) -> tuple[int, int]:
        height, width = self.manifest.details["grid"]
        return height, width

    @cached_property
    def keys(self) -> list[str]:
        """Image keys in row order."""
        lines = (self.path / KEYS_FILE).read_bytes().removesuffix(b"\n").split(b"\n")
        return [_key_of(line, self.path / KEYS_FILE) for line in lines]

    @cached_property
    def _sorted_keys(self) -> _MappedKeys | None:
        """The keys through the memory map; None in a folder without key_offsets.npy."""
        return _MappedKeys(self.path) if KEY_OFFSETS_FILE in self.manifest.files else None

    @cached_property
    def _row_of_key(self) -> dict[str, int]:
        return {key: row for row, key in enumerate(self.keys)}

    def _find(self, key: str) -> int | None:
        if self._sorted_keys is None:
            return self._row_of_key.get(key)
        row = bisect_left(self._sorted_keys, key)
        return row if row < len(self._sorted_keys) and self._sorted_keys[row] == key else None

    @cached_property
    def _reasons(self) -> dict[str, str]:
        """Key -> why it was rejected."""
        with open(self.path / REJECTED_FILE, encoding="utf-8", newline="\n") as file:
            return {entry["key"]: entry["reason"] for entry in map(json.loads, file)}

    def row(self, key: str) -> int:
        """Row of an image in `codes`. Raises InputError that says whether the image was rejected
        or is unknown.
        """
        row = self._find(key)
        if row is not None:
            return row
        if (name := printable(key)) in self._reasons:
            raise InputError(
                f"{name} was rejected when {self.path} was made: {self._reasons[name]}"
            )
        known = (
            f"{self.path} has no codes of {key} (it has {len(self.codes)} images{self._example()})"
        )
        raise InputError(f"{known}; make it again with `beingvl encode-images`")

    def _example(self) -> str:
        """One of the keys, for a message: most often the user's only begin elsewhere."""
        keys = self._sorted_keys or self.keys
        return f", {printable(keys[0])} is one" if len(keys) else ""


class _MappedKeys:
    """keys.jsonl as a sorted sequence of strings, read where it is asked."""

    def __init__(self, folder: Path) -> None:
        self._offsets = load_mapped(
            folder / KEY_OFFSETS_FILE, "make it again with `beingvl encode-images`"
        )
        self._path = folder / KEYS_FILE
        with open(self._path, "rb") as file:
            self._lines = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, row: int) -> str:
        return _key_of(
            self._lines[int(self._offsets[row]) : int(self._offsets[row + 1])], self._path
        )


def load_mapped(path: Path, remedy: str) -> np.ndarray:
    """A .npy file through the memory map. Raises InputError with the remedy for a damaged one."""
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (
        ValueError,
        OSError,
        EOFError,
        SyntaxError,
        TokenError,
    ) as error:  # numpy reads the header as Python
        raise InputError(f"{path} is damaged ({error}); {remedy}") from error


def _damaged(path: Path, found: str) -> InputError:
    return InputError(f"{path} is damaged ({found}); make it again with `beingvl encode-images`")


def _key_of(line: bytes, path: Path) -> str:
    try:
        key = json.loads(line.decode())
    except ValueError as error:
        raise _damaged(path, str(error)) from error
    if not isinstance(key, str):
        raise _damaged(path, f"it holds {key!r} where a key is expected")
    return key


def key_line(key: str) -> str:
    return json.dumps(key, ensure_ascii=False) + "\n"


def rejected_line(key: str, reason: str) -> str:
    return (
        json.dumps({"key": printable(key), "reason": printable(reason)}, ensure_ascii=False) + "\n"
    )


def codes_header(num_rows: int, grid: tuple[int, int]) -> bytes:
    """What stands before the rows in codes.npy."""
    buffer = io.BytesIO()
    header = {"shape": (num_rows, *grid), "fortran_order": False, "descr": "<u2"}
    np.lib.format.write_array_header_1_0(buffer, header)
    return buffer.getvalue()


def finish_codes(
    folder: Path,
    counts: dict[str, int],
    lineage: dict[str, str],
    details: dict,
    known_hashes: Mapping[str, str],
) -> None:
    """Index the sorted keys and write the manifest; codes.npy, keys.jsonl and rejected.jsonl are
    there.
    """
    with open(folder / KEYS_FILE, "rb") as file:
        lengths = np.fromiter(map(len, file), np.int64)
    temporary = folder / f"{KEY_OFFSETS_FILE}.tmp"
    with open(temporary, "wb") as file:
        np.save(file, np.concatenate([[0], np.cumsum(lengths)]).astype("<i8"))
    temporary.replace(folder / KEY_OFFSETS_FILE)
    own = {
        CODES_FILE,
        KEYS_FILE,
        KEY_OFFSETS_FILE,
        REJECTED_FILE,
    }  # images that lie there are never listed, nor removed
    write_manifest(folder, "vq_codes", counts, lineage, details, known_hashes, own.__contains__)


def find_images(folder: Path) -> list[str]:
    """Sorted keys of all image files below `folder`, hidden ones left out. Raises InputError
    when there are none.
    """
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder; give the folder that holds the images")
    keys = sorted(iterate_images(folder))
    if not keys:
        raise InputError(
            f"{folder} has no images (looked for {', '.join(sorted(IMAGE_SUFFIXES))}, also "
            "in subfolders)"
        )
    return keys


def iterate_images(folder: Path) -> Iterator[str]:
    """Keys of all image files below `folder`, hidden ones left out, in any order."""
    for path in folder.rglob("*"):
        if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file():
            key = path.relative_to(folder)
            if not any(part.startswith(".") for part in key.parts):
                yield key.as_posix()


def hash_images(folder: Path, keys: list[str]) -> str:
    """One hash of the images' names and content."""
    progress = tqdm(keys, desc="hash images", unit="image", disable=None, leave=False)
    files = ((key, folder / key) for key in progress)
    return hash_bytes(
        "".join(
            hash_line(key, path.read_bytes() if path.is_file() else None) for key, path in files
        ).encode()
    )


def hash_line(key: str, data: bytes | None) -> str:
    """What one image contributes to the hash of all: its key and content; `data` is None for a
    file that is not there.
    """
    return f"{json.dumps(key)} {'missing' if data is None else hash_bytes(data)}\n"


def stamp_line(key: str, stamp: str) -> str:
    """What one image contributes to the hash of all stamps."""
    return f"{json.dumps(key)} {stamp}\n"
