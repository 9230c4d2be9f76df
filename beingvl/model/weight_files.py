"""Weight folders: read any Hugging Face checkpoint lazily, write one tensor by tensor.

    weights = WeightFolder("llama/")          headers only; single file, sharded with index, or
                                              pytorch_model*.bin
    weights["model.norm.weight"]              a tensor on the memory map: rows are read when
                                              they are touched
    rewrite_weights(source, target, replace)  a new folder that differs in some tensors

`rewrite_weights` decides per file. A shard none of whose tensors changes is hard-linked (or copied
whole); the others are streamed into a new file, so memory holds one changed tensor and a copy
buffer, whatever the size of the checkpoint:

    source   A: embed, layer 0     B: layer 1, layer 2     C: layer 3, lm_head
    replace  embed                                         lm_head
    target   A: written            B: link to source's B   C: written              + index

Every file appears under its name only when it is whole. `.bin` files always become safetensors.
Nothing here knows about vocabularies or training: the converter and the end of a training stage
call the same function.
"""

from __future__ import annotations

import io
import json
import mmap
import os
import pickle
import re
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from blake3 import blake3
from tqdm import tqdm

from beingvl.artefact.files import to_json, write_atomically
from beingvl.artefact.hashes import PREFIX, hash_file, hash_sample
from beingvl.artefact.manifest import is_complete, read_manifest
from beingvl.errors import InputError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
BIN_FILE = "pytorch_model.bin"
BIN_INDEX_FILE = "pytorch_model.bin.index.json"
_LAYOUTS = (
    SINGLE_FILE,
    INDEX_FILE,
    BIN_FILE,
    BIN_INDEX_FILE,
)  # transformers' own order: whoever loads the folder reads the same
WEIGHT_PATTERNS = ("*.safetensors", "*.index.json", "pytorch_model*.bin")

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_COPY_BYTES = (
    1 << 20
)  # larger blocks fall out of the processor caches: 16 MB took six times as long to write
_MIN_PICKLE_BYTES = 100  # an empty state dict takes more, in both of torch's formats
_MAX_HEADER_BYTES = 100_000_000  # the safetensors format's own limit


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies. `dtype` is the safetensors name (`BF16`); `start` is its first byte
    in `file` (-1 in a `.bin`).
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    num_bytes: int


@dataclass(frozen=True)
class NewTensor:
    """A tensor to write. `make` is called once, when its bytes are due, and gives the tensor, or
    blocks of it in row order.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], torch.Tensor | Iterable[torch.Tensor]]

    @property
    def num_bytes(self) -> int:
        return _num_elements(self.shape) * self.dtype.itemsize


class WeightFolder(Mapping[str, torch.Tensor]):
    """The tensors of a Hugging Face weight folder, by name, in file order; opening reads the
    headers only.

    Raises InputError for a folder without weights, a missing or truncated file, an index naming
    what is not there, and a pickle that holds more than tensors.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        self.index_file = _find_layout(self.folder)
        self.tensors: dict[str, StoredTensor] = {}
        self._maps: dict[Path, mmap.mmap] = {}
        self._pickled: dict[Path, dict[str, torch.Tensor]] = {}
        indexed = (
            _read_index(self.folder / self.index_file) if self.index_file.endswith(".json") else {}
        )
        for name in dict.fromkeys(indexed.values()) or [self.index_file]:
            self.tensors.update(self._open_file(self.folder / name))
        for name, file_name in indexed.items():
            if name not in self.tensors or self.tensors[name].file.name != file_name:
                raise InputError(
                    f"{self.folder / self.index_file} says that {file_name} holds {name!r}, "
                    "but it does not: "
                    "the index and the weight files are not from the same checkpoint; "
                    "download them again"
                )

    def _open_file(self, path: Path) -> dict[str, StoredTensor]:
        if not path.is_file():
            raise InputError(
                f"{path} is missing although {self.index_file} lists it; download the "
                "checkpoint again"
            )
        if path.suffix == ".safetensors":
            return read_header(path)
        self._pickled[path] = _load_pickle(path)
        return {
            name: StoredTensor(
                path, _DTYPE_NAMES[tensor.dtype], tuple(tensor.shape), -1, tensor.nbytes
            )
            for name, tensor in self._pickled[path].items()
        }

    def __getitem__(self, name: str) -> torch.Tensor:
        """The tensor as a view on the memory map (private: writing to it does not reach the
        file).
        """
        stored = self.tensors[name]
        if stored.start < 0:
            return self._pickled[stored.file][name]
        if stored.dtype not in _DTYPES:
            raise InputError(
                f"{stored.file}: {name!r} has dtype {stored.dtype}, which is not one of "
                f"{', '.join(_DTYPES)}"
            )
        count = _num_elements(stored.shape)
        if count == 0:
            return torch.empty(stored.shape, dtype=_DTYPES[stored.dtype])
        if stored.file not in self._maps:
            with open(stored.file, "rb") as file:
                # Private and unreserved: a write cannot reach the file, and a shard larger than the
                # memory can be mapped.
                flags = mmap.MAP_PRIVATE | getattr(mmap, "MAP_NORESERVE", 0)
                self._maps[stored.file] = mmap.mmap(
                    file.fileno(), 0, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE
                )
        flat = torch.frombuffer(
            self._maps[stored.file], dtype=_DTYPES[stored.dtype], count=count, offset=stored.start
        )
        return flat.view(stored.shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.tensors[name].shape

    def dtype(self, name: str) -> torch.dtype:
        return _DTYPES[self.tensors[name].dtype]

    def release(self) -> None:
        """Give back the memory of rows read so far; tensors stay valid and are read again when
        touched.
        """
        for mapped in self._maps.values():
            mapped.madvise(mmap.MADV_DONTNEED)

    @property
    def files(self) -> dict[str, list[str]]:
        """File name -> names of its tensors."""
        files: dict[str, list[str]] = {}
        for name, stored in self.tensors.items():
            files.setdefault(stored.file.name, []).append(name)
        return files

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors together."""
        return sum(stored.num_bytes for stored in self.tensors.values())


def rewrite_weights(
    source: Path | str | WeightFolder,
    target: Path | str,
    replace: Mapping[str, NewTensor | Callable[[], torch.Tensor]],
    link: bool = True,
    drop: Collection[str] = (),
    keep_finished: bool = False,
    hash_links: bool = False,
) -> dict[str, str]:
    """Write `source`'s weights into the folder `target` with some tensors replaced, added or
    dropped.

    A plain callable in `replace` keeps the shape and dtype of the source's tensor; a NewTensor
    states its own, and may be a name that the source does not have (it goes into the last file).
    Each is called once, in file order. `link` hard-links unchanged files where the file system can.
    `keep_finished` leaves target files of the right size alone: for finishing an interrupted run
    with the same inputs. Other weight files in `target` are removed: a single file left there would
    be loaded instead of the index. `hash_links` reads linked files for their hash; else it is the
    source manifest's, or a sample's.

    Returns {file name: hash} of every weight file, for `write_manifest(known_hashes=…)`. Raises
    InputError before anything is written when the disk is too small, when `target` is `source`, or
    for an unknown name.
    """
    weights = source if isinstance(source, WeightFolder) else WeightFolder(source)
    target = Path(target)
    if target.resolve() == weights.folder.resolve():
        raise InputError(
            f"{target} is both source and target; weights are never changed in place, give "
            "another folder"
        )
    plans = _plan_files(weights, replace, drop)
    check_disk_space(
        target, sum(plan.bytes_to_write(target, link, keep_finished) for plan in plans)
    )
    target.mkdir(parents=True, exist_ok=True)
    _remove_other_weights(target, plans)

    total = sum(plan.num_bytes for plan in plans)
    # Unchanged files need no tensor of the caller's: they are linked, copied and hashed beside the
    # others.
    with (
        tqdm(total=total, unit="B", unit_scale=True, desc="weights", disable=None) as progress,
        ThreadPoolExecutor(2) as pool,
    ):
        background = {
            plan.name: pool.submit(
                _write_file, plan, target, link, keep_finished, hash_links, progress.update
            )
            for plan in plans
            if plan.unchanged
        }
        hashes = {
            plan.name: _write_file(plan, target, link, keep_finished, hash_links, progress.update)
            for plan in plans
            if not plan.unchanged
        }
        hashes |= {name: written.result() for name, written in background.items()}
    if len(plans) > 1:
        hashes[INDEX_FILE] = _write_index(target, plans)
    return hashes


def bytes_to_write(
    weights: WeightFolder,
    target: Path,
    replace: Mapping[str, NewTensor | Callable[[], torch.Tensor]],
    link: bool = True,
    drop: Collection[str] = (),
) -> int:
    """Bytes that `rewrite_weights` with these arguments puts on the disk of `target`."""
    return sum(
        plan.bytes_to_write(target, link, keep_finished=False)
        for plan in _plan_files(weights, replace, drop)
    )


def check_disk_space(folder: Path, num_bytes: int) -> None:
    """Raises InputError when the file system of `folder` has less than `num_bytes` free."""
    free = shutil.disk_usage(_existing_parent(folder)).free
    if num_bytes > free:
        raise InputError(
            f"{folder}: {_readable(num_bytes)} are to be written, but the disk has "
            f"{_readable(free)} free; "
            f"make room or choose a target on another disk"
        )


def _readable(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:,.1f} GB" if num_bytes >= 10e9 else f"{num_bytes / 1e6:,.1f} MB"


# ---- reading ----


def _find_layout(folder: Path) -> str:
    """Name of the index, or of the only weight file. A single file stands before an index,
    safetensors before pickles.
    """
    if not folder.is_dir():
        raise InputError(
            f"{folder} is not a folder; expected a Hugging Face model folder with weights"
        )
    for name in _LAYOUTS:
        if (folder / name).is_file():
            return name
    shards = [
        path.name
        for path in folder.iterdir()
        if re.search(r"-\d{5}-of-\d{5}\.(safetensors|bin)$", path.name)
    ]
    if shards:
        raise InputError(
            f"{folder} has shards ({min(shards)}) but no {INDEX_FILE}; download the "
            "checkpoint again"
        )
    raise InputError(f"{folder} has no weights: expected one of {', '.join(_LAYOUTS)}")


def _read_index(path: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(path.read_text())["weight_map"]
        return {str(name): str(file_name) for name, file_name in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{path} is not a weight index (expected JSON with a 'weight_map'); download it again"
        ) from error


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Tensors of a safetensors file in the order of their bytes. Raises InputError unless header
    and file size agree.
    """
    file_bytes = path.stat().st_size
    with open(path, "rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        if not 2 <= header_bytes <= min(_MAX_HEADER_BYTES, file_bytes - 8):
            raise InputError(
                f"{path} is not a safetensors file or was cut off ({file_bytes} bytes); "
                "download it again"
            )
        text = file.read(header_bytes)
    try:
        fields = json.loads(text)
        fields.pop("__metadata__", None)
        entries = sorted(
            (entry["data_offsets"], name, entry["dtype"], tuple(entry["shape"]))
            for name, entry in fields.items()
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{path} has a damaged safetensors header ({error}); download it again"
        ) from error
    tensors = {}
    end = 0
    for (start, stop), name, dtype, shape in entries:
        itemsize = _DTYPES[dtype].itemsize if dtype in _DTYPES else None
        if (
            start != end
            or stop < start
            or (itemsize and stop - start != _num_elements(shape) * itemsize)
        ):
            raise InputError(
                f"{path}: bytes {start} … {stop} of {name!r} do not fit {dtype} {list(shape)}; "
                "download it again"
            )
        tensors[name] = StoredTensor(path, dtype, shape, 8 + header_bytes + start, stop - start)
        end = stop
    if file_bytes != 8 + header_bytes + end:
        raise InputError(
            f"{path} has {file_bytes} bytes, its header says {8 + header_bytes + end}: it "
            "was cut off; download it again"
        )
    return tensors


def make_header(tensors: Mapping[str, tuple[str, Sequence[int], int]]) -> bytes:
    """A safetensors file's first bytes, for name -> (dtype, shape, bytes) in the order of what
    follows.

    Length and JSON of the header, padded with spaces to a multiple of 8.
    """
    fields: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, (dtype, shape, num_bytes) in tensors.items():
        fields[name] = {
            "dtype": dtype,
            "shape": list(shape),
            "data_offsets": [start, start + num_bytes],
        }
        start += num_bytes
    text = json.dumps(fields, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _load_pickle(path: Path) -> dict[str, torch.Tensor]:
    """State dict of a `.bin` file: memory-mapped when it is the zip format, and never executing
    what is in it.
    """
    if path.stat().st_size < _MIN_PICKLE_BYTES:
        raise InputError(
            f"{path} has {path.stat().st_size} bytes: it was cut off; download it again"
        )
    try:
        with open(path, "rb") as file:
            is_zip = file.read(4) == b"PK\x03\x04"
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError as error:
        raise InputError(
            f"{path} holds more than tensors and may run code when it is loaded, so it is refused; "
            f"get the checkpoint as safetensors, or save its state_dict alone"
        ) from error
    except (RuntimeError, EOFError, ValueError) as error:
        raise InputError(
            f"{path} cannot be read as a PyTorch checkpoint, it may be cut off; download it again"
        ) from error
    if not isinstance(state, dict) or not all(
        isinstance(value, torch.Tensor) for value in state.values()
    ):
        raise InputError(
            f"{path} does not hold a plain state dict (name -> tensor); save "
            "model.state_dict() alone"
        )
    for name, tensor in state.items():
        if tensor.dtype not in _DTYPE_NAMES:
            raise InputError(
                f"{path}: {name!r} has dtype {tensor.dtype}, which is not one of "
                f"{', '.join(_DTYPES)}"
            )
    return state


# ---- writing ----


@dataclass(frozen=True)
class _FilePlan:
    """One target file: what each of its tensors is, in byte order. `unchanged` is the source
    file it equals, if any.
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
                    tensor.dtype
                    if isinstance(tensor, StoredTensor)
                    else _DTYPE_NAMES[tensor.dtype],
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

    def is_finished(self, target: Path) -> bool:
        path = target / self.name
        return path.is_file() and path.stat().st_size == self.num_bytes

    def bytes_to_write(self, target: Path, link: bool, keep_finished: bool) -> int:
        if keep_finished and self.is_finished(target):
            return 0
        if (
            self.unchanged
            and link
            and self.unchanged.stat().st_dev == _existing_parent(target).stat().st_dev
        ):
            return 0
        return self.num_bytes


def _plan_files(
    weights: WeightFolder,
    replace: Mapping[str, NewTensor | Callable[[], torch.Tensor]],
    drop: Collection[str],
) -> list[_FilePlan]:
    files = {name: list(tensors) for name, tensors in weights.files.items()}
    last = list(files)[-1]
    for name, value in replace.items():
        if name not in weights:
            if not isinstance(value, NewTensor):
                raise InputError(f"{weights.folder} has no tensor {name!r} to replace")
            files[last].append(name)
    if missing := [name for name in drop if name not in weights]:
        raise InputError(f"{weights.folder} has no tensor {missing[0]!r} to drop")
    files = {
        name: kept for name, names in files.items() if (kept := [n for n in names if n not in drop])
    }

    plans = []
    for source_name, names in files.items():
        stored_in = weights.folder / source_name
        changed = any(name in replace for name in names) or len(names) != len(
            weights.files[source_name]
        )
        unchanged = None if changed or stored_in.suffix != ".safetensors" else stored_in.resolve()
        tensors = {name: _planned_tensor(weights, name, replace.get(name)) for name in names}
        if (
            not unchanged
        ):  # wide dtypes first keeps every tensor aligned, as safetensors itself writes them
            tensors = dict(sorted(tensors.items(), key=lambda item: -_itemsize(item[1])))
        plans.append(_FilePlan(_target_name(source_name, len(files)), tensors, unchanged, weights))
    return plans


def _planned_tensor(
    weights: WeightFolder, name: str, value: NewTensor | Callable[[], torch.Tensor] | None
) -> StoredTensor | NewTensor:
    if value is None:
        return weights.tensors[name]
    return (
        value
        if isinstance(value, NewTensor)
        else NewTensor(weights.shape(name), weights.dtype(name), value)
    )


def _target_name(source_name: str, num_files: int) -> str:
    if num_files == 1:
        return SINGLE_FILE
    stem, _ = os.path.splitext(source_name)
    return re.sub(r"^pytorch_model-", "model-", stem) + ".safetensors"


def _write_file(
    plan: _FilePlan,
    target: Path,
    link: bool,
    keep_finished: bool,
    hash_links: bool,
    report: Callable[[int], Any],
) -> str:
    path = target / plan.name
    hash_linked = hash_file if hash_links else partial(_hash_without_reading, plan.weights.folder)
    if keep_finished and plan.is_finished(target):
        report(plan.num_bytes)
        is_link = plan.unchanged and plan.unchanged.samefile(path)
        return hash_linked(path) if is_link else hash_file(path)
    if plan.unchanged and link and _try_link(plan.unchanged, path):
        report(plan.num_bytes)
        return hash_linked(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
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
    """Hard-link `source` as `path`; False where that is not possible (another disk, a file
    system without links).
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        os.link(source, temporary)
        os.replace(temporary, path)
        return True
    except OSError:
        return False
    finally:
        temporary.unlink(missing_ok=True)


def _hash_without_reading(folder: Path, path: Path) -> str:
    """The hash that the folder's manifest lists for a weight file, else that of a sample of it."""
    listed = read_manifest(folder).files.get(path.name) if is_complete(folder) else None
    return (
        str(listed["hash"])
        if listed and listed["bytes"] == path.stat().st_size
        else hash_sample(path)
    )


class _HashedOutput:
    """Writes blocks to a file while a second thread hashes them, so that the hash costs no time
    of its own.

    The hash of a block may still run when `write` returns; it is done when the next `write` or
    `finish` returns.
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
        """Copy a byte range of another file; of the two buffers one is read into while the other
        is hashed.
        """
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
        if isinstance(tensor, StoredTensor) and tensor.start >= 0:
            output.copy(tensor.file, tensor.start, tensor.num_bytes)
            continue
        new = (
            tensor
            if isinstance(tensor, NewTensor)
            else NewTensor(tensor.shape, _DTYPES[tensor.dtype], _getter(plan, name))
        )
        value = new.make()
        written = 0
        for block in [value] if isinstance(value, torch.Tensor) else value:
            assert block.dtype == new.dtype, f"{name}: made {block.dtype}, announced {new.dtype}"
            assert not isinstance(value, torch.Tensor) or tuple(block.shape) == new.shape, (
                name,
                block.shape,
                new.shape,
            )
            data = memoryview(
                block.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
            )
            for first in range(0, len(data), _COPY_BYTES):
                output.write(data[first : first + _COPY_BYTES])
            written += len(data)
        assert written == new.num_bytes, f"{name}: made {written} bytes, announced {new.num_bytes}"
        plan.weights.release()


def _getter(plan: _FilePlan, name: str) -> Callable[[], torch.Tensor]:
    return lambda: plan.weights[name]


def _remove_other_weights(target: Path, plans: list[_FilePlan]) -> None:
    """Files that a loader could take for this model's weights, but that are not about to be
    written.
    """
    names = {*(plan.name for plan in plans), *([INDEX_FILE] if len(plans) > 1 else [])}
    for path in [path for pattern in WEIGHT_PATTERNS for path in target.glob(pattern)]:
        if path.name not in names:
            path.unlink(missing_ok=True)


def _write_index(target: Path, plans: list[_FilePlan]) -> str:
    """Write the shard index; returns its hash."""
    total = sum(tensor.num_bytes for plan in plans for tensor in plan.tensors.values())
    weight_map = {name: plan.name for plan in plans for name in plan.tensors}
    text = to_json(
        {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    )
    write_atomically(target / INDEX_FILE, text)
    return hash_file(target / INDEX_FILE)


def _existing_parent(folder: Path) -> Path:
    return next(path for path in [folder, *folder.absolute().parents] if path.exists())


def _itemsize(tensor: StoredTensor | NewTensor) -> int:
    if isinstance(tensor, NewTensor):
        return tensor.dtype.itemsize
    return tensor.num_bytes // max(1, _num_elements(tensor.shape))


def _num_elements(shape: Iterable[int]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
