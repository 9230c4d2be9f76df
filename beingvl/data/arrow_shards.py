"""Arrow token shards: samples on disk, read through the memory map without a copy.

    shards/shard-00000.arrow …    one record batch each: id, image, category, input_ids,
                                  target_spans
    shards/lengths.npy            [num_samples] int32, tokens of every sample
    shards/source_of.npy          [num_samples] uint8, index into the manifest's sources
    shards/members.npy            [num_samples] uint32, sample numbers grouped by source,
                                  ascending in each
    shards/manifest.json          counts, vocabulary layout, sources, rows of every shard,
                                  lineage; written last

`write_shard` writes a batch of rows, `finish_shards` the rest; `ShardReader` presents a folder as
one list of samples. Opening it reads the manifest and no sample: planning needs the three small
files only, all memory-mapped.
"""

from __future__ import annotations

import contextlib
import mmap
import os
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from beingvl.artefact.hashes import HashedFile
from beingvl.artefact.manifest import Manifest, read_manifest, start_folder, write_manifest
from beingvl.errors import InputError
from beingvl.images.vq_codes import load_mapped
from beingvl.vocab import VocabLayout

SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("image", pa.string()),
        ("category", pa.string()),
        ("input_ids", pa.list_(pa.int32())),
        ("target_spans", pa.list_(pa.int32())),  # start, end, start, end, …; end exclusive
    ]
)
HEAD_BYTES = 1 << 20
ROWS_PER_SHARD = 65_536
MAX_SOURCES = 256
LENGTHS_FILE, SOURCE_OF_FILE, MEMBERS_FILE = "lengths.npy", "source_of.npy", "members.npy"
READS_BETWEEN_CHECKS = 16


@dataclass(frozen=True)
class Sample:
    """One sample. `input_ids` [length] int32 and `target_spans` [num_spans, 2] int32 are views
    into the memory map.
    """

    id: str
    image: str
    category: str
    input_ids: np.ndarray
    target_spans: np.ndarray


# ---- writing ----


@dataclass
class ShardColumns:
    """The rows of one shard by column, laid end to end: row n holds
    `ids[id_starts[n]:id_starts[n + 1]]`, and so its spans.

    ids, spans: int32; id_starts, span_starts: `[num_rows + 1]` integers. Spans are flat: start,
    end, start, end, …
    """

    id: pa.StringArray
    image: pa.StringArray
    category: pa.StringArray
    ids: np.ndarray
    id_starts: np.ndarray
    spans: np.ndarray
    span_starts: np.ndarray

    def __len__(self) -> int:
        return len(self.id)

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.id_starts)

    @classmethod
    def of_samples(cls, samples: Sequence[Sample]) -> ShardColumns:
        ids, id_starts = _laid_out([sample.input_ids for sample in samples])
        spans, span_starts = _laid_out([sample.target_spans.ravel() for sample in samples])
        texts = [
            pa.array([getattr(sample, name) for sample in samples], pa.string())
            for name in ("id", "image", "category")
        ]
        return cls(texts[0], texts[1], texts[2], ids, id_starts, spans, span_starts)

    @classmethod
    def of_batch(cls, batch: pa.RecordBatch) -> ShardColumns:
        id_, image, category, ids, spans = (batch.column(name) for name in SCHEMA.names)
        lists = [
            array.to_numpy() for array in (ids.values, ids.offsets, spans.values, spans.offsets)
        ]
        return cls(id_, image, category, lists[0], lists[1], lists[2], lists[3])


def _laid_out(arrays: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Rows end to end, and where each starts `[n + 1]`."""
    starts = np.cumsum([0, *map(len, arrays)], dtype=np.int64)
    return np.concatenate([np.empty(0, np.int32), *arrays]), starts


def write_shard(path: Path, rows: ShardColumns, layout: VocabLayout) -> dict[str, Any]:
    """Check and write one shard, which `sync_shard` brings to the disk; returns what
    `finish_shards` wants to know about it.

    Raises InputError for a row without tokens, ids outside the vocabulary or spans outside the row.
    """
    largest_id = check_columns(rows, layout)
    columns = [rows.id, rows.image, rows.category]
    for values, starts in ((rows.ids, rows.id_starts), (rows.spans, rows.span_starts)):
        offsets = pa.array(starts.astype(np.int32))
        columns.append(
            pa.ListArray.from_arrays(offsets, pa.array(values.astype(np.int32, copy=False)))
        )
    with open(path, "wb") as file:
        hashed = HashedFile(file)
        with pa.ipc.new_file(pa.PythonFile(hashed, "w"), SCHEMA) as writer:
            writer.write_batch(pa.RecordBatch.from_arrays(columns, schema=SCHEMA))
    return {"hash": hashed.hash, "largest_id": largest_id, **_summary(rows)}


def sync_shard(path: Path) -> None:
    """Wait until a shard is on the disk. The next one takes its pages in memory, instead of new
    ones that push what is still to be read out of the page cache; offsets and sources, which
    come first in it, are read again for the index.
    """
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), HEAD_BYTES, 0, os.POSIX_FADV_DONTNEED)


def check_columns(rows: ShardColumns, layout: VocabLayout) -> int:
    """The largest id. Raises InputError that names the first sample without tokens, or ids or
    spans that are outside.
    """
    largest_id = _check_ids(rows, layout)
    _check_spans(rows)
    return largest_id


def _check_ids(rows: ShardColumns, layout: VocabLayout) -> int:
    ids, starts = rows.ids, rows.id_starts
    if len(ids) >= 2**31:
        raise InputError(
            f"a shard would hold {len(ids)} tokens, more than 2^31; write fewer rows a shard"
        )
    empty = np.flatnonzero(rows.lengths == 0)
    if len(empty):
        raise InputError(f"sample {rows.id[empty[0]].as_py()!r} has no tokens")
    largest = int(ids.view(np.uint32).max())  # a negative id is a large one
    if largest >= layout.size:
        at = int(np.argmax((ids < 0) | (ids >= layout.size)))
        row = int(np.searchsorted(starts, at, side="right")) - 1
        raise InputError(
            f"sample {rows.id[row].as_py()!r} has id {ids[at]}, the vocabulary ends at "
            f"{layout.size - 1}"
        )
    return largest


def _check_spans(rows: ShardColumns) -> None:
    """Ascending, inside 1 … length: a row's first token has nothing before it that could predict
    it.
    """
    spans, starts, lengths = rows.spans, rows.span_starts, rows.lengths
    count = np.diff(starts)
    row_of = np.repeat(np.arange(len(rows)), count)
    bad = (spans < 1) | (spans > lengths[row_of])
    bad[1:] |= (np.diff(spans) < 0) & (row_of[1:] == row_of[:-1])
    bad |= (count % 2 == 1)[row_of]
    if bad.any():
        row = int(row_of[np.argmax(bad)])
        found = (
            f"sample {rows.id[row].as_py()!r} has target_spans "
            f"{spans[starts[row] : starts[row + 1]].tolist()}"
        )
        raise InputError(f"{found} outside its tokens 1 … {lengths[row]} or overlapping")


def _summary(rows: ShardColumns) -> dict[str, Any]:
    encoded = rows.category.dictionary_encode()
    numbers, names = encoded.indices.to_numpy(), encoded.dictionary.to_pylist()
    samples, tokens = np.bincount(numbers), np.bincount(numbers, weights=rows.lengths)
    return {
        "samples": len(rows),
        "tokens": len(rows.ids),
        "target_tokens": int((rows.spans[1::2] - rows.spans[::2]).sum(dtype=np.int64)),
        "longest_sample_tokens": int(rows.lengths.max()),
        "sources": {
            name: [int(samples[at]), int(tokens[at])]
            for at, name in sorted(enumerate(names), key=lambda pair: pair[1])
        },
    }


def finish_shards(
    folder: Path,
    shards: Mapping[str, Mapping[str, Any]],
    layout: VocabLayout,
    lineage: Mapping[str, str],
    details: Mapping,
) -> Manifest:
    """Write the index files and the manifest of shards (file name -> what `write_shard`
    returned), which lie in `folder`.
    """
    if not shards:
        raise InputError(
            f"{folder}: no sample to write; every input is empty, or every row was rejected"
        )
    counts, sources = _totals(list(shards.values()))
    if len(sources) > MAX_SOURCES:
        raise InputError(
            f"{folder}: the samples name {len(sources)} sources, at most {MAX_SOURCES} are "
            "possible; is `category` an id?"
        )
    _write_index(folder, list(shards), list(sources))
    details = {
        **details,
        "layout": layout.to_dict(),
        "sources": sources,
        "rows": {name: shard["samples"] for name, shard in shards.items()},
    }
    hashes = {name: shard["hash"] for name, shard in shards.items()}
    own = {
        *shards,
        LENGTHS_FILE,
        SOURCE_OF_FILE,
        MEMBERS_FILE,
    }  # somebody's files that lie there are never listed, nor removed
    return write_manifest(folder, "shards", counts, lineage, details, hashes, own.__contains__)


def _totals(
    summaries: Sequence[Mapping[str, Any]],
) -> tuple[dict[str, int], dict[str, dict[str, int]]]:
    """(counts, sources) of a folder, as its manifest has them, from those of its shards."""
    sources: dict[str, dict[str, int]] = {}
    for name in sorted({name for shard in summaries for name in shard["sources"]}):
        pairs = [shard["sources"].get(name, (0, 0)) for shard in summaries]
        sources[name] = {
            "samples": sum(pair[0] for pair in pairs),
            "tokens": sum(pair[1] for pair in pairs),
        }
    counts = {
        name: sum(shard[name] for shard in summaries)
        for name in ("samples", "tokens", "target_tokens")
    }
    counts["longest_sample_tokens"] = max(shard["longest_sample_tokens"] for shard in summaries)
    return {**counts, "shards": len(summaries)}, sources


def _write_index(folder: Path, names: list[str], sources: list[str]) -> None:
    def read(name: str) -> tuple[np.ndarray, np.ndarray]:
        batch = open_batch(folder / name, reads_all=False)
        return np.diff(batch.column("input_ids").offsets.to_numpy()), source_indices(
            batch, sources, folder / name
        )

    with ThreadPoolExecutor(
        8
    ) as pool:  # some twenty pages of every shard, each a wait for the disk
        lengths, source_of = (
            np.concatenate(parts) for parts in zip(*pool.map(read, names), strict=True)
        )
    members = np.argsort(source_of, kind="stable").astype(np.uint32)
    for name, array in (
        (LENGTHS_FILE, lengths),
        (SOURCE_OF_FILE, source_of),
        (MEMBERS_FILE, members),
    ):
        temporary = folder / f"{name}.tmp"
        with open(temporary, "wb") as file:
            np.save(file, array)
        temporary.replace(folder / name)


def open_batch(path: Path, reads_all: bool = True) -> pa.RecordBatch:
    """The record batch of a shard through the memory map. Raises InputError when it is not one.

    pyarrow's own map asks the disk for the whole batch when it is opened; without `reads_all` only
    what is touched is read.
    """
    try:
        batch = pa.ipc.open_file(
            pa.memory_map(str(path)) if reads_all else _map_of_touched_pages(path)
        ).get_batch(0)
        batch.validate()
        return batch
    except (pa.ArrowException, OSError, ValueError) as error:
        raise InputError(
            f"{path} is not a readable Arrow file ({error}); build the shards again"
        ) from error


def _map_of_touched_pages(path: Path) -> pa.BufferReader:
    with open(path, "rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    mapped.madvise(mmap.MADV_RANDOM)
    return pa.BufferReader(pa.py_buffer(mapped))


def source_indices(batch: pa.RecordBatch, sources: list[str], path: Path) -> np.ndarray:
    """`[num_rows]` uint8: index into `sources` of every row. Raises InputError for a source of
    the shard `path` that is none.
    """
    encoded = batch.column("category").dictionary_encode()
    names = encoded.dictionary.to_pylist()
    if unknown := [name for name in names if name not in sources]:
        raise InputError(
            f"{path} holds the source {unknown[0]!r}, the manifest {sources}; build the "
            "shards again"
        )
    to_source = np.array([sources.index(name) for name in names], np.uint8)
    return to_source[encoded.indices.to_numpy(zero_copy_only=False)]


class ShardWriter:
    """Collects samples and writes a shard whenever `rows_per_shard` are there; `finish` writes
    the manifest.
    """

    def __init__(
        self, folder: Path, layout: VocabLayout, rows_per_shard: int = ROWS_PER_SHARD
    ) -> None:
        self._folder = start_folder(folder, "shards")
        self._layout = layout
        self._rows_per_shard = rows_per_shard
        self._rows: list[Sample] = []
        self._shards: dict[str, dict[str, Any]] = {}

    def add(self, sample: Sample) -> None:
        """Append one sample; it is checked when its shard is written."""
        self._rows.append(sample)
        if len(self._rows) >= self._rows_per_shard:
            self._flush()

    def _flush(self) -> None:
        if self._rows:
            name = shard_name(len(self._shards))
            self._shards[name] = write_shard(
                self._folder / name, ShardColumns.of_samples(self._rows), self._layout
            )
            sync_shard(self._folder / name)
            self._rows = []

    def finish(self, lineage: dict[str, str], details: dict) -> Manifest:
        """Write the last shard and the manifest. Raises InputError for an impossible sample, or
        when there is none at all.
        """
        self._flush()
        return finish_shards(self._folder, self._shards, self._layout, lineage, details)


def shard_name(number: int) -> str:
    return f"shard-{number:05d}.arrow"


# ---- reading ----


class _Shard:
    """One memory-mapped shard. Offsets and values are numpy views into the map."""

    def __init__(self, path: Path) -> None:
        with open(path, "rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        _without_huge_pages(self._map)
        try:
            batch = pa.ipc.open_file(pa.BufferReader(pa.py_buffer(self._map))).get_batch(0)
            batch.validate()  # offsets and sizes of a damaged head would be read as addresses
        except (pa.ArrowException, OSError) as error:
            raise InputError(
                f"{path} is not a readable Arrow file ({error}); build the shards again"
            ) from error
        if batch.schema != SCHEMA:
            raise InputError(
                f"{path} has the columns {batch.schema.names}, expected {SCHEMA.names}; build "
                "the shards again"
            )
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

    def lists(self) -> tuple[tuple[np.ndarray, np.ndarray], ...]:
        """(starts, values) of `input_ids` and of `target_spans`."""
        return tuple(self._lists.values())

    def give_back_pages(self) -> None:
        """Views stay valid: a page that is asked for again is mapped again."""
        self._map.madvise(mmap.MADV_DONTNEED)


def _text_views(column: pa.StringArray) -> tuple[np.ndarray, np.ndarray | None]:
    _, starts, data = column.buffers()
    return np.frombuffer(starts, np.int32), np.frombuffer(
        data, np.uint8
    ) if data is not None and data.size else None


class ShardReader:
    """All samples of a finished shard folder, memory-mapped.

    `lengths` [num_samples] int32 (tokens), `source_of` [num_samples] uint8 (index into `sources`),
    both memory-mapped. Shards are opened when they are first read. A page that is read stays in the
    map, and counts as this process's own memory, until it is given back: that happens when the
    pages that were mapped since the last time exceed `bytes_mapped_at_most`. They are measured,
    because the kernel maps more than was asked for: 64 KiB around each of the eight places of a
    sample.
    """

    def __init__(self, folder: Path | str, bytes_mapped_at_most: int = 32 << 20) -> None:
        self.folder = Path(folder)
        self.manifest = read_manifest(folder, "shards")
        self.layout = VocabLayout.from_dict(
            self.manifest.details["layout"], f"{folder}/manifest.json"
        )
        self.sources: list[str] = list(self.manifest.details["sources"])
        rows: dict[str, int] = self.manifest.details.get("rows", {})
        self._names = list(
            rows
        )  # in the order that they were written: of names, shard-100000 is before shard-99999
        if set(rows) != {name for name in self.manifest.files if name.endswith(".arrow")}:
            raise InputError(f"{folder} was made by an older beingvl; build the shards again")
        for name in self._names:
            self._check_size(name)
        self._starts = list(accumulate((rows[name] for name in self._names), initial=0))
        expected = self.manifest.counts["samples"]
        if self._starts[-1] != expected:
            raise InputError(
                f"{folder} holds {self._starts[-1]} samples, its manifest says {expected}; "
                "build the shards again"
            )
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
        expected_bytes = self.manifest.files[name]["bytes"]
        try:
            found_bytes = path.stat().st_size
        except FileNotFoundError as error:
            raise InputError(
                f"{path}: found no such file, the manifest says {expected_bytes} bytes; build "
                "the shards again"
            ) from error
        if found_bytes != expected_bytes:
            raise InputError(
                f"{path}: found {found_bytes} bytes, the manifest says {expected_bytes} bytes; "
                "build the shards again"
            )

    def _index(self, name: str) -> np.ndarray:
        array: Any = load_mapped(self.folder / name, "build the shards again")
        if len(array) != len(self):
            raise InputError(
                f"{self.folder / name} holds {len(array)} samples, the manifest {len(self)}; "
                "build the shards again"
            )
        self._index_maps.append(array.base)
        _without_huge_pages(array.base)
        return array

    @cached_property
    def members(self) -> list[np.ndarray]:
        """Sample numbers of every source, ascending, memory-mapped: the sources are in the order
        of `sources`.
        """
        sizes = [entry["samples"] for entry in self.manifest.details["sources"].values()]
        return np.split(self._members, np.cumsum(sizes)[:-1])

    def _shard(self, number: int) -> _Shard:
        shard = self._open.get(number)
        if shard is None:
            shard = self._open[number] = _Shard(self.folder / self._names[number])
            if shard.num_rows != self._starts[number + 1] - self._starts[number]:
                raise InputError(
                    f"{self.folder / self._names[number]} has {shard.num_rows} rows, not the "
                    "manifest's; build the shards again"
                )
        return shard

    def all_ids(self) -> Iterator[np.ndarray]:
        """The token ids of every shard, end to end. Raises InputError for an id outside the
        vocabulary.
        """
        for number, name in enumerate(self._names):
            ids = self._shard(number).lists()[0][1]
            if _largest(ids) >= self.layout.size:
                raise damaged(self.folder / name, "it holds an id outside the vocabulary")
            yield ids
            self._shard(number).give_back_pages()

    def check(self) -> None:
        """Read every sample. Raises InputError for what `write_shard` would have refused, an
        index or counts that do not fit.
        """
        summaries = []
        for number, name in enumerate(self._names):
            batch = open_batch(self.folder / name)
            rows = ShardColumns.of_batch(batch)
            check_columns(rows, self.layout)
            summaries.append(_summary(rows))
            place = slice(self._starts[number], self._starts[number + 1])
            fits = np.array_equal(self.lengths[place], rows.lengths)
            if not fits or not np.array_equal(
                self.source_of[place], source_indices(batch, self.sources, self.folder / name)
            ):
                raise InputError(
                    f"{self.folder}: the index files do not fit {name}; build the shards again"
                )
        if not np.array_equal(self._members, np.argsort(self.source_of, kind="stable")):
            raise InputError(
                f"{self.folder / MEMBERS_FILE} does not fit {SOURCE_OF_FILE}; build the shards "
                "again"
            )
        counts, sources = _totals(summaries)
        found, expected = (
            {**counts, **sources},
            {**self.manifest.counts, **self.manifest.details["sources"]},
        )
        if different := [name for name in found if found[name] != expected.get(name)]:
            name = different[0]
            said = f"holds {found[name]} of {name!r}, its manifest says {expected.get(name)}"
            raise InputError(f"{self.folder} {said}; build the shards again")

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: int) -> Sample:
        """One sample. Raises InputError where a damaged file gives what could not have been
        written.
        """
        number = bisect_right(self._starts, index) - 1
        shard, row = self._shard(number), int(index - self._starts[number])
        ids, spans = shard.list("input_ids", row), shard.list("target_spans", row)
        if (
            len(ids) != self.lengths[index]
            or _largest(ids) >= self.layout.size
            or _largest(spans) > len(ids)
            or len(spans) % 2
        ):
            raise damaged(
                self.folder / self._names[number],
                f"its row {row} has impossible ids, spans or length",
            )
        try:
            source = self.sources[
                self.source_of[index]
            ]  # the row's category, without touching two more pages
            sample = Sample(
                shard.text("id", row), shard.text("image", row), source, ids, spans.reshape(-1, 2)
            )
        except (UnicodeDecodeError, IndexError) as error:
            raise damaged(
                self.folder / self._names[number], f"its row {row} has an impossible text or source"
            ) from error
        self._count_read()
        return sample

    def _count_read(self) -> None:
        self._num_reads += 1
        if (
            self._num_reads % READS_BETWEEN_CHECKS == 0
            and _mapped_file_bytes() - self._mapped_before > self._bytes_mapped_at_most
        ):
            self.give_back_pages()

    def give_back_pages(self) -> None:
        """Let go of all pages that were read; arrays stay valid, and what is asked for again is
        mapped again.
        """
        for shard in list(
            self._open.values()
        ):  # all, as views map pages again; a copy, as other threads open some
            shard.give_back_pages()
        for index in self._index_maps:
            index.madvise(mmap.MADV_DONTNEED)
        self._mapped_before = _mapped_file_bytes()


def _without_huge_pages(mapped: mmap.mmap) -> None:
    """Else a read of 4 KB maps 2 MiB where the file lies in the page cache as huge pages."""
    with contextlib.suppress(OSError):  # a kernel that has none
        mapped.madvise(mmap.MADV_NOHUGEPAGE)


def _mapped_file_bytes() -> int:
    """Bytes of files, libraries among them, that are in this process's memory now."""
    with open("/proc/self/statm", "rb") as file:
        return int(file.read().split()[2]) * mmap.PAGESIZE


def _largest(values: np.ndarray) -> int:
    """The largest of int32 values, negative ones counting as huge."""
    return int(values.view(np.uint32).max(initial=0))


def damaged(path: Path, found: str) -> InputError:
    return InputError(
        f"{path} is damaged: {found}; `beingvl verify {path.parent}` checks every "
        "file, then build the shards again"
    )
