"""Dataset rows in many formats -> rows.jsonl, one file of LLaVA rows that the next steps read.

    open_rows      uses one local JSON or JSONL file of LLaVA rows as it is; all else goes through
      CollectRows  the work: each source file is a part
        records_of   JSON, JSONL, CSV, TSV (also .gz, .zst), parquet, Arrow, tar of pairs
        a dialect    record -> LLaVA row (dialects/)

Pictures inside a table or tar file stay there. The rows hold their keys, and encode-images reads
the pictures from `containers`.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any, NamedTuple

import pyarrow as pa

from beingvl.artefact.manifest import already_made, read_manifest, write_manifest
from beingvl.artefact.parts import Parts, wait_until_complete
from beingvl.artefact.ranks import RankOf
from beingvl.artefact.request import Request
from beingvl.artefact.work import Work, run_in_parts
from beingvl.data.dialects import DIALECTS, Dialect, Record, dialect_of
from beingvl.data.llava_json import BrokenRow, Row, image_keys, stream_rows_and_broken
from beingvl.errors import InputError
from beingvl.images.image_source import IMAGE_SUFFIXES
from beingvl.sources.pairs import records_of_pairs
from beingvl.sources.places import (
    as_place,
    bare,
    expand,
    file_name,
    is_address,
    opened,
    stamp,
)
from beingvl.sources.tables import SUFFIXES as TABLES
from beingvl.sources.tables import Table, refuse_equal_names
from beingvl.sources.text_tables import DELIMITERS, records_of_table

ROWS_FILE = "rows.jsonl"
JSON = (".json", ".jsonl", ".ndjson")
COMPRESSED = {".gz": "gzip", ".zst": "zstd"}
TEXTS = (*JSON, *DELIMITERS)
PLAIN = (*TEXTS, *TABLES, ".tar")
PARTS_VERSION = 2  # format of a part's files
SUFFIXES = (*PLAIN, *(f"{text}{end}" for text in TEXTS for end in COMPRESSED))
DATASETS_FILES = ("state.json", "dataset_info.json", "dataset_dict.json")  # of Hugging Face
# A file is refused only if it expands to more than BOMB_BYTES and by more than MAX_EXPANSION.
BOMB_BYTES, MAX_EXPANSION = 1 << 30, 200
ROWS_TO_SEE = 100  # read to recognise the dialect, fewer where they are large
CHARS_TO_SEE = 1 << 22
DIALECT_FILE = "dialect.json"  # of a part


class Rows(NamedTuple):
    """One file of LLaVA rows, and the tables and tar files that hold their pictures."""

    path: Path
    containers: list[str]


def open_rows(
    sources: Path | str | Sequence[Path | str],
    folder: Path,
    *,
    row_format: str | None = None,
    rank: RankOf,
    overwrite: bool = False,
) -> Rows:
    """The rows of files, folders, patterns and URLs, collected in `folder` if necessary.

    Args:
        row_format: name of the dialect; None looks at each file's first rows and prints what it
            found.

    Raises InputError for input that is unreadable, mixes dialects, or changed since an earlier run.
    """
    if row_format not in (None, *DIALECTS):
        raise InputError(f"--row_format is {row_format!r}, expected one of {list(DIALECTS)}")
    named = [sources] if isinstance(sources, str | Path) else list(sources)
    files = expand(named, SUFFIXES)
    if any(file.endswith(".arrow") for file in files):
        files = [file for file in files if file_name(file) not in DATASETS_FILES]
    _refuse_mixed(files)
    dialect = _first_dialect(files, row_format)
    number = "1 file" if len(files) == 1 else f"{len(files)} files"
    print(f"{bare(as_place(named[0]))}: {number}, rows in the format {dialect!r}")
    containers = [file for file in files if _kind(file) in (*TABLES, ".tar")]
    is_plain = len(files) == 1 and files[0].lower().endswith(JSON) and not is_address(files[0])
    if is_plain and dialect == "llava":
        return Rows(Path(files[0]), [])
    work = CollectRows(folder, files, row_format, dialect)
    run_in_parts(work, rank, overwrite=overwrite, name="collect rows")
    wait_until_complete(folder)
    return Rows(folder / ROWS_FILE, containers)


def _refuse_mixed(files: Sequence[str]) -> None:
    """Raises InputError for files of several kinds, and for tables of one name. Opens none."""
    first: dict[str, str] = {}
    for file in files:
        first.setdefault(_kind(file), file)
    if len(first) > 1:
        one, other = map(bare, list(first.values())[:2])
        raise InputError(f"{one} and {other} are files of two kinds; give files of one kind")
    refuse_equal_names([file for file in files if _kind(file) in TABLES])


def _kind(file: str) -> str:
    """Its suffix, without a compression suffix."""
    stem, suffix = os.path.splitext(file_name(file).lower())
    return os.path.splitext(stem)[1] if suffix in COMPRESSED else suffix


def _first_dialect(files: Sequence[str], named: str | None) -> str:
    """The dialect of the first file that has readable rows."""
    problem = ""
    for file in files:
        dialect, records = _recognised(file, named)
        if dialect:
            return dialect
        try:
            for record in islice(records, 1):
                _readable(record)
        except InputError as error:
            problem = problem or f"{bare(file)}, row 1: {error}"
    if named is None:
        raise InputError(problem or f"{bare(files[0])} holds no row")
    return named


def _recognised(file: str, named: str | None) -> tuple[str | None, Iterator[Row]]:
    """A file's dialect, `named` or told by its first rows, and all its records. None: those rows
    are unreadable, or there are none.
    """
    records = records_of(file)
    seen: list[Row] = []
    readable: list[Record] = []
    num_chars = 0
    for record in islice(records, ROWS_TO_SEE):
        seen.append(record)
        with suppress(InputError):
            readable.append(_readable(record))
        num_chars += len(repr(record))
        if num_chars > CHARS_TO_SEE:
            break
    dialect = None
    if readable:
        dialect = named or dialect_of(readable, bare(file))
        _refuse_addresses(file, readable, DIALECTS[dialect])
    return dialect, chain(seen, records)


def _refuse_addresses(file: str, records: Sequence[Record], convert: Dialect) -> None:
    """Raises InputError when the first image named in `records` is a URL."""
    for record in records:
        try:
            keys = image_keys(convert(record))
        except InputError:
            continue  # a later step rejects it
        if keys and is_address(keys[0]):
            column = next((name for name in record if keys[0] in str(record[name])), "image")
            raise InputError(
                f"{bare(file)}: {column!r} holds addresses of images, such as "
                f"{bare(keys[0])[:80]!r}, and none is fetched: download them (img2dataset writes "
                "tar files that are read as they are), or write paths of local files there"
            )
        if keys:
            return


# ---- records ----


def records_of(file: str) -> Iterator[Row]:
    """A file's rows unchanged, except that embedded pictures become their keys."""
    kind = _kind(file)
    if kind in TABLES:
        return Table(file).records()
    if kind == ".tar":
        return records_of_pairs(file, IMAGE_SUFFIXES)
    if kind in DELIMITERS:
        return _undamaged(file, _records_of_text_table(file, kind))
    if kind not in JSON:
        raise InputError(f"{bare(file)}: expected a name that ends in {', '.join(PLAIN)}")
    rows = stream_rows_and_broken(Path(bare(file)), partial(_decompressed, file))
    return _undamaged(file, rows)


def _undamaged(file: str, records: Iterator[Row]) -> Iterator[Row]:
    """Raises InputError if a compressed file is truncated or does not match its suffix."""
    try:
        yield from records
    except (OSError, pa.ArrowException) as error:
        if isinstance(error, OSError) and error.errno:
            raise
        raise InputError(
            f"{bare(file)} is truncated or damaged ({error}); copy it again"
        ) from error


def _decompressed(file: str) -> IO[bytes]:
    """The decompressed bytes of a text file, from its start."""
    opener = COMPRESSED.get(os.path.splitext(file_name(file).lower())[1])
    plain = opened(file)
    if opener is None:
        return plain
    return io.BufferedReader(_Expanded(bare(file), plain, opener))


class _Expanded(io.RawIOBase):
    """A compressed file's content. Reading raises InputError for a decompression bomb."""

    def __init__(self, name: str, file: IO[bytes], opener: str) -> None:
        self._name, self._file, self._count = name, file, 0
        self._stream = pa.CompressedInputStream(pa.PythonFile(file, "r"), opener)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = self._stream.readinto(buffer)
        self._count += count
        if self._count > max(MAX_EXPANSION * self._file.tell(), BOMB_BYTES):
            raise InputError(
                f"{self._name} expands to more than {MAX_EXPANSION} times its size, like a "
                "decompression bomb; decompress it yourself if it is not one"
            )
        return count


def _records_of_text_table(file: str, kind: str) -> Iterator[Row]:
    with io.TextIOWrapper(_decompressed(file), encoding="utf-8-sig", newline="") as text:
        yield from records_of_table(text, bare(file), kind)


# ---- the work ----


@dataclass
class CollectRows(Work):
    """Each part is the rows of one file."""

    output: Path
    files: list[str]
    row_format: str | None
    dialect: str  # of the first file
    kind = "rows"
    unit = "row"
    cheap = True  # beside what the rows' images take

    @property
    def num_parts(self) -> int:
        return len(self.files)

    def size_of_part(self, number: int) -> int:
        return 0  # unknown before it is read

    def __post_init__(self) -> None:
        self.stamps = self._stamps_now()  # taken before anything is read
        self.told = {self.dialect}

    def _stamps_now(self) -> list[list[str]]:
        """Remote files are identified by their size, and their time or the store's tag."""
        return [[bare(file), stamp(file)] for file in self.files]

    def request(self) -> Request:
        return Request(files=self.stamps, row_format=self.row_format)

    def request_of_parts(self) -> Request:
        return Request(parts_version=PARTS_VERSION, **self.request())

    def check_finished(self) -> None:
        """Naming the dialect that all files were found to have asks for the same rows."""
        recognised = read_manifest(self.output, self.kind).details.get("recognised")
        named = None if recognised == [self.row_format] else self.row_format
        already_made(self.output, self.kind, Request(files=self.stamps, row_format=named))

    def write_part(self, number: int, folder: Path, advance: Callable[[int], object]) -> None:
        file = self.files[number]
        found, records = _recognised(file, self.row_format)
        dialect = found or self.dialect
        (folder / DIALECT_FILE).write_text(json.dumps(dialect))
        if dialect not in self.told:
            print(f"{bare(file)}: rows in the format {dialect!r}")
        self.told.add(dialect)
        convert = DIALECTS[dialect]
        with open(folder / ROWS_FILE, "wb") as out:
            for at, record in enumerate(records, 1):
                try:
                    row = _readable(record)
                    row = convert(row)
                    if row.get("id") in (None, ""):
                        row["id"] = f"{file_name(file)}-{at}"
                    line = json.dumps(row, ensure_ascii=False, allow_nan=False, default=str)
                except (InputError, ValueError) as error:
                    line = json.dumps({"unreadable": f"{bare(file)}, row {at}: {error}"})
                out.write(line.encode("utf-8", "surrogatepass") + b"\n")
                advance(1)

    def join(self, parts: Parts) -> None:
        """Raises InputError if a file changed while it was read, or if tar files share a key."""
        for (file, before), (_, now) in zip(self.stamps, self._stamps_now(), strict=True):
            if now != before:
                raise InputError(
                    f"{file} changed while its rows were read ({before}, now {now}); start again "
                    "when it is complete"
                )
        rows = [parts.path(number) / ROWS_FILE for number in range(self.num_parts)]
        _refuse_equal_keys(self.files, rows)
        dialects = sorted(set(parts.read_json(self.num_parts, DIALECT_FILE)))
        hashes = {ROWS_FILE: parts.join(self.num_parts, ROWS_FILE, self.output / ROWS_FILE)}
        recognised = [] if self.row_format else dialects
        details = {"request": self.request(), "recognised": recognised}
        write_manifest(self.output, self.kind, {"files": len(self.files)}, {}, details, hashes)


def _refuse_equal_keys(files: Sequence[str], rows: Sequence[Path]) -> None:
    """Raises InputError for tar files whose first `rows` have images of one name; later ones are
    found when the images are read.
    """
    holder: dict[str, str] = {}
    for file, path in zip(files, rows, strict=True):
        for key in _first_images(path) if _kind(file) == ".tar" else []:
            if (other := holder.setdefault(key, file)) != file:
                both = f"{bare(other)} and {bare(file)} both hold"
                raise InputError(f"{both} {key}: rename it in one of them")


def _first_images(rows: Path) -> list[str]:
    """Those of the first row that names any."""
    with open(rows, "rb") as file:
        for row in map(json.loads, islice(file, ROWS_TO_SEE)):
            with suppress(InputError):
                if keys := image_keys(row):
                    return keys
    return []


def _readable(record: Row) -> dict[str, Any]:
    """The record. Raises InputError if it stands for a row that could not be read."""
    if isinstance(record, BrokenRow):
        raise InputError(record.reason)
    if "unreadable" in record:
        raise InputError(record["unreadable"])
    return record
