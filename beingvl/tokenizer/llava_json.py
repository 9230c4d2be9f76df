"""LLaVA-format files read row by row: a JSON array or JSONL of any size, in the memory of one row and one block.

The standard library's own decoder reads one element after the other out of a buffer that is refilled at its end. (It makes the
rows about as fast as `json.load` of the whole file; a parser of single events, such as ijson, hands every bracket to Python.)
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from beingvl.errors import InputError

BLOCK_CHARS = 1 << 20
MAX_ROW_CHARS = 1 << 26
NOT_READABLE = (ValueError, RecursionError)  # no JSON, a number of thousands of digits; nested too deeply
_SPACE = re.compile(r"[ \t\n\r]*")


def stream_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of a LLaVA JSON array or JSONL file. Raises InputError that says where the file is damaged."""
    count = 0
    try:
        with open(path, encoding="utf-8-sig", newline="\n") as file:
            for row in _values(file, path):
                count += 1
                if not isinstance(row, dict):
                    found = f"{path}, row {count}: expected an object, found {type(row).__name__}"
                    raise InputError(f"{found}; the file must be a list of objects in LLaVA format")
                yield row
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text ({error}); was it copied completely?") from error
    if not count:
        raise InputError(f"{path} holds no row, expected a non-empty list of objects in LLaVA format")


def image_keys(row: dict) -> list[str]:
    """The images of a row: `image` is a path, a list of paths, or absent. Raises InputError for anything else."""
    image = row.get("image") or []
    keys = [image] if isinstance(image, str) else image
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise InputError(f"expected an object whose `image` is a path or a list of paths, found {str(image)[:60]!r}")
    return keys


def _values(file: IO[str], path: Path) -> Iterator[Any]:
    buffer = file.read(BLOCK_CHARS)
    start = _behind_space(buffer, 0)
    if buffer[start : start + 1] == "[":
        return _array_values(file, path, buffer, start + 1)
    file.seek(0)
    return _line_values(file, path)


def _behind_space(text: str, at: int) -> int:
    found = _SPACE.match(text, at)
    assert found is not None  # no space at all matches too
    return found.end()


def _line_values(file: IO[str], path: Path) -> Iterator[Any]:
    for number, line in enumerate(file, 1):
        if line.strip():
            try:
                yield json.loads(line)
            except NOT_READABLE as error:
                raise InputError(f"{path}, line {number}: not valid JSON ({error})") from error


def _array_values(file: IO[str], path: Path, buffer: str, at: int) -> Iterator[Any]:
    """Elements of an array whose opening bracket has been read; `buffer[at:]` is what follows it."""
    decode = json.JSONDecoder().raw_decode
    count = 0
    after_value = False
    while True:
        at = _behind_space(buffer, at)
        token = buffer[at : at + 1]
        if token == "]" and (after_value or not count):
            if (buffer[at + 1 :] + file.read(BLOCK_CHARS)).strip():
                raise InputError(f"{path} is not valid JSON: something follows the array's closing bracket")
            return
        if token == "," and after_value:
            at, after_value = at + 1, False
            continue
        problem = "the array has no closing bracket" if not token else f"expected a comma, found {token!r}"
        if token and not after_value:
            try:
                value, at = decode(buffer, at)
            except NOT_READABLE as error:
                problem = str(error)
            else:
                count, after_value = count + 1, True
                yield value
                continue
        more = (
            "" if (token and after_value) or len(buffer) - at > MAX_ROW_CHARS else file.read(max(BLOCK_CHARS, len(buffer) - at))
        )
        if not more:
            raise InputError(f"{path} is not valid JSON behind element {count} ({problem}); was it copied completely?")
        buffer, at = buffer[at:] + more, 0
