"""Writing files and folders so that a crash leaves the old content or the new one."""

from __future__ import annotations

import json
import os
import uuid
from pathlib import Path

from beingvl.errors import InputError


def write_atomically(path: Path | str, data: bytes | str) -> None:
    """Write to a temporary neighbour, flush it to disk, rename it: a reader never sees a part."""
    path = Path(path)
    # a name of its own: another host may have a process of the same number
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Flush a file that is written already to the disk."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def make_folder(folder: Path) -> Path:
    """Make a folder and its parents. Raises InputError when a file is in the way."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise InputError(
            f"{folder} cannot be made, a file is in the way; choose another folder to write in"
        ) from error
    return folder


def to_json(value: object) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def printable(text: str) -> str:
    """Replace what UTF-8 cannot write by escapes: names of files may be any bytes."""
    return text.encode("utf-8", "backslashreplace").decode()
