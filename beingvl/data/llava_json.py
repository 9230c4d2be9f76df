"""LLaVA-format files read row by row: a JSON array or JSONL of any size, in the memory of one
row and one block.

The standard library's own decoder reads one element after the other out of a buffer that is
refilled at its end. (It makes the rows about as fast as `json.load` of the whole file; a parser of
single events, such as ijson, hands every bracket to Python.)
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from beingvl.errors import InputError

BLOCK_CHARS = 1 << 20
BLOCK_BYTES = 1 << 20  # more than any space before the first row
MAX_ROW_CHARS = 1 << 26  # in JSONL: bytes
MAX_DEPTH = 64  # of a row, which other processes and files must take too
NOT_READABLE = (
    ValueError,
    RecursionError,
)  # no JSON, a number of thousands of digits; nested too deeply
_SPACE = re.compile(r"[ \t\n\r]*")


@dataclass(frozen=True)
class BrokenRow:
    """A line of JSONL that is no JSON, or a row that is no object: the file goes on behind it."""

    reason: str


def stream_rows_and_broken(path: Path) -> Iterator[dict[str, Any] | BrokenRow]:
    """Rows of a LLaVA JSON array or JSONL file, and what stands in the place of one. Blank lines
    are no rows.

    Raises InputError for an empty file, and for a damaged array: nothing says where its next
    element would begin.
    """
    count = 0
    with open(path, "rb") as file:
        start = file.read(BLOCK_BYTES).removeprefix(codecs.BOM_UTF8).lstrip()
    for value in _array_values(path) if start[:1] == b"[" else _line_values(path):
        count += 1
        if isinstance(value, dict) and _is_deep(value):
            yield BrokenRow(f"it is nested more than {MAX_DEPTH} deep")
        elif isinstance(value, dict | BrokenRow):
            yield value
        else:
            yield BrokenRow(f"expected an object, found {type(value).__name__}")
    if not count:
        raise InputError(
            f"{path} holds no row, expected a non-empty list of objects in LLaVA format"
        )


def _is_deep(value: Any, left: int = MAX_DEPTH) -> bool:
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return bool(inside) and (left == 0 or any(_is_deep(child, left - 1) for child in inside))


def stream_rows(path: Path) -> Iterator[dict[str, Any]]:
    """As `stream_rows_and_broken`, but raises InputError for a broken row as well."""
    for number, row in enumerate(stream_rows_and_broken(path), 1):
        if isinstance(row, BrokenRow):
            raise InputError(
                f"{path}, row {number}: {row.reason}; the file must be a list of objects in "
                "LLaVA format"
            )
        yield row


def image_keys(row: dict) -> list[str]:
    """The images of a row: `image` is a path, a list of paths, or absent. Raises InputError for
    anything else.
    """
    image = row.get("image") or []
    keys = [image] if isinstance(image, str) else image
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise InputError(
            "expected an object whose `image` is a path or a list of paths, found "
            f"{str(image)[:60]!r}"
        )
    return keys


def named_images(json_path: Path) -> list[str]:
    """Sorted keys of the images that a LLaVA JSON array or JSONL file names.

    Broken rows, or rows whose `image` is not a path, are counted in a warning (tokenize rejects
    them). Raises InputError when there are only such rows, or no images.
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
    assert found is not None  # no space at all matches too
    return found.end()


def _line_values(path: Path) -> Iterator[Any]:
    with open(path, "rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(MAX_ROW_CHARS), b""), 1):
            if len(line) == MAX_ROW_CHARS and not line.endswith(b"\n"):
                while (rest := file.readline(BLOCK_BYTES)) and not rest.endswith(b"\n"):
                    pass
                yield BrokenRow(f"line {number} has {MAX_ROW_CHARS:,} bytes or more")
            elif text := (line.removeprefix(codecs.BOM_UTF8) if number == 1 else line).strip():
                try:
                    yield json.loads(text.decode())
                except UnicodeDecodeError as error:
                    yield BrokenRow(
                        f"line {number} is not UTF-8 text ({error.reason} at byte {error.start})"
                    )
                except json.JSONDecodeError as error:
                    yield BrokenRow(
                        f"line {number} is not valid JSON ({error.msg} at character "
                        f"{error.pos + 1})"
                    )
                except NOT_READABLE as error:
                    yield BrokenRow(f"line {number} is not valid JSON ({error})")


def _array_values(path: Path) -> Iterator[Any]:
    try:
        with open(path, encoding="utf-8-sig", newline="\n") as file:
            yield from _elements(file, path)
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path} is not UTF-8 text ({error}); was it copied completely?"
        ) from error


def _elements(file: IO[str], path: Path) -> Iterator[Any]:
    """Elements of an array, which the file is."""
    decode = json.JSONDecoder().raw_decode
    buffer = file.read(BLOCK_CHARS)
    at = _behind_space(buffer, 0) + 1  # the bracket
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
            "the array has no closing bracket"
            if not token
            else f"expected a comma, found {token!r}"
        )
        wrong_at = at
        if token and not after_value:
            try:
                value, at = decode(buffer, at)
            except NOT_READABLE as error:
                problem, wrong_at = (
                    (error.msg, error.pos)
                    if isinstance(error, json.JSONDecodeError)
                    else (str(error), at)
                )
            else:
                count, after_value = count + 1, True
                yield value
                continue
        is_long = len(buffer) - at > MAX_ROW_CHARS
        more = (
            ""
            if (token and after_value) or is_long
            else file.read(max(BLOCK_CHARS, len(buffer) - at))
        )
        if not more:
            problem += (
                f", or the element has more than {MAX_ROW_CHARS:,} characters" if is_long else ""
            )
            where = f"character {dropped + wrong_at + 1:,}"
            raise InputError(
                f"{path} is not valid JSON behind element {count} ({where}: {problem}); was it "
                "copied completely?"
            )
        dropped += at
        buffer, at = buffer[at:] + more, 0
