"""The one place that parses untrusted JSON, from files and users."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from beingvl.errors import InputError

MAX_DEPTH = 64  # ours has at most 8; deeper nesting overflows Python's stack, here or later


def parse_json(
    text: str | bytes,
    source: Path | str,
    remedy: str = "",
    make_object: Callable[[list[tuple[str, Any]]], Any] | None = None,
) -> Any:
    """The value; `make_object` makes objects from their (key, value) pairs.

    Raises InputError, with `source` and `remedy`, for anything but JSON in UTF-8, or if it is
    nested too deeply.
    """
    try:
        text = text.decode() if isinstance(text, bytes) else text
        value = json.loads(text, object_pairs_hook=make_object)
        if is_deep(value):
            raise RecursionError
        if "\\ud" in text.lower():  # perhaps half a surrogate pair, which UTF-8 cannot encode
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError as error:
        raise _not_json(source, f"nested more than {MAX_DEPTH} deep", remedy) from error
    except ValueError as error:
        raise _not_json(source, str(error), remedy) from error
    return value


def read_json(path: Path, remedy: str = "") -> Any:
    """The value in a file; raises InputError as `parse_json` does."""
    return parse_json(path.read_bytes(), path, remedy)


def read_object(path: Path, remedy: str = "") -> dict[str, Any]:
    """The object in a file; raises InputError for anything else."""
    fields = read_json(path, remedy)
    if not isinstance(fields, dict):
        raise InputError(f"{path} holds {type(fields).__name__}, expected a JSON object")
    return fields


def is_deep(value: Any) -> bool:
    """Whether lists and objects are nested more than MAX_DEPTH deep."""
    level, depth = [value] if isinstance(value, dict | list) else [], 0
    while level:
        depth += 1
        if depth > MAX_DEPTH:
            return True
        level = [
            child
            for item in level
            for child in (item.values() if isinstance(item, dict) else item)
            if isinstance(child, dict | list)
        ]
    return False


def _not_json(source: Path | str, found: str, remedy: str) -> InputError:
    return InputError(f"{source} is not valid JSON ({found}){remedy and f'; {remedy}'}")
