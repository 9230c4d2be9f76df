"""Tables as text: CSV and TSV with a header, as UTF-8."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from typing import IO, Any

from beingvl.errors import InputError

DELIMITERS = {".csv": ",", ".tsv": "\t"}
OTHERS = (",", "\t", ";", "|")
MAX_FIELD_CHARS = 1 << 26


def records_of_table(file: IO[str], place: str, suffix: str) -> Iterator[dict[str, Any]]:
    """One record per line below the header; empty cells are left out.

    Raises InputError for a file without a header of several columns, such as one with another
    delimiter. A line of the wrong length becomes {"unreadable": reason}.
    """
    delimiter = DELIMITERS[suffix]
    csv.field_size_limit(MAX_FIELD_CHARS)
    lines = csv.reader(_lines(file, place), delimiter=delimiter, strict=True)
    header = _next(lines, place) or []
    if len(header) < 2:
        shown = header[0] if header else ""
        other = next((found for found in OTHERS if found != delimiter and found in shown), None)
        hint = f"; it seems to be separated by {other!r}" if other else ""
        raise InputError(
            f"{place} has one column, {shown[:60]!r}, where {suffix} files are separated by "
            f"{delimiter!r}{hint}: save it with that delimiter"
        )
    if len(set(header)) != len(header):
        raise InputError(f"{place} has two columns of one name: {header}")
    while (line := _next(lines, place)) is not None:
        if not line:
            continue
        if len(line) != len(header):
            found = f"line {lines.line_num} has {len(line)} fields, the header {len(header)}"
            yield {"unreadable": found}
        else:
            yield {name: cell for name, cell in zip(header, line, strict=True) if cell}


def _lines(file: IO[str], place: str) -> Iterator[str]:
    while line := file.readline(MAX_FIELD_CHARS):
        if len(line) == MAX_FIELD_CHARS:
            raise InputError(f"{place} has a line of {MAX_FIELD_CHARS:,} characters or more")
        yield line


def _next(lines: Any, place: str) -> list[str] | None:
    try:
        return next(lines, None)
    except (csv.Error, UnicodeDecodeError) as error:
        remedy = "correct its quotes" if isinstance(error, csv.Error) else "save it as UTF-8"
        raise InputError(f"{place}, line {lines.line_num + 1}: {error}; {remedy}") from error
