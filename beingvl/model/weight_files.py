"""Read any Hugging Face checkpoint lazily.

    weights = WeightFolder("llama/")      reads only headers; a single file, shards with an index,
                                          or pytorch_model*.bin
    weights["model.norm.weight"]          a memory-mapped tensor: rows are read when accessed

`rewrite_weights.py` writes such folders.
"""

from __future__ import annotations

import json
import math
import mmap
import pickle
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from beingvl.artefact.files import path_inside
from beingvl.artefact.manifest import is_complete, read_manifest, verify_file
from beingvl.errors import InputError
from beingvl.json_file import parse_json, read_object

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
# In transformers' order, so that we read the same files.
_LAYOUTS = (SINGLE_FILE, INDEX_FILE, "pytorch_model.bin", "pytorch_model.bin.index.json")
WEIGHT_PATTERNS = ("*.safetensors", "*.index.json", "pytorch_model*.bin")
LICENSE_PATTERNS = ("LICENSE*", "NOTICE*", "USE_POLICY*")

DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "BOOL": torch.bool},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8},
    "U8": torch.uint8,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_MIN_PICKLE_BYTES = 100  # an empty state dict takes more, in both of torch's formats
_MAX_HEADER_BYTES = 100_000_000  # the safetensors format's own limit
_AGAIN = "download it again"


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor is stored. `dtype` is safetensors' name (`BF16`); `start` is its first byte in
    `file` (-1 in a `.bin`).
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    num_bytes: int


class WeightFolder(Mapping[str, torch.Tensor]):
    """The tensors of a Hugging Face weight folder, by name, in file order; opening reads headers.
    With `wanted`, only those: files without one need not be there.

    Raises InputError for a folder without weights, a missing or truncated file, an index that does
    not match the files, and a pickle that holds more than tensors.
    """

    def __init__(
        self, folder: Path | str, wanted: Callable[[str], bool] = lambda name: True
    ) -> None:
        self.folder = Path(folder)
        self.index_file = _find_layout(self.folder)
        self.tensors: dict[str, StoredTensor] = {}
        self._maps: dict[Path, mmap.mmap] = {}
        self._pickled: dict[Path, dict[str, torch.Tensor]] = {}
        index = self.folder / self.index_file
        indexed = _read_index(index) if index.suffix == ".json" else {}
        indexed = {name: file for name, file in indexed.items() if wanted(name)}
        named = [path_inside(self.folder, name) for name in dict.fromkeys(indexed.values())]
        for path in named if index.suffix == ".json" else [index]:
            opened = self._open_file(path)
            self.tensors.update({name: value for name, value in opened.items() if wanted(name)})
        for name, file_name in indexed.items():
            if name not in self.tensors or self.tensors[name].file.name != file_name:
                raise InputError(
                    f"{index} says that {file_name} holds {name!r}, but it does not: they are not "
                    "of the same checkpoint; download them again"
                )

    def _open_file(self, path: Path) -> dict[str, StoredTensor]:
        if not path.is_file():
            raise InputError(f"{path} is missing although {self.index_file} lists it; {_AGAIN}")
        if path.suffix == ".safetensors":
            return read_header(path)
        self._pickled[path] = _load_pickle(path)
        return {
            name: StoredTensor(path, DTYPE_NAMES[value.dtype], tuple(value.shape), -1, value.nbytes)
            for name, value in self._pickled[path].items()
        }

    def __getitem__(self, name: str) -> torch.Tensor:
        """The tensor as a view of the memory map; writing to it does not change the file."""
        stored = self.tensors[name]
        if stored.start < 0:
            return self._pickled[stored.file][name]
        if stored.dtype not in DTYPES:
            raise _unknown_dtype(stored.file, name, stored.dtype)
        dtype = DTYPES[stored.dtype]
        if not stored.num_bytes:
            return torch.empty(stored.shape, dtype=dtype)
        if stored.file not in self._maps:
            # Private, so that writes cannot reach the file; unreserved, so that shards larger than
            # the memory can be mapped.
            flags = mmap.MAP_PRIVATE | getattr(mmap, "MAP_NORESERVE", 0)
            access = mmap.PROT_READ | mmap.PROT_WRITE
            with open(stored.file, "rb") as file:
                self._maps[stored.file] = mmap.mmap(file.fileno(), 0, flags=flags, prot=access)
        count, mapped = math.prod(stored.shape), self._maps[stored.file]
        return torch.frombuffer(mapped, dtype=dtype, count=count, offset=stored.start).view(
            stored.shape
        )

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.tensors[name].shape

    def dtype(self, name: str) -> torch.dtype:
        return DTYPES[self.tensors[name].dtype]

    def release(self) -> None:
        """Give back the memory of rows read so far; they are read again when accessed."""
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
        """Total bytes of all tensors."""
        return sum(stored.num_bytes for stored in self.tensors.values())


def verify_weights(
    weights: WeightFolder,
    names: Iterable[str],
    watch: Callable[[memoryview], object] = lambda block: None,
) -> None:
    """Compare weight files with the manifest beside them, if there is one; `watch` is called with
    each block of bytes.

    Raises InputError for the first file that changed after it was written.
    """
    if is_complete(weights.folder):
        manifest = read_manifest(weights.folder)
        for name in names:
            verify_file(weights.folder, name, manifest, watch)


def _find_layout(folder: Path) -> str:
    """Name of the index, or of the only weight file."""
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder; expected a Hugging Face model folder")
    config = folder / "config.json"
    if config.is_file() and (named := read_object(config, _AGAIN).get("transformers_weights")):
        raise InputError(
            f"{config} says that the weights are in {str(named)[:200]!r} (transformers_weights); "
            f"rename that file to {SINGLE_FILE} and remove the key"
        )
    for name in _LAYOUTS:
        if (folder / name).is_file():
            return name
    shard = re.compile(r"-\d{5}-of-\d{5}\.(safetensors|bin)$")
    if shards := [path.name for path in folder.iterdir() if shard.search(path.name)]:
        raise InputError(f"{folder} has shards ({min(shards)}) but no {INDEX_FILE}; {_AGAIN}")
    raise InputError(f"{folder} has no weights: expected one of {', '.join(_LAYOUTS)}")


def _read_index(path: Path) -> dict[str, str]:
    weight_map = read_object(path, _AGAIN).get("weight_map")
    if not isinstance(weight_map, dict):
        raise InputError(f"{path} is not a weight index (expected a 'weight_map'); {_AGAIN}")
    return {name: str(file_name) for name, file_name in weight_map.items()}


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Tensors of a safetensors file in byte order. They must cover the whole file."""
    file_bytes = path.stat().st_size
    with open(path, "rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        if not 2 <= header_bytes <= min(_MAX_HEADER_BYTES, file_bytes - 8):
            raise InputError(
                f"{path} is not a safetensors file or was truncated ({file_bytes} bytes); {_AGAIN}"
            )
        text = file.read(header_bytes)
    try:
        fields = parse_json(text, f"{path}: its header", _AGAIN)
        fields.pop("__metadata__", None)
        entries = sorted(
            (tuple(entry["data_offsets"]), name, entry["dtype"], tuple(entry["shape"]))
            for name, entry in fields.items()
        )
        if any(type(n) is not int for ends, _, _, shape in entries for n in (*ends, *shape)):
            raise TypeError("sizes are whole numbers")
        entries = [((start, stop), *rest) for (start, stop), *rest in entries]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{path} has a damaged safetensors header ({error}); {_AGAIN}") from error
    tensors, end = {}, 0
    for (start, stop), name, dtype, shape in entries:
        num_bytes = stop - start
        if dtype in DTYPES:
            num_bytes = math.prod(shape) * DTYPES[dtype].itemsize
        if start != end or stop < start or stop - start != num_bytes:
            raise InputError(
                f"{path}: bytes {start} … {stop} of {name!r} do not fit {dtype} {list(shape)}; "
                f"{_AGAIN}"
            )
        tensors[name] = StoredTensor(path, dtype, shape, 8 + header_bytes + start, num_bytes)
        end = stop
    if file_bytes != 8 + header_bytes + end:
        raise InputError(
            f"{path} has {file_bytes} bytes, its header says {8 + header_bytes + end}: it was "
            f"truncated; {_AGAIN}"
        )
    return tensors


def make_header(tensors: Mapping[str, tuple[str, Sequence[int], int]]) -> bytes:
    """A safetensors file's first bytes: length and JSON of the header, padded with spaces to a
    multiple of 8. `tensors`: name -> (dtype, shape, bytes), in file order.
    """
    fields: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, (dtype, shape, num_bytes) in tensors.items():
        offsets = [start, start + num_bytes]
        fields[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": offsets}
        start += num_bytes
    text = json.dumps(fields, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _load_pickle(path: Path) -> dict[str, torch.Tensor]:
    """State dict of a `.bin` file, memory-mapped if possible; no code in it is run."""
    if path.stat().st_size < _MIN_PICKLE_BYTES:
        raise InputError(f"{path} has {path.stat().st_size} bytes: it was truncated; {_AGAIN}")
    try:
        with open(path, "rb") as file:
            is_zip = file.read(4) == b"PK\x03\x04"
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError as error:
        raise InputError(
            f"{path} holds more than tensors and may run code when it is loaded; get the "
            "checkpoint as safetensors, or save its state_dict alone"
        ) from error
    except (RuntimeError, EOFError, ValueError) as error:
        raise InputError(
            f"{path} cannot be read as a PyTorch checkpoint, it may be truncated; {_AGAIN}"
        ) from error
    values = state.values() if isinstance(state, dict) else [None]
    if not all(isinstance(value, torch.Tensor) for value in values):
        raise InputError(
            f"{path} is not a plain state dict (name -> tensor); save model.state_dict() alone"
        )
    for name, tensor in state.items():
        if tensor.dtype not in DTYPE_NAMES:
            raise _unknown_dtype(path, name, tensor.dtype)
    return state


def _unknown_dtype(path: Path, name: str, dtype: object) -> InputError:
    return InputError(f"{path}: {name!r} has dtype {dtype}, expected one of {', '.join(DTYPES)}")
