"""Read Arrow token shards: a folder of them (shard_writer.py) is one list of samples.

Opening a folder reads the manifest and compares the three index files with it; planning reads only
these. Shards are memory-mapped, and a sample is two views into its shard's map.
"""

from __future__ import annotations

import contextlib
import mmap
import resource
from bisect import bisect_right
from collections.abc import Iterator
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from beingvl.artefact.manifest import read_manifest, verify_small_files
from beingvl.data.made_with import IMAGE_POSITIONS
from beingvl.data.positions import PositionIds, vbpe_inside
from beingvl.data.shard_columns import Sample, largest_id, map_batch
from beingvl.data.shard_writer import LENGTHS_FILE, MEMBERS_FILE, SOURCE_OF_FILE
from beingvl.errors import InputError
from beingvl.images.vq_codes import load_mapped
from beingvl.vocab import VocabLayout

READS_BETWEEN_CHECKS = 16
OTHER_FILES = 1000  # that the process may have open besides the shards


class _Shard:
    """One memory-mapped shard. Offsets and values are numpy views into the map."""

    def __init__(self, path: Path) -> None:
        self._map, batch = map_batch(path)
        _without_huge_pages(self._map)
        self.num_rows = batch.num_rows
        self._text = {name: _text_views(batch.column(name)) for name in ("id", "image")}
        self._lists = {
            name: (batch.column(name).offsets.to_numpy(), batch.column(name).values.to_numpy())
            for name in ("input_ids", "target_spans")
        }

    def text(self, column: str, row: int) -> str:
        starts, data = self._text[column]
        return data[starts[row] : starts[row + 1]].tobytes().decode() if data is not None else ""

    def list(self, column: str, row: int) -> np.ndarray:
        starts, values = self._lists[column]
        return values[starts[row] : starts[row + 1]]

    @property
    def all_ids(self) -> np.ndarray:
        return self._lists["input_ids"][1]

    def give_back_pages(self) -> None:
        """Views stay valid: the kernel maps a page again when it is next read."""
        self._map.madvise(mmap.MADV_DONTNEED)


def _text_views(column: pa.StringArray) -> tuple[np.ndarray, np.ndarray | None]:
    _, starts, data = column.buffers()
    text = np.frombuffer(data, np.uint8) if data is not None and data.size else None
    return np.frombuffer(starts, np.int32), text


class ShardReader:
    """All samples of a finished shard folder, memory-mapped.

    `lengths` is [num_samples] int32 (tokens), `source_of` [num_samples] uint8 (index into
    `sources`); both are memory-mapped. A shard is opened on its first read. Pages that were read
    stay mapped and count as this process's memory. They are given back once more than
    `bytes_mapped_at_most` were mapped since the last time. We measure that number, because the
    kernel maps more than we read: 64 KiB around each of the eight places of a sample. `positions`
    computes the position ids of a sample's tokens; anchors need the vBPE in the folder `model`.
    """

    def __init__(
        self,
        folder: Path | str,
        model: Path | None = None,
        *,
        bytes_mapped_at_most: int = 32 << 20,
    ) -> None:
        self.folder = Path(folder)
        self.manifest = read_manifest(folder, "shards")
        self.layout = VocabLayout.from_dict(
            self.manifest.details["layout"], f"{folder}/manifest.json"
        )
        try:
            sources: dict[str, dict[str, int]] = dict(self.manifest.details["sources"])
            rows: dict[str, int] = dict(self.manifest.details["rows"])
            self._source_sizes = [entry["samples"] for entry in sources.values()]
            if not all(type(n) is int and n >= 0 for n in [*rows.values(), *self._source_sizes]):
                raise TypeError("numbers of rows and samples are expected")
            if sum(self._source_sizes) != sum(rows.values()):
                raise ValueError("sources and shards have different numbers of samples")
        except (TypeError, ValueError) as error:
            raise _unfit(f"{folder}/manifest.json", f"is damaged ({error})") from error
        self.sources = list(sources)
        kind = IMAGE_POSITIONS.check(IMAGE_POSITIONS.of(self.manifest))
        self.positions = PositionIds(kind, self.layout, vbpe_inside(model))
        _allow_open_files(len(rows))
        self._names = list(rows)  # in writing order: sorted, shard-100000 precedes shard-99999
        for name in self._names:
            self._check_size(name)
        self._starts = list(accumulate(rows.values(), initial=0))
        expected = self.manifest.counts["samples"]
        if self._starts[-1] != expected:
            raise _unfit(folder, f"holds {self._starts[-1]} samples, its manifest says {expected}")
        verify_small_files(folder)
        self._index_maps: list[mmap.mmap] = []
        self.lengths = self._index(LENGTHS_FILE)
        self.source_of = self._index(SOURCE_OF_FILE)
        self._members = self._index(MEMBERS_FILE)
        self._open: dict[int, _Shard] = {}
        self._num_reads = 0
        self._mapped_before = _mapped_file_bytes()
        self._bytes_mapped_at_most = bytes_mapped_at_most

    def _check_size(self, name: str) -> None:
        path = self.folder / name
        expected = self.manifest.files[name]["bytes"]
        try:
            found = f"{path.stat().st_size} bytes"
        except FileNotFoundError:
            found = "no such file"
        if found != f"{expected} bytes":
            raise _unfit(f"{path}:", f"found {found}, the manifest says {expected} bytes")

    def _index(self, name: str) -> np.ndarray:
        path = self.folder / name
        array: Any = load_mapped(path, "build the shards again")
        if len(array) != len(self):
            raise _unfit(path, f"holds {len(array)} samples, the manifest {len(self)}")
        self._index_maps.append(array.base)
        _without_huge_pages(array.base)
        return array

    @cached_property
    def members(self) -> list[np.ndarray]:
        """Sample numbers of each source, ascending, memory-mapped, in the order of `sources`."""
        return np.split(self._members, np.cumsum(self._source_sizes, dtype=np.int64)[:-1])

    def _shard(self, number: int) -> _Shard:
        shard = self._open.get(number)
        if shard is None:
            shard = self._open[number] = _Shard(self.folder / self._names[number])
            expected = self._starts[number + 1] - self._starts[number]
            if shard.num_rows != expected:
                found = f"has {shard.num_rows} rows, the manifest says {expected}"
                raise _unfit(self.folder / self._names[number], found)
        return shard

    def all_ids(self) -> Iterator[np.ndarray]:
        """Token ids, shard by shard. Raises InputError for an id outside the vocabulary."""
        for number, name in enumerate(self._names):
            ids = self._shard(number).all_ids
            if largest_id(ids) >= self.layout.size:
                raise damaged(self.folder / name, "it holds an id outside the vocabulary")
            yield ids
            self._shard(number).give_back_pages()

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: int) -> Sample:
        """One sample. Raises InputError for values that only a damaged file can hold."""
        number = bisect_right(self._starts, index) - 1
        shard, row = self._shard(number), int(index - self._starts[number])
        ids, spans = shard.list("input_ids", row), shard.list("target_spans", row)
        if (
            len(ids) != self.lengths[index]
            or largest_id(ids) >= self.layout.size
            or largest_id(spans) > len(ids)
            or len(spans) % 2
        ):
            found = f"its row {row} has impossible ids, spans or length"
            raise damaged(self.folder / self._names[number], found)
        try:
            # This is the row's category; reading it from the shard would touch two more pages.
            source = self.sources[self.source_of[index]]
            id_, image = shard.text("id", row), shard.text("image", row)
        except (UnicodeDecodeError, IndexError) as error:
            found = f"its row {row} has an impossible text or source"
            raise damaged(self.folder / self._names[number], found) from error
        self._count_read()
        return Sample(id_, image, source, ids, spans.reshape(-1, 2))

    def _count_read(self) -> None:
        self._num_reads += 1
        if self._num_reads % READS_BETWEEN_CHECKS == 0:
            mapped = _mapped_file_bytes() - self._mapped_before
            if mapped > self._bytes_mapped_at_most:
                self.give_back_pages()

    def give_back_pages(self) -> None:
        """Unmap all pages that were read. Arrays stay valid: reading maps their pages again."""
        # All shards, because views map pages again; a copy, because other threads open shards.
        for shard in list(self._open.values()):
            shard.give_back_pages()
        for index in self._index_maps:
            index.madvise(mmap.MADV_DONTNEED)
        self._mapped_before = _mapped_file_bytes()


def _allow_open_files(count: int) -> None:
    """Python keeps a mapped file open, and many systems allow only a thousand."""
    limit, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = min(count + OTHER_FILES, most)
    if limit < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, most))


def _without_huge_pages(mapped: mmap.mmap) -> None:
    """Without this, reading 4 KB maps 2 MiB of a file that is in the page cache as huge pages."""
    with contextlib.suppress(OSError):  # a kernel without huge pages
        mapped.madvise(mmap.MADV_NOHUGEPAGE)


def _mapped_file_bytes() -> int:
    """Bytes of files, including libraries, that this process has mapped into memory now."""
    with open("/proc/self/statm", "rb") as file:
        return int(file.read().split()[2]) * mmap.PAGESIZE


def _unfit(where: Path | str, found: str) -> InputError:
    return InputError(f"{where} {found}; build the shards again")


def damaged(path: Path, found: str) -> InputError:
    return InputError(
        f"{path} is damaged: {found}; `beingvl verify {path.parent}` checks every "
        "file, then build the shards again"
    )
