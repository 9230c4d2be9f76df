"""The folder of codes that `beingvl encode-images` writes, and the image files it is made from.

codes.npy        [N, H, W] uint16, read through a memory map
keys.jsonl       line n is the key of row n, a JSON string: the image's path relative to the image folder
rejected.jsonl   {"key", "reason"} of every image that could not be read
manifest.json    lineage: the VQ-GAN's fingerprint; details: num_codes, grid, hash of the images
"""

from __future__ import annotations

import json
import os
from functools import cached_property
from pathlib import Path

import numpy as np

from beingvl.errors import InputError
from beingvl.manifest import Manifest, hash_bytes, read_manifest, start_folder, write_manifest

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"})
CODES_FILE, KEYS_FILE, REJECTED_FILE = "codes.npy", "keys.jsonl", "rejected.jsonl"


class CodeFolder:
    """A finished folder of codes. Raises InputError when it is missing, incomplete or damaged."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.manifest: Manifest = read_manifest(self.path, "vq_codes")
        try:
            self.codes: np.ndarray = np.load(self.path / CODES_FILE, mmap_mode="r", allow_pickle=False)
        except (ValueError, FileNotFoundError) as error:
            raise InputError(
                f"{self.path / CODES_FILE} is damaged ({error}); make it again with `beingvl encode-images`"
            ) from error

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
        return [json.loads(line) for line in (self.path / KEYS_FILE).read_text(encoding="utf-8").splitlines()]

    @cached_property
    def _row_of_key(self) -> dict[str, int]:
        return {key: row for row, key in enumerate(self.keys)}

    def row(self, key: str) -> int:
        """Row of an image in `codes`. Raises InputError that says whether the image was rejected or is unknown."""
        if key in self._row_of_key:
            return self._row_of_key[key]
        for line in (self.path / REJECTED_FILE).read_text(encoding="utf-8").splitlines():
            rejected = json.loads(line)
            if rejected["key"] == key:
                raise InputError(f"{key} was rejected when {self.path} was made: {rejected['reason']}")
        known = f"{self.path} has no codes of {key} (it has {len(self.keys)} images)"
        raise InputError(f"{known}; make it again with `beingvl encode-images`")


class CodeWriter:
    """Writes a folder of codes row by row; memory use does not grow with the codes. `finish` makes it complete."""

    def __init__(self, folder: Path, num_images: int, grid: tuple[int, int], max_rejected: float) -> None:
        self.folder = start_folder(folder)
        self.num_rows = self.num_rejected = 0
        self._num_images, self._grid, self._max_rejected = num_images, grid, max_rejected
        self._codes = self._unfinished(CODES_FILE).open("wb")
        self._keys = self._unfinished(KEYS_FILE).open("w", encoding="utf-8")
        self._rejected = (folder / REJECTED_FILE).open("w", encoding="utf-8")
        self._write_header(num_images)

    def add(self, keys: list[str], codes: np.ndarray) -> None:
        """Append the rows `[n, H, W]` uint16 of `keys`."""
        assert codes.shape == (len(keys), *self._grid) and codes.dtype == np.uint16
        self._codes.write(codes.astype("<u2").tobytes())
        self._keys.writelines(json.dumps(key, ensure_ascii=False) + "\n" for key in keys)
        self.num_rows += len(keys)

    def reject(self, key: str, reason: str) -> None:
        """Note an image that has no row. Raises InputError past the limit."""
        self._rejected.write(json.dumps({"key": key, "reason": reason}, ensure_ascii=False) + "\n")
        self._rejected.flush()
        self.num_rejected += 1
        if self.num_rejected > self._max_rejected * self._num_images:
            found = f"{self.num_rejected} of {self._num_images} images rejected so far, --max_rejected is {self._max_rejected:g}"
            raise InputError(f"{found}; the last: {reason}; all are in {self.folder / REJECTED_FILE}")

    def finish(self, lineage: dict[str, str], details: dict) -> None:
        """Give the files their names and write the manifest. Raises InputError when there is no row at all."""
        if not self.num_rows:
            raise InputError(f"none of the {self._num_images} images could be read; the reasons are in {self._rejected.name}")
        self._write_header(self.num_rows)
        for file in (self._codes, self._keys, self._rejected):
            file.flush()
            os.fsync(file.fileno())
        self.close()
        for name in (CODES_FILE, KEYS_FILE):
            self._unfinished(name).replace(self.folder / name)
        counts = {"images": self.num_rows, "rejected": self.num_rejected}
        write_manifest(self.folder, "vq_codes", counts, lineage, details)

    def __enter__(self) -> CodeWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        for file in (self._codes, self._keys, self._rejected):
            file.close()

    def _unfinished(self, name: str) -> Path:
        return self.folder / f"{name}.tmp"

    def _write_header(self, num_rows: int) -> None:
        """The .npy header, before the rows and once more when their number is known: numpy pads it to the same length."""
        self._codes.seek(0)
        header = {"shape": (num_rows, *self._grid), "fortran_order": False, "descr": "<u2"}
        np.lib.format.write_array_header_1_0(self._codes, header)


def find_images(folder: Path) -> list[str]:
    """Sorted keys of all image files below `folder`, hidden ones left out. Raises InputError when there are none."""
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder; give the folder that holds the images")
    paths = (path.relative_to(folder) for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())
    keys = sorted(path.as_posix() for path in paths if not any(part.startswith(".") for part in path.parts))
    if not keys:
        raise InputError(f"{folder} has no images (looked for {', '.join(sorted(IMAGE_SUFFIXES))}, also in subfolders)")
    return keys


def hash_images(folder: Path, keys: list[str]) -> str:
    """One hash of the images' names and content."""
    from tqdm import tqdm

    progress = tqdm(keys, desc="hash images", unit="image", disable=None, leave=False)
    files = ((key, folder / key) for key in progress)
    return hash_bytes("".join(hash_line(key, path.read_bytes() if path.is_file() else None) for key, path in files).encode())


def hash_line(key: str, data: bytes | None) -> str:
    """What one image contributes to the hash of all: its key and content; `data` is None for a file that is not there."""
    return f"{json.dumps(key)} {'missing' if data is None else hash_bytes(data)}\n"
