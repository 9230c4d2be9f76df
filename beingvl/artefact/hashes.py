"""One hash for everything: BLAKE3, the 32 bytes that `b3sum` prints, with its own threads."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

from blake3 import blake3

PREFIX = "blake3:"
BLOCK_BYTES = 1 << 20  # fits a cache; larger ones were slower


def hash_bytes(data: bytes) -> str:
    return PREFIX + blake3(data).hexdigest()


def hash_file(path: Path) -> str:
    """Hash of a file's bytes. Read, not mapped: a disk that fails is an OSError, not a signal."""
    digest = blake3(max_threads=blake3.AUTO)
    with open(path, "rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        block = memoryview(bytearray(min(max(size, 1), BLOCK_BYTES)))
        while count := file.readinto(block):
            digest.update(block[:count])
    return PREFIX + digest.hexdigest()


def hash_files(folder: Path, names: Iterable[str]) -> str:
    """One hash of files of `folder` and their names."""
    hashes = {name: hash_file(folder / name) for name in names}
    return hash_bytes(json.dumps(hashes, sort_keys=True).encode())


class HashedFile:
    """Hash what is written to `file`, from its start on. Its owner flushes and closes it."""

    closed = False

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._digest = file, blake3()

    def write(self, data: bytes | memoryview) -> int:
        self._digest.update(data)
        return self._file.write(data)

    def flush(self) -> None: ...

    @property
    def hash(self) -> str:
        """The `hash_file` of all that was written."""
        return PREFIX + self._digest.hexdigest()


# ---- until weight files, conversion and build-shards need them no more ----


def hash_sample(path: Path) -> str:
    """Hash of the size and of 64 pieces of 256 KiB, evenly spaced, of a file."""
    size, piece, count = path.stat().st_size, 1 << 18, 64
    digest = blake3(str(size).encode())
    with open(path, "rb") as file:
        for number in range(count):
            file.seek(max(0, size - piece) * number // (count - 1))
            digest.update(file.read(piece))
    return "sampled-" + PREFIX + digest.hexdigest()


def has_hash(path: Path, recorded: str) -> bool:
    return recorded == (hash_sample(path) if recorded.startswith("sampled-") else hash_file(path))


def hash_inputs(folder: Path, names: Iterable[str], sampled: Iterable[str] = ()) -> str:
    """One hash of files of `folder`; those `sampled` are not read as a whole."""
    hashes = {
        name: hash_file(folder / name) for name in names if Path(name).name != "manifest.json"
    }
    hashes |= {name: hash_sample(folder / name) for name in sampled}
    return hash_bytes(json.dumps(hashes, sort_keys=True).encode())
