"""One hash for everything: BLAKE3, the 32 bytes that `b3sum` prints, multi-threaded."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from multiprocessing import parent_process
from pathlib import Path
from typing import BinaryIO

from blake3 import blake3

from beingvl.artefact.progress import progress

PREFIX = "blake3:"
BLOCK_BYTES = 1 << 20  # fits into a cache; larger blocks were slower
SHOWN_BYTES = 1 << 28  # smaller files need no progress bar


def hash_bytes(data: bytes) -> str:
    return PREFIX + blake3(data).hexdigest()


def hash_file(path: Path, watch: Callable[[memoryview], object] = lambda block: None) -> str:
    """Hash of a file's bytes; `watch` is called with each block. The file is not mapped, so that a
    failing disk raises OSError instead of a signal.
    """
    # One thread in worker processes: forked ones would wait forever for their parent's threads.
    digest = blake3(max_threads=1 if parent_process() else blake3.AUTO)
    with open(path, "rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        block = memoryview(bytearray(min(max(size, 1), BLOCK_BYTES)))
        bar = None
        if size > SHOWN_BYTES:
            bar = progress(name=f"hash {path.name}", unit="B", total=size, leave=False)
        with bar or nullcontext():
            while count := file.readinto(block):
                digest.update(block[:count])
                watch(block[:count])
                if bar is not None:
                    bar.update(count)
    return PREFIX + digest.hexdigest()


def hash_files(folder: Path, names: Iterable[str]) -> str:
    """One hash of files in `folder` and their names."""
    hashes = {name: hash_file(folder / name) for name in names}
    return hash_bytes(json.dumps(hashes, sort_keys=True).encode())


class HashedFile:
    """Writes to `file`, from its start on, and hashes it. The caller flushes and closes `file`."""

    closed = False

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._digest = file, blake3()

    def write(self, data: bytes | memoryview) -> int:
        self._digest.update(data)
        return self._file.write(data)

    def flush(self) -> None: ...

    @property
    def hash(self) -> str:
        """What `hash_file` returns for everything written so far."""
        return PREFIX + self._digest.hexdigest()
