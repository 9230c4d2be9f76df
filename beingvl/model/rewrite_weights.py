"""Copy a weight folder, tensor by tensor, with some tensors changed.

A file without changed tensors is hard-linked (or copied whole). The others are streamed into a new
file, so memory holds one changed tensor and a copy buffer, whatever the checkpoint's size:

    source   A: embed, layer 0     B: layer 1, layer 2     C: layer 3, lm_head
    replace  embed                                         lm_head
    target   A: written            B: link to source's B   C: written              + index

A file gets its name only when it is complete. `.bin` files become safetensors. Nothing here knows
about vocabularies or training: conversion, export and the end of a stage all call this function.
"""

from __future__ import annotations

import io
import math
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from blake3 import blake3

from beingvl.artefact.files import to_json, write_atomically
from beingvl.artefact.hashes import PREFIX, hash_bytes, hash_file
from beingvl.artefact.manifest import is_complete, read_manifest
from beingvl.artefact.progress import progress as show_progress
from beingvl.errors import InputError
from beingvl.model.weight_files import (
    DTYPE_NAMES,
    INDEX_FILE,
    SINGLE_FILE,
    WEIGHT_PATTERNS,
    StoredTensor,
    WeightFolder,
    make_header,
    verify_weights,
)

# Larger blocks do not fit the processor's caches: with 16 MB, writing took six times as long.
_COPY_BYTES = 1 << 20


@dataclass(frozen=True)
class NewTensor:
    """A tensor to write. `make` is called once, when its bytes are needed, and returns the tensor
    or blocks of it in row order.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], torch.Tensor | Iterable[torch.Tensor]]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


Replacements = Mapping[str, NewTensor | Callable[[], torch.Tensor]]
"""Tensor name -> new tensor. A plain callable keeps the source tensor's shape and dtype; a
NewTensor may have a new name (it goes into the last file).
"""


def rewrite_weights(
    source: Path | str | WeightFolder,
    target: Path | str,
    replace: Replacements,
    link: bool = True,
    drop: Collection[str] = (),
) -> dict[str, str]:
    """Write `source`'s weights into the folder `target` with some tensors replaced, added or
    dropped; each replacement is called once, in file order.

    `link` hard-links unchanged files if the file system can. Other weight files in `target` are
    removed: a single file left there would be loaded instead of the index.

    Returns {file name: hash} of all weight files, for `write_manifest(known_hashes=…)`. Raises
    InputError, before anything is written, if `target` is `source`, or for an unknown name.
    """
    weights = source if isinstance(source, WeightFolder) else WeightFolder(source)
    target = Path(target)
    if target.resolve() == weights.folder.resolve():
        raise InputError(f"{target} is both source and target; give another folder to write in")
    plans = _plan_files(weights, replace, drop)
    target.mkdir(parents=True, exist_ok=True)
    names = {*(plan.name for plan in plans), *([INDEX_FILE] if len(plans) > 1 else [])}
    for pattern in WEIGHT_PATTERNS:
        for path in target.glob(pattern):
            if path.name not in names:
                path.unlink()

    total = sum(plan.num_bytes for plan in plans)
    with (
        show_progress(total=total, unit="B", name="weights") as progress,
        ThreadPoolExecutor(2) as pool,
    ):

        def write(plan: _FilePlan) -> str:
            return _write_file(plan, target, link, progress.update)

        # Unchanged files are linked, copied and hashed in parallel with the others.
        background = {plan.name: pool.submit(write, plan) for plan in plans if plan.unchanged}
        hashes = {plan.name: write(plan) for plan in plans if not plan.unchanged}
        hashes |= {name: written.result() for name, written in background.items()}
    if len(plans) > 1:
        num_bytes = sum(tensor.num_bytes for plan in plans for tensor in plan.tensors.values())
        weight_map = dict(sorted((name, plan.name) for plan in plans for name in plan.tensors))
        index = to_json({"metadata": {"total_size": num_bytes}, "weight_map": weight_map})
        write_atomically(target / INDEX_FILE, index)
        hashes[INDEX_FILE] = hash_bytes(index.encode())
    return hashes


def bytes_to_write(
    weights: WeightFolder,
    target: Path,
    replace: Replacements,
    link: bool = True,
    drop: Collection[str] = (),
) -> int:
    """Bytes that `rewrite_weights` with these arguments writes to `target`'s disk."""
    disk = _existing_parent(target).stat().st_dev
    plans = _plan_files(weights, replace, drop)
    return sum(
        plan.num_bytes
        for plan in plans
        if not (link and plan.unchanged and plan.unchanged.stat().st_dev == disk)
    )


def check_disk_space(folder: Path, num_bytes: int) -> None:
    """Raises InputError if the file system of `folder` has less than `num_bytes` free."""
    free = shutil.disk_usage(_existing_parent(folder)).free
    if num_bytes > free:
        raise InputError(
            f"{folder}: {_readable(num_bytes)} are to be written, but the disk has "
            f"{_readable(free)} free; make room or choose a target on a different disk"
        )


def _readable(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:,.1f} GB" if num_bytes >= 10e9 else f"{num_bytes / 1e6:,.1f} MB"


def _existing_parent(folder: Path) -> Path:
    return next(path for path in [folder, *folder.absolute().parents] if path.exists())


# ---- planning ----


@dataclass(frozen=True)
class _FilePlan:
    """One target file: its tensors in byte order. `unchanged` is the source file that it equals, if
    any.
    """

    name: str
    tensors: dict[str, StoredTensor | NewTensor]
    unchanged: Path | None
    weights: WeightFolder

    @property
    def header(self) -> bytes:
        return make_header(
            {
                name: (
                    tensor.dtype if isinstance(tensor, StoredTensor) else DTYPE_NAMES[tensor.dtype],
                    tensor.shape,
                    tensor.num_bytes,
                )
                for name, tensor in self.tensors.items()
            }
        )

    @property
    def num_bytes(self) -> int:
        if self.unchanged:
            return self.unchanged.stat().st_size
        return len(self.header) + sum(tensor.num_bytes for tensor in self.tensors.values())


def _plan_files(
    weights: WeightFolder, replace: Replacements, drop: Collection[str]
) -> list[_FilePlan]:
    unknown = [name for name in replace if name not in weights]
    for name in drop:
        if name not in weights:
            raise InputError(f"{weights.folder} has no tensor {name!r} to drop")
    files = {}
    for file_name, names in weights.files.items():
        if kept := [name for name in names if name not in drop]:
            files[file_name] = kept
    last = list(weights.files)[-1]
    for name in unknown:
        if not isinstance(replace[name], NewTensor):
            raise InputError(f"{weights.folder} has no tensor {name!r} to replace")
        files.setdefault(last, []).append(name)

    plans = []
    for file_name, names in files.items():
        source = weights.folder / file_name
        is_same = names == weights.files[file_name] and not any(name in replace for name in names)
        unchanged = source.resolve() if is_same and source.suffix == ".safetensors" else None
        tensors = {name: _planned_tensor(weights, name, replace.get(name)) for name in names}
        if not unchanged:
            # Wide dtypes first, like safetensors itself, so that every tensor is aligned.
            tensors = dict(sorted(tensors.items(), key=lambda item: -_itemsize(item[1])))
        target_name = SINGLE_FILE
        if len(files) > 1:
            stem = re.sub(r"^pytorch_model-", "model-", source.stem)
            target_name = f"{stem}.safetensors"
        plans.append(_FilePlan(target_name, tensors, unchanged, weights))
    return plans


def _planned_tensor(
    weights: WeightFolder, name: str, value: NewTensor | Callable[[], torch.Tensor] | None
) -> StoredTensor | NewTensor:
    if value is None and weights.tensors[name].start >= 0:
        return weights.tensors[name]
    if isinstance(value, NewTensor):
        return value
    make = value or (lambda: weights[name])
    return NewTensor(weights.shape(name), weights.dtype(name), make)


def _itemsize(tensor: StoredTensor | NewTensor) -> int:
    return tensor.num_bytes // max(1, math.prod(tensor.shape))


# ---- writing ----


def _write_file(plan: _FilePlan, target: Path, link: bool, report: Callable[[int], Any]) -> str:
    """Write or link one file; returns its hash."""
    path = target / plan.name
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        if plan.unchanged and link and _try_link(plan.unchanged, temporary):
            os.replace(temporary, path)
            report(plan.num_bytes)
            return _hash_of_source(plan.weights.folder, path)
        stored = plan.weights.tensors
        read = {stored[tensor].file.name for tensor in plan.tensors if tensor in stored}
        verify_weights(plan.weights, read)
        with open(temporary, "wb", buffering=0) as file, ThreadPoolExecutor(1) as pool:
            output = _HashedOutput(file, pool, report)
            if plan.unchanged:
                output.copy(plan.unchanged, 0, plan.num_bytes)
            else:
                _stream_tensors(plan, output)
            digest = output.finish()
        os.replace(temporary, path)
        return digest
    finally:
        temporary.unlink(missing_ok=True)


def _try_link(source: Path, path: Path) -> bool:
    """Hard-link `source` as `path`; False if the file systems cannot."""
    try:
        os.link(source, path)
    except OSError:
        return False
    return True


def _hash_of_source(folder: Path, path: Path) -> str:
    """The hash of a linked file, from the source folder's manifest, else computed."""
    listed = read_manifest(folder).files.get(path.name) if is_complete(folder) else None
    if listed and listed["bytes"] == path.stat().st_size:
        return str(listed["hash"])
    return hash_file(path)


class _HashedOutput:
    """Writes blocks to a file while a second thread hashes them, so that hashing takes no extra
    time.

    Hashing of a block may go on after `write` returns, until the next `write` or `finish` returns.
    """

    def __init__(
        self, file: io.FileIO, pool: ThreadPoolExecutor, report: Callable[[int], Any]
    ) -> None:
        self.file, self.pool, self.report = file, pool, report
        self._digest = blake3()
        self._pending: Future[Any] = pool.submit(lambda: None)
        self._buffers = [memoryview(bytearray(_COPY_BYTES)) for _ in range(2)]

    def write(self, block: bytes | memoryview) -> None:
        self._pending.result()
        self._pending = self.pool.submit(self._digest.update, block)
        written = 0
        while written < len(block):
            written += self.file.write(block[written:])
        self.report(len(block))

    def copy(self, path: Path, start: int, num_bytes: int) -> None:
        """Copy a range of a different file: one buffer is filled while the other is hashed."""
        with open(path, "rb", buffering=0) as file:
            file.seek(start)
            while num_bytes:
                self._buffers.reverse()
                count = file.readinto(self._buffers[0][:num_bytes])
                if not count:
                    raise InputError(f"{path} became shorter while it was read; download it again")
                self.write(self._buffers[0][:count])
                num_bytes -= count

    def finish(self) -> str:
        """Flush to the disk; returns the hash of all blocks."""
        self._pending.result()
        os.fsync(self.file.fileno())
        return PREFIX + self._digest.hexdigest()


def _stream_tensors(plan: _FilePlan, output: _HashedOutput) -> None:
    output.write(plan.header)
    for name, tensor in plan.tensors.items():
        if isinstance(tensor, StoredTensor):
            output.copy(tensor.file, tensor.start, tensor.num_bytes)
            continue
        made = tensor.make()
        written = 0
        for block in [made] if isinstance(made, torch.Tensor) else made:
            assert block.dtype == tensor.dtype, f"{name}: made {block.dtype}, not {tensor.dtype}"
            assert block.shape[1:] == tensor.shape[1:], (name, block.shape, tensor.shape)
            flat = block.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            data = memoryview(flat.numpy())
            for first in range(0, len(data), _COPY_BYTES):
                output.write(data[first : first + _COPY_BYTES])
            written += len(data)
        assert written == tensor.num_bytes, f"{name}: made {written} bytes, not {tensor.num_bytes}"
        plan.weights.release()
