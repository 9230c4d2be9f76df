"""The rows of one shard by column: checks, Arrow schema, and what the index needs to know.

Row             one row to write
Sample          one row as read
ShardColumns    many rows laid end to end
check_columns   refuses rows without tokens, ids outside the vocabulary, impossible spans
ShardFacts      what the folder's index files and manifest need to know about a shard
map_batch       memory-maps a shard's record batch
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from blake3 import blake3

from beingvl.errors import InputError, is_out_of_files
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
MAX_SOURCES = 256
TEXTS = ("id", "image", "category")


class Sample(NamedTuple):
    """One sample: `input_ids` [length] int32, `target_spans` [num_spans, 2] int32. If it comes from
    a reader, they are views into the memory map.
    """

    id: str
    image: str
    category: str
    input_ids: np.ndarray
    target_spans: np.ndarray


class Row(NamedTuple):
    """One row to write. `ids` are parts to concatenate; `spans` is flat: start, end, start, …"""

    id: str
    image: str
    category: str
    ids: tuple[np.ndarray, ...]
    spans: np.ndarray


@dataclass
class ShardColumns:
    """The rows of one shard by column, laid end to end: row n has the ids
    `ids[id_starts[n]:id_starts[n + 1]]`; spans likewise.

    ids, spans: int32, or int64 before they are checked; id_starts, span_starts: `[num_rows + 1]`
    integers. Spans are flat: start, end, start, end, …
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
    def of_rows(cls, rows: Sequence[Row]) -> ShardColumns:
        nothing = np.empty(0, np.int32)
        ids = np.concatenate([nothing, *(part for row in rows for part in row.ids)])
        spans = np.concatenate([nothing, *(row.spans for row in rows)])
        id_starts = _starts([sum(map(len, row.ids)) for row in rows])
        span_starts = _starts([len(row.spans) for row in rows])
        texts = [pa.array([getattr(row, name) for row in rows], pa.string()) for name in TEXTS]
        return cls(texts[0], texts[1], texts[2], ids, id_starts, spans, span_starts)

    @classmethod
    def joined(cls, blocks: Sequence[ShardColumns]) -> ShardColumns:
        """Concatenated blocks of rows."""
        blocks = blocks or [cls.of_rows([])]
        texts = [pa.concat_arrays([getattr(block, name) for block in blocks]) for name in TEXTS]
        ids, spans = (
            np.concatenate([getattr(block, name) for block in blocks]) for name in ("ids", "spans")
        )
        id_starts, span_starts = (
            _starts(np.concatenate([np.diff(getattr(block, name)) for block in blocks]))
            for name in ("id_starts", "span_starts")
        )
        return cls(texts[0], texts[1], texts[2], ids, id_starts, spans, span_starts)

    def narrow(self) -> ShardColumns:
        """The same rows as int32; check them first."""
        return replace(self, ids=self.ids.astype(np.int32), spans=self.spans.astype(np.int32))

    def to_batch(self) -> pa.RecordBatch:
        columns = [self.id, self.image, self.category]
        for values, starts in ((self.ids, self.id_starts), (self.spans, self.span_starts)):
            offsets = pa.array(starts.astype(np.int32))
            columns.append(pa.ListArray.from_arrays(offsets, pa.array(values)))
        return pa.RecordBatch.from_arrays(columns, schema=SCHEMA)


def _starts(lengths: Sequence[int] | np.ndarray) -> np.ndarray:
    """Where rows of these lengths start, and where the last one ends: `[n + 1]`."""
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])


# ---- checks ----


def check_columns(rows: ShardColumns, layout: VocabLayout) -> None:
    """Raises InputError naming a sample that has no tokens, or ids or spans out of range."""
    _check_ids(rows, layout)
    _check_spans(rows)


def _check_ids(rows: ShardColumns, layout: VocabLayout) -> None:
    ids = rows.ids
    if len(ids) >= 2**31:
        raise InputError(
            f"a shard would hold {len(ids)} tokens, more than 2^31; write fewer rows per shard"
        )
    empty = np.flatnonzero(rows.lengths == 0)
    if len(empty):
        raise InputError(f"sample {rows.id[empty[0]].as_py()!r} has no tokens")
    if largest_id(ids) >= layout.size:
        at = int(np.argmax((ids < 0) | (ids >= layout.size)))
        row = int(np.searchsorted(rows.id_starts, at, side="right")) - 1
        raise InputError(
            f"sample {rows.id[row].as_py()!r} has id {ids[at]}, the vocabulary ends at "
            f"{layout.size - 1}"
        )


def largest_id(values: np.ndarray) -> int:
    """The largest of signed values; negative values count as huge."""
    return int(values.view(f"u{values.itemsize}").max(initial=0))


def _check_spans(rows: ShardColumns) -> None:
    """Spans must ascend within 1 … length: nothing can predict a row's first token."""
    spans, starts, lengths = rows.spans, rows.span_starts, rows.lengths
    count = np.diff(starts)
    row_of = np.repeat(np.arange(len(rows)), count)
    bad = (spans < 1) | (spans > lengths[row_of])
    bad[1:] |= (np.diff(spans) < 0) & (row_of[1:] == row_of[:-1])
    bad |= (count % 2 == 1)[row_of]
    if bad.any():
        row = int(row_of[np.argmax(bad)])
        found = spans[starts[row] : starts[row + 1]].tolist()
        raise InputError(
            f"sample {rows.id[row].as_py()!r} has target_spans {found} outside its tokens "
            f"1 … {lengths[row]} or overlapping"
        )


# ---- what the index needs to know ----


@dataclass(frozen=True)
class ShardFacts:
    """What a folder's index and manifest need to know about a shard, so it is not read again.

    sources: names of the shard's sources; source_of: `[num_rows]` index into them. lengths:
    `[num_rows]` int32. id_hashes: `[num_rows]` uint64, equal for equal ids; the probability of a
    collision among ten million ids is 3 in a million.
    """

    hash: str
    largest_id: int
    target_tokens: int
    sources: list[str]
    source_of: np.ndarray
    lengths: np.ndarray
    id_hashes: np.ndarray

    @classmethod
    def of_columns(cls, rows: ShardColumns, hash_of_file: str = "") -> ShardFacts:
        category = rows.category.dictionary_encode()
        hashes = (blake3(id_.encode()).digest(length=8) for id_ in rows.id.to_pylist())
        return cls(
            hash=hash_of_file,
            largest_id=largest_id(rows.ids),
            target_tokens=int((rows.spans[1::2] - rows.spans[::2]).sum(dtype=np.int64)),
            sources=category.dictionary.to_pylist(),
            source_of=category.indices.to_numpy(),
            lengths=rows.lengths.astype(np.int32),
            id_hashes=np.frombuffer(b"".join(hashes), np.uint64),
        )

    def save(self, path: Path) -> None:
        with open(path, "wb") as file:
            np.savez(file, **asdict(self))

    @classmethod
    def load(cls, path: Path) -> ShardFacts:
        with np.load(path) as arrays:
            fields: dict[str, Any] = dict(arrays)
        for name in ("hash", "largest_id", "target_tokens", "sources"):
            fields[name] = fields[name].tolist()
        return cls(**fields)


@dataclass(frozen=True)
class FolderFacts:
    """Index and counts of a shard folder. sources: name -> its samples and tokens, sorted by name;
    source_of: `[num_samples]` uint8, index into sources.
    """

    lengths: np.ndarray
    source_of: np.ndarray
    counts: dict[str, int]
    sources: dict[str, dict[str, int]]

    @classmethod
    def of_shards(cls, shards: Sequence[ShardFacts]) -> FolderFacts:
        names = sorted({name for shard in shards for name in shard.sources})
        if len(names) > MAX_SOURCES:
            raise InputError(
                f"the samples name {len(names)} sources, at most {MAX_SOURCES} are possible; is "
                "`category` an id?"
            )
        lengths = np.concatenate([shard.lengths for shard in shards])
        source_of = np.concatenate(
            [
                np.array([names.index(name) for name in shard.sources], np.uint8)[shard.source_of]
                for shard in shards
            ]
        )
        samples = np.bincount(source_of, minlength=len(names))
        tokens = np.bincount(source_of, lengths, len(names))
        counts = {
            "samples": len(lengths),
            "tokens": int(lengths.sum(dtype=np.int64)),
            "target_tokens": sum(shard.target_tokens for shard in shards),
            "longest_sample_tokens": int(lengths.max()),
            "shards": len(shards),
        }
        sources = {
            name: {"samples": int(samples[at]), "tokens": int(tokens[at])}
            for at, name in enumerate(names)
        }
        return cls(lengths, source_of, counts, sources)


# ---- a file ----


def map_batch(path: Path) -> tuple[mmap.mmap, pa.RecordBatch]:
    """A shard's memory map and record batch. Raises InputError if the file is not a shard."""
    with open(path, "rb") as file:
        try:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            batch = pa.ipc.open_file(pa.BufferReader(pa.py_buffer(mapped))).get_batch(0)
            batch.validate()  # else offsets and sizes from a damaged header are used as addresses
            names = batch.schema.names  # raises ValueError: names may be any bytes
        except (pa.ArrowException, OSError, ValueError) as error:
            if is_out_of_files(error):
                raise
            raise InputError(
                f"{path} is not a readable Arrow file ({error}); build the shards again"
            ) from error
    if batch.schema != SCHEMA:
        raise InputError(
            f"{path} has the columns {names}, expected {SCHEMA.names}; build the shards again"
        )
    return mapped, batch
