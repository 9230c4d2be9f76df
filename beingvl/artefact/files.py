"""Writing files and folders so that a crash leaves the old content or the new one."""

from __future__ import annotations

import json
import os
import shutil
import unicodedata
import uuid
from collections.abc import Iterable
from pathlib import Path

from beingvl.errors import InputError


def write_atomically(path: Path | str, data: bytes | str, mode: int = 0o666) -> None:
    """Write to a temporary neighbour, flush it to disk, rename it: a reader never sees a part.
    `mode` is the file's, less the umask.
    """
    path = Path(path)
    # a name of its own: another host may have a process of the same number
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "wb", opener=lambda name, flags: os.open(name, flags, mode)) as file:
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


def give_usual_mode(path: Path) -> None:
    """The mode of a file that `open` makes: safetensors makes files that only their owner reads."""
    new = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        new.touch(exist_ok=False)
        path.chmod(new.stat().st_mode)
    finally:
        new.unlink(missing_ok=True)


def make_folder(folder: Path) -> Path:
    """Make a folder and its parents. Raises InputError when a file is in the way."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise InputError(
            f"{folder} cannot be made, a file is in the way; choose another folder to write in"
        ) from error
    return folder


def path_inside(folder: Path, name: str) -> Path:
    """The path in `folder` of a name that a file gave us: manifests, weight indexes, keys.

    A snapshot in the cache of Hugging Face is links into the `blobs` beside it, which count as
    inside. Raises InputError for a name that is absolute, has `..` or a NUL, is not a file's name,
    or leads through a symbolic link out of the folder.
    """
    refuse_outside(name, folder)
    path, where = folder / name, folder.absolute()
    snapshots = [parent for parent in where.parents if parent.name == "snapshots"]
    roots = [os.path.realpath(root) for root in (where, *(at.parent / "blobs" for at in snapshots))]
    real = os.path.realpath(path)
    if not any(real.startswith(f"{root}/") for root in roots):
        raise InputError(
            f"{path} leads out of {folder}, to {real}; put the file itself in the place of the link"
        )
    return path


def copy_inside(source: Path, target: Path, names: Iterable[str]) -> None:
    """Copy files to the same places below another folder. Raises InputError as `path_inside`."""
    for name in names:
        copy = path_inside(target, name)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path_inside(source, name), copy)


def refuse_outside(name: str, source: Path) -> None:
    """Raises InputError, in the name of `source`, for what no file below a folder is called."""
    parts = printable(name).split("/")
    is_name = printable(name) == name and "\0" not in name and name not in ("", ".")
    is_short = len(name) < 1000 and all(len(part.encode()) <= 255 for part in parts)
    if not (is_name and is_short) or name.startswith("/") or ".." in parts:
        raise InputError(
            f"{source} names the file {name[:200]!r}, which cannot lie in its folder; "
            "do not use it, or get it again from a source that you trust"
        )


def to_json(value: object) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def printable(text: str) -> str:
    """Replace what UTF-8 cannot write by escapes: names of files may be any bytes."""
    return text.encode("utf-8", "backslashreplace").decode()


def spellings(name: str) -> list[str]:
    """A file's name as it is given, then with its accents composed and decomposed (Unicode's NFC
    and NFD): macOS and others write é differently.
    """
    forms = [unicodedata.normalize("NFC", name), unicodedata.normalize("NFD", name)]
    return list(dict.fromkeys([name, *forms]))
