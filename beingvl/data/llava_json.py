"""Read LLaVA-format files row by row: a JSON array or JSONL of any size, in the memory of one row
and one block.

    stream_rows    all rows; the first broken row is an error
    survey         one pass: where each part starts, and whether any row names an image
    rows_of_part   the rows of one part

The standard library's decoder reads one element after the other from a buffer that is refilled at
its end. This is about as fast as `json.load` of the whole file; an event parser such as ijson hands
every bracket to Python.
"""

from __future__ import annotations

import codecs
import io
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import IO, Any, NamedTuple

from beingvl.artefact.progress import progress
from beingvl.errors import InputError
from beingvl.json_file import MAX_DEPTH, is_deep

BLOCK_CHARS = 1 << 20
BLOCK_BYTES = 1 << 20  # more than any whitespace before the first row
MAX_ROW_CHARS = 1 << 26  # in JSONL: bytes
# ValueError: not JSON, or a number with thousands of digits. RecursionError: nested too deep.
NOT_READABLE = (ValueError, RecursionError)
MAX_KEY_CHARS = 1024  # of an image's path; a base64 picture is longer
_PICTURES = re.compile(
    r"(image|img|picture|photo|video|frame)s?(_?(path|file|filename|file_name|url|bytes|base64)s?)?",
    re.IGNORECASE,
)
_SPACE = re.compile(r"[ \t\n\r]*")


@dataclass(frozen=True)
class BrokenRow:
    """A line that is not JSON, or a row that is not an object; reading continues after it."""

    reason: str


Row = dict[str, Any] | BrokenRow
Open = Callable[[], IO[bytes]]


class Place(NamedTuple):
    """Where a row starts: at byte `offset`; in JSONL, also its `line`, counted from 1."""

    offset: int = 0
    line: int = 1


@dataclass(frozen=True)
class Survey:
    """What a file holds. `starts`: the place of each part's first row."""

    starts: list[Place]
    num_rows: int
    names_images: bool


def survey(path: Path, rows_per_part: int) -> Survey:
    """Raises InputError for an empty file, and for a damaged array: there is no telling where its
    next element begins.
    """
    starts: list[Place] = []
    num_rows, names_images = 0, False
    size = path.stat().st_size
    with progress(name=f"look through {path.name}", unit="B", total=size, leave=False) as bar:
        for place, row in _rows(path, Place()):
            if num_rows % rows_per_part == 0:
                starts.append(place)
                bar.update(place.offset - bar.n)
            num_rows += 1
            names_images = names_images or (isinstance(row, dict) and bool(row.get("image")))
    return Survey(starts, num_rows, names_images)


def rows_of_part(path: Path, start: Place, count: int) -> list[Row]:
    """At most `count` rows from `start` on, which is a place from a survey."""
    return [row for _, row in islice(_rows(path, start), count)]


def stream_rows_and_broken(path: Path, open_file: Open | None = None) -> Iterator[Row]:
    """Rows of a LLaVA JSON array or JSONL file, with a BrokenRow in place of each broken one. Blank
    lines are skipped. Raises InputError as `survey` does.

    `open_file` opens a file that is not local, at its first byte; it need not be seekable.
    """
    return (row for _, row in _rows(path, Place(), open_file))


def _rows(path: Path, start: Place, opener: Open | None = None) -> Iterator[tuple[Place, Row]]:
    is_empty = True
    open_file = opener or partial(_plain, path)
    with open_file() as file:
        first = file.read(BLOCK_BYTES).removeprefix(codecs.BOM_UTF8).lstrip()[:1]
    values = _array_values if first == b"[" else _line_values
    for place, value in values(path, start, open_file):
        is_empty = False
        if isinstance(value, dict) and "unreadable" in value:  # written by collect_rows.py
            yield place, BrokenRow(str(value["unreadable"]))
        elif isinstance(value, dict) and is_deep(value):
            yield place, BrokenRow(f"it is nested more than {MAX_DEPTH} deep")
        elif isinstance(value, dict):
            yield place, _of_original(value)
        elif isinstance(value, BrokenRow):
            yield place, value
        else:
            yield place, BrokenRow(f"expected an object, found {type(value).__name__}")
    if is_empty:
        raise InputError(
            f"{path} holds no row, expected a non-empty list of objects in LLaVA format"
        )


def _plain(path: Path) -> IO[bytes]:
    return open(path, "rb")


def _of_original(row: dict[str, Any]) -> dict[str, Any]:
    """The LLaVA row inside a published token row, which was made from it; other rows unchanged."""
    original = row.get("original")
    if not isinstance(original, dict) or "conversations" in row:
        return row
    return original | {name: row[name] for name in ("id", "image", "category") if row.get(name)}


def stream_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Like `stream_rows_and_broken`, but raises InputError for a broken row, too."""
    for number, row in enumerate(stream_rows_and_broken(path), 1):
        if isinstance(row, BrokenRow):
            raise InputError(
                f"{path}, row {number}: {row.reason}; the file must be a list of objects in "
                "LLaVA format"
            )
        yield row


def image_keys(row: dict) -> list[str]:
    """A row's images: `image` is a path, a list of paths, or absent. Raises InputError for anything
    else, and for pictures under a different key.
    """
    image = row.get("image") or []
    keys = [image] if isinstance(image, str) else image
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise InputError(
            "expected an object whose `image` is a path or a list of paths, found "
            f"{str(image)[:60]!r}"
        )
    for key in keys:
        if key.startswith("data:") or len(key) > MAX_KEY_CHARS:
            raise InputError(
                f"`image` holds {len(key):,} characters that begin with {key[:40]!r}, expected a "
                "path: write the picture to a file and name that"
            )
    if not keys and (others := [key for key in row if row[key] and _PICTURES.fullmatch(key)]):
        raise InputError(
            f"the row has no `image`, but {others[0]!r}, which is not read: images belong under "
            "`image`, a path or a list of paths (videos are not supported)"
        )
    return keys


def named_images(json_path: Path) -> list[str]:
    """Sorted keys of the images named in a LLaVA JSON array or JSONL file.

    A warning counts broken rows and rows whose `image` is not a path (tokenize rejects them).
    Raises InputError if all rows are like that, or if there are no images.
    """
    keys: set[str] = set()
    num_malformed, first = 0, ""
    for number, row in enumerate(stream_rows_and_broken(json_path), 1):
        try:
            if isinstance(row, BrokenRow):
                raise InputError(row.reason)
            keys.update(image_keys(row))
        except InputError as error:
            num_malformed, first = num_malformed + 1, first or f"{json_path}, row {number}: {error}"
    if not keys:
        raise InputError(first or f"{json_path} names no images: there is nothing to encode")
    if first:
        print(f"warning: {num_malformed} rows were left out, the first is {first}")
    return sorted(keys)


def _behind_space(text: str, at: int) -> int:
    found = _SPACE.match(text, at)
    assert found is not None  # the pattern also matches nothing
    return found.end()


def _line_values(path: Path, start: Place, open_file: Open) -> Iterator[tuple[Place, Any]]:
    at, number = start
    with open_file() as file:
        if at:
            file.seek(at)
        while line := file.readline(MAX_ROW_CHARS):
            place = Place(at, number)
            at += len(line)
            if len(line) == MAX_ROW_CHARS and not line.endswith(b"\n"):
                while (rest := file.readline(BLOCK_BYTES)) and not rest.endswith(b"\n"):
                    at += len(rest)
                at += len(rest)
                yield place, BrokenRow(f"line {number} has {MAX_ROW_CHARS:,} bytes or more")
            elif text := (line.removeprefix(codecs.BOM_UTF8) if number == 1 else line).strip():
                if text == b"{" and number == 1:
                    raise InputError(
                        f"{path}, line 1: an object spans several lines; expected a "
                        "list of objects ([ … ], with commas between them), or one per line"
                    )
                yield place, _value_of_line(text, number)
            number += 1


def _value_of_line(text: bytes, number: int) -> Any:
    try:
        return json.loads(text.decode())
    except UnicodeDecodeError as error:
        found = f"UTF-8 text ({error.reason} at byte {error.start})"
    except json.JSONDecodeError as error:
        found = f"valid JSON ({error.msg} at character {error.pos + 1})"
    except NOT_READABLE as error:
        found = f"valid JSON ({error})"
    return BrokenRow(f"line {number} is not {found}")


def _array_values(path: Path, start: Place, open_file: Open) -> Iterator[tuple[Place, Any]]:
    """Elements of the array that the file is, from its opening bracket or an element on."""
    with open_file() as file:
        at_byte = start.offset
        if at_byte:
            file.seek(at_byte)
        text = io.TextIOWrapper(file, encoding="utf-8", newline="\n")
        try:
            yield from _elements(text, path, at_byte, is_inside=start.offset > 0)
        except UnicodeDecodeError as error:
            raise InputError(
                f"{path} is not UTF-8 text ({error}); was it copied completely?"
            ) from error


def _elements(
    file: IO[str], path: Path, at_byte: int, is_inside: bool
) -> Iterator[tuple[Place, Any]]:
    """Elements of an array from byte `at_byte` on: its bracket, or an element if `is_inside`."""
    decode = json.JSONDecoder().raw_decode
    buffer = file.read(BLOCK_CHARS)
    at = 0 if is_inside else buffer.index("[") + 1
    counted = 0  # characters of the buffer before `at_byte`
    dropped = 0  # characters before the buffer
    count = 0
    after_value = False
    while True:
        at = _behind_space(buffer, at)
        token = buffer[at : at + 1]
        if token == "]" and (after_value or not count):
            if (buffer[at + 1 :] + file.read(BLOCK_CHARS)).strip():
                raise InputError(
                    f"{path} is not valid JSON: something follows the array's closing bracket"
                )
            return
        if token == "," and after_value:
            at, after_value = at + 1, False
            continue
        problem = (
            f"expected a comma, found {token!r}" if token else "the array has no closing bracket"
        )
        wrong_at = at
        if token and not after_value:
            try:
                value, end = decode(buffer, at)
            except json.JSONDecodeError as error:
                problem, wrong_at = error.msg, error.pos
            except NOT_READABLE as error:
                problem = str(error)
            else:
                count, after_value = count + 1, True
                at_byte, counted = at_byte + len(buffer[counted:at].encode()), at
                yield Place(at_byte), value
                at = end
                continue
        is_long = len(buffer) - at > MAX_ROW_CHARS
        more = ""
        if not (token and after_value) and not is_long:
            more = file.read(max(BLOCK_CHARS, len(buffer) - at))
        if not more:
            if is_long:
                problem += f", or the element has more than {MAX_ROW_CHARS:,} characters"
            raise InputError(
                f"{path} is not valid JSON after element {count} (character "
                f"{dropped + wrong_at + 1:,}: {problem}); was it copied completely?"
            )
        at_byte, counted = at_byte + len(buffer[counted:at].encode()), 0
        dropped += at
        buffer, at = buffer[at:] + more, 0
