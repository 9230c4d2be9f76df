"""Tables with pictures inside: parquet files, and the Arrow files of `datasets.save_to_disk`.

    Table.records   rows without their pictures: each picture is its key, TABLE#ROW/N
    Table.picture   one picture's bytes

A column holds pictures when it is a struct with `bytes` (Hugging Face's `Image`), or bare bytes,
or a list of either. Of parquet only what is asked for is read: rows without the bytes of their
pictures, pictures without the rows. A batch of rows is in memory at a time, and one that expands to
gigabytes ends in a sentence. A row that Python cannot hold is {"unreadable": reason}.
"""

from __future__ import annotations

import os
import resource
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate, chain, islice, pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from beingvl.errors import InputError
from beingvl.sources.places import bare, file_name, is_address, opened

SUFFIXES = (".parquet", ".arrow")
BATCH_BYTES = 1 << 24  # of mean rows
MAX_ROWS_AT_ONCE = 1000
READ_BYTES = 1 << 20  # of a column at once; else all of a row group's
MAX_ROW_BYTES = 1 << 28
MAX_PICTURES = 10_000  # of a row
MAX_GROWTH = 2 << 30  # of this process while it reads a batch; pyarrow's allocator takes 1 << 30
MAX_PYTHON = 1 << 29  # of rows as Python objects, at once
VALUE_BYTES, CHARACTER_BYTES = 160, 4  # of these, at most
NOT_A_TABLE = (pa.ArrowException, OSError, EOFError)
NOT_A_ROW = (ValueError, OverflowError, MemoryError)  # no UTF-8, a year 100,000, a bomb
STREAM_END = b"\xff\xff\xff\xff\0\0\0\0"  # which pyarrow and `datasets` write on closing


def key_of(place: str, row: int, number: int) -> str:
    """Keys of one table sort as its rows do."""
    return f"{file_name(place)}#{row:09d}/{number}"


def numbers_of(place: str) -> tuple[int, int] | None:
    """Row and number of a key's `ROW/N`; None for another text."""
    row, slash, number = place.partition("/")
    return (int(row), int(number)) if slash and row.isdecimal() and number.isdecimal() else None


def refuse_equal_names(places: Sequence[str]) -> None:
    """Raises InputError for two tables whose pictures would have the same keys."""
    for name, count in Counter(map(file_name, places)).most_common(1):
        if count > 1:
            raise InputError(
                f"{count} tables are called {name}, as their pictures' keys begin: rename one"
            )


class Table:
    """One file. Raises InputError when it cannot be read, here and later."""

    def __init__(self, place: str) -> None:
        self.place = place
        try:
            self._parquet = self._open_parquet() if self._is_parquet else None
            self.schema = self._parquet.schema_arrow if self._parquet else self._reader().schema
        except NOT_A_TABLE as error:
            raise self._damage(error) from error
        if len(set(self.schema.names)) != len(self.schema.names):
            raise InputError(f"{bare(place)} has two columns of one name: {self.schema.names}")
        self.picture_columns = [field.name for field in self.schema if _holds_pictures(field.type)]
        self._cursor: _Cursor | None = None

    @property
    def name(self) -> str:
        return file_name(self.place)

    def __reduce__(self) -> tuple[type[Table], tuple[str]]:
        return Table, (self.place,)  # a process of its own opens the file again

    @property
    def _is_parquet(self) -> bool:
        return self.name.lower().endswith(".parquet")

    def _damage(self, error: Exception) -> InputError:
        if isinstance(error, MemoryError):
            return InputError(
                f"{bare(self.place)} has rows that expand to gigabytes, as a bomb does: leave them "
                "out, or write fewer rows per batch"
            )
        if isinstance(error, OSError) and error.errno:  # of a disk or a store
            raise error
        reason = " ".join(str(error).split())[:200]
        kind = "parquet" if self._is_parquet else "Arrow"
        return InputError(
            f"{bare(self.place)} is not a whole {kind} file ({reason}); copy it again"
        )

    def records(self) -> Iterator[dict[str, Any]]:
        """Rows in their order; where a column holds pictures stands the list of their keys."""
        names = [name for name in self.schema.names if name not in self.picture_columns]
        for first, batch in self._batches(self._leaves_without_bytes(names), 0):
            rows = _as_python(batch.select(names))
            for row, keys in zip(rows, self._keys_of_rows(first, batch), strict=True):
                yield row | keys

    def picture_keys(self) -> Iterator[str]:
        """Of all pictures."""
        for first, batch in self._batches(self._leaves_without_bytes([]), 0):
            for row, keys in enumerate(self._keys_of_rows(first, batch), first):
                if "unreadable" in keys:
                    yield key_of(self.place, row, 0)  # of which reading says why
                else:
                    yield from (key for column in keys.values() for key in column)

    def _keys_of_rows(self, first: int, batch: pa.RecordBatch) -> Iterator[dict[str, Any]]:
        """Of every row: column -> keys of its pictures, numbered through all columns."""
        columns = [batch.column(name) for name in self.picture_columns]
        for at in range(len(batch)):
            counts = [_count(column[at]) for column in columns]
            if sum(counts) > MAX_PICTURES:
                yield {"unreadable": _too_many(sum(counts))}
                continue
            keys = (key_of(self.place, first + at, number) for number in range(sum(counts)))
            named = zip(self.picture_columns, counts, strict=True)
            yield {name: list(islice(keys, count)) for name, count in named}

    def picture(self, row: int, number: int) -> bytes:
        """The N-th picture of a row. Quick when rows are asked for in their order."""
        try:
            if self._cursor is None or row < self._cursor.first:
                self._cursor = _Cursor(self._batches(self.picture_columns, row))
            batch, at = self._cursor.find(row)
        except StopIteration as error:
            raise InputError(f"{bare(self.place)} has no row {row}") from error
        except InputError:
            self._cursor = None  # another row may be readable
            raise
        columns = [batch.column(name).slice(at, 1) for name in self.picture_columns]
        key = key_of(self.place, row, number)
        if (count := sum(_count(column[0]) for column in columns)) > MAX_PICTURES:
            raise InputError(f"{key}: {_too_many(count)}")
        if (size := sum(column.nbytes for column in columns)) > MAX_ROW_BYTES:
            raise InputError(
                f"{key}: pictures of {size:,} bytes in a row, expected at most {MAX_ROW_BYTES:,}"
            )
        try:
            cells = [column[0].as_py() for column in columns]
        except NOT_A_ROW as error:  # such as a `path` that is not UTF-8
            raise InputError(f"{key}: the row cannot be read ({error})") from error
        pictures = [picture for cell in cells for picture in _listed(cell)]
        found = pictures[number] if number < len(pictures) else None
        data = found["bytes"] if isinstance(found, dict) else found
        if data is None:
            raise InputError(f"{key}: no picture is there")
        return data

    # ---- the two formats ----

    def _open_parquet(self) -> pq.ParquetFile:
        return pq.ParquetFile(opened(self.place), pre_buffer=False, buffer_size=READ_BYTES)

    def _reader(self) -> pa.RecordBatchStreamReader:
        """Raises ArrowInvalid for a file that is cut between two batches: pyarrow takes any end."""
        source = opened(self.place) if is_address(self.place) else pa.memory_map(self.place)
        source.seek(max(source.seek(0, os.SEEK_END) - len(STREAM_END), 0))
        end = source.read()
        source.seek(0)
        if end.endswith(b"ARROW1"):
            raise InputError(
                f"{bare(self.place)} has the Arrow file format, expected Arrow's stream format, as "
                "save_to_disk writes it; write that, or parquet"
            )
        if end != STREAM_END:
            raise pa.ArrowInvalid("the mark at the end of a stream is missing")
        return pa.ipc.open_stream(source, options=pa.ipc.IpcReadOptions(use_threads=False))

    def _leaves_without_bytes(self, names: list[str]) -> list[str]:
        """What to read for rows: of pictures in structs everything but the bytes, which still
        tells how many there are.
        """
        if self._parquet is None:
            return self.schema.names
        leaves = self._parquet.schema
        paths = [leaves.column(number).path for number in range(len(leaves))]
        wanted: list[str] = []
        for name in [*names, *self.picture_columns]:
            own = [path for path in paths if path == name or path.startswith(f"{name}.")]
            others = [path for path in own if not path.endswith(".bytes")]
            wanted += own if name in names else others or own
        return wanted

    def _batches(self, columns: list[str], start: int) -> Iterator[tuple[int, pa.RecordBatch]]:
        """(first row, rows) of every batch, from the one on that may hold row `start`."""
        try:
            if self._parquet is None:
                first = 0
                for batch in _bounded(self._reader()):
                    yield first, batch
                    first += len(batch)
                return
            sizes = [
                self._parquet.metadata.row_group(group).num_rows
                for group in range(self._parquet.num_row_groups)
            ]
            for group, (first, end) in enumerate(pairwise(accumulate(sizes, initial=0))):
                if end <= start:
                    continue
                rows, growth = self._limits(group)
                batches = self._parquet.iter_batches(rows, [group], columns, use_threads=False)
                for batch in _bounded(batches, growth):
                    yield first, batch
                    first += len(batch)
        except NOT_A_TABLE as error:
            raise self._damage(error) from error

    def _limits(self, group: int) -> tuple[int, int]:
        """Rows to read at once, and by how many bytes this process may grow meanwhile: a page, as
        large as the group, is there as it lies in the file, expanded, and as an array.
        """
        assert self._parquet
        found = self._parquet.metadata.row_group(group)
        columns = map(found.column, range(found.num_columns))
        compressed = sum(column.total_compressed_size for column in columns)
        rows = BATCH_BYTES * found.num_rows // max(found.total_byte_size, 1)
        return min(max(rows, 1), MAX_ROWS_AT_ONCE), MAX_GROWTH + 3 * compressed


@contextmanager
def _memory_bound(growth: int) -> Iterator[None]:
    """What would let this process grow by more bytes raises MemoryError; sizes that a file says
    may be wrong.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    with open("/proc/self/statm") as file:
        bound = int(file.read().split()[5]) * resource.getpagesize() + growth
    if soft != resource.RLIM_INFINITY:
        bound = min(bound, soft)
    resource.setrlimit(resource.RLIMIT_DATA, (bound, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def _bounded(
    batches: Iterable[pa.RecordBatch], growth: int = MAX_GROWTH
) -> Iterator[pa.RecordBatch]:
    """Raises MemoryError instead of a batch that is a bomb."""
    waiting = iter(batches)
    while True:
        with _memory_bound(growth):
            batch = next(waiting, None)
        if batch is None:
            return
        yield batch


def _as_python(batch: pa.RecordBatch) -> Iterator[dict[str, Any]]:
    """All rows at once; where Python cannot hold them, one half after the other."""
    rows: Iterable[dict[str, Any]]
    try:
        # Before it is tried: pyarrow aborts the process where a small piece of memory is refused.
        if python_bytes(batch) > MAX_PYTHON:
            raise MemoryError
        with _memory_bound(MAX_PYTHON):
            rows = batch.to_pylist()
    except NOT_A_ROW as error:
        half = len(batch) // 2
        if half:
            rows = chain.from_iterable(map(_as_python, (batch.slice(0, half), batch.slice(half))))
        else:
            rows = [{"unreadable": str(error) or f"it expands to more than {MAX_PYTHON:,} bytes"}]
    yield from rows


def python_bytes(batch: pa.RecordBatch) -> int:
    """What its rows take as Python objects, at most."""
    return _python_bytes(batch.to_struct_array())


def _python_bytes(array: pa.Array) -> int:
    """With what is inside lists, maps and structs."""
    if pa.types.is_map(array.type):
        array = pa.ListArray.from_arrays(array.offsets, array.values)
    inside = array.flatten() if hasattr(array, "flatten") else []
    parts = inside if isinstance(inside, list) else [inside]
    if pa.types.is_dictionary(array.type):
        own = _cell_bytes(array.dictionary)[array.indices.drop_null().to_numpy()]
    else:
        own = _cell_bytes(array)
    return VALUE_BYTES * len(array) + int(own.sum()) + sum(map(_python_bytes, parts))


def _cell_bytes(array: pa.Array) -> np.ndarray:
    """`[n]` int64: bytes of each text or binary as a Python object, at most; 0 of other cells."""
    types, kind = pa.types, array.type
    is_text = types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)
    if types.is_string_view(kind) or types.is_binary_view(kind):  # each begins with its length
        views = np.frombuffer(array.buffers()[1], np.int32).reshape(-1, 4)
        sizes = views[array.offset : array.offset + len(array), 0]
        sizes = sizes * array.is_valid().to_numpy(zero_copy_only=False)
    elif is_text or types.is_binary(kind) or types.is_large_binary(kind):
        sizes = pc.binary_length(array).fill_null(0).to_numpy(zero_copy_only=False)
    else:
        return np.zeros(len(array), np.int64)
    return sizes.astype(np.int64) * (CHARACTER_BYTES if is_text else 1)


class _Cursor:
    """A position in the batches of a table, which only moves on."""

    def __init__(self, batches: Iterator[tuple[int, pa.RecordBatch]]) -> None:
        self._batches = batches
        self.first, self._batch = next(batches)

    def find(self, row: int) -> tuple[pa.RecordBatch, int]:
        while row >= self.first + len(self._batch):
            self.first, self._batch = next(self._batches)
        return self._batch, row - self.first


def _holds_pictures(kind: pa.DataType) -> bool:
    types = pa.types
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        kind = kind.value_type
    is_struct = types.is_struct(kind) and kind.get_field_index("bytes") >= 0
    is_bytes = types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind)
    return is_struct or is_bytes


def _count(value: pa.Scalar) -> int:
    """How many pictures a cell holds."""
    if not value.is_valid:
        return 0
    is_list = isinstance(value, pa.ListScalar | pa.LargeListScalar)
    return len(value.values) if is_list and value.values is not None else int(not is_list)


def _too_many(count: int) -> str:
    return f"{count:,} pictures in a row, expected at most {MAX_PICTURES:,}"


def _listed(value: Any) -> list[Any]:
    if value is None:
        return []
    return value if isinstance(value, list) else [value]
