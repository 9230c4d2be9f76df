"""Write files and folders so that a crash leaves either the old or the new content."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import unicodedata
import uuid
from collections.abc import Iterable, Sequence
from pathlib import Path

from beingvl.errors import InputError


def write_atomically(path: Path | str, data: bytes | str, mode: int = 0o666) -> None:
    """Write to a temporary file beside `path`, flush it to disk, rename it: readers never see a
    partial file. `mode` is the file's, before the umask.
    """
    path = Path(path)
    # The name is unique, because another host may have a process with the same id.
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
    """Flush an already written file to disk."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def give_usual_mode(path: Path) -> None:
    """Give a file the mode that `open` would: safetensors makes files that only the owner reads."""
    new = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        new.touch(exist_ok=False)
        path.chmod(new.stat().st_mode)
    finally:
        new.unlink(missing_ok=True)


def make_folder(folder: Path) -> Path:
    """Make a folder and its parents. Raises InputError if a file is in the way."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise InputError(
            f"{folder} cannot be made, a file is in the way; choose another folder to write in"
        ) from error
    return folder


def path_inside(folder: Path, name: str) -> Path:
    """The path in `folder` of an untrusted name: from manifests, weight indexes, keys.

    A snapshot in Hugging Face's cache consists of links into the `blobs` beside it, which count as
    inside. Raises InputError for a name that is absolute, contains `..` or NUL, is not a file name,
    or leads out of the folder through a symbolic link.
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
    """Copy files to the same relative paths in `target`. Raises InputError like `path_inside`."""
    for name in names:
        copy = path_inside(target, name)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path_inside(source, name), copy)


def refuse_outside(name: str, source: Path) -> None:
    """Raises InputError, which names `source`, if `name` cannot be a file below a folder."""
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
    """Escape what UTF-8 cannot encode: file names may be any bytes."""
    return text.encode("utf-8", "backslashreplace").decode()


def bare(text: str) -> str:
    """An address, alone or at the end of an option, less user and password, and of https less what
    follows its name: `?download=true`, or a signature.
    """
    text = re.sub(r"(https?://[^?]*)[?].*", r"\1", text, flags=re.DOTALL | re.IGNORECASE)
    return re.sub(r"://[^/]*@", "://", text)


def command_line(words: Sequence[str]) -> str:
    """A process's words as a shell reads them, without the secrets in addresses."""
    return printable(shlex.join(map(bare, words)))


def spellings(name: str) -> list[str]:
    """A file name as given, then with composed and decomposed accents (Unicode's NFC and NFD):
    macOS and other systems write é differently.
    """
    forms = [unicodedata.normalize("NFC", name), unicodedata.normalize("NFD", name)]
    return list(dict.fromkeys([name, *forms]))
