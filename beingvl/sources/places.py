"""Where a dataset lies: a file, a folder, a pattern, or an address in an object store.

    expand   what a user names -> the files that it means, sorted
    opened   a file for reading, here or there
    stamp    what changes when its content may have changed

Addresses (`s3://`, `gs://`, `hf://`, `https://`) need fsspec and a package for their protocol:
`pip install beingvl[remote]`.
"""

from __future__ import annotations

import errno
import glob
import io
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

from beingvl.errors import InputError

BLOCK_BYTES = 1 << 20  # asked of an object store at once
PAUSES_SECONDS = (0.5, 2, 8, 20)  # between the tries of one range
STAMPS = ("ETag", "etag", "md5Hash", "content-md5", "mtime", "LastModified", "last_modified")


def is_address(place: str) -> bool:
    return "://" in place


def as_place(path: Path | str) -> str:
    """A path or address as text; a Path has lost a slash of an address."""
    text = os.fspath(path)
    protocol, colon, rest = text.partition(":/")
    is_broken = bool(colon) and len(protocol) > 1 and "/" not in protocol and rest[:1] != "/"
    return f"{protocol}://{rest}" if is_broken else text


def expand(paths: Sequence[Path | str], suffixes: Sequence[str]) -> list[str]:
    """The files that `paths` mean: files as they are, of folders those below that end in one of
    `suffixes`, and what patterns match.

    Raises InputError for a path that means no file.
    """
    found: list[str] = []
    for place in map(as_place, paths):
        if is_address(place):
            matched = _expand_address(place, suffixes)
        elif os.path.isdir(place):
            everything = glob.glob("**", root_dir=place, recursive=True)
            matched = [os.path.join(place, name) for name in everything]
            matched = [name for name in matched if name.lower().endswith(tuple(suffixes))]
        else:
            matched = [place] if os.path.exists(place) else glob.glob(place, recursive=True)
            if not matched and not glob.has_magic(place):
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), place)
        if not matched:
            plain = [suffix for suffix in suffixes if suffix.count(".") == 1]  # not .json.gz
            raise InputError(
                f"{place} is not there, or holds no file that ends in {', '.join(plain)}"
            )
        found += sorted(matched)
    return list(dict.fromkeys(found))


def _expand_address(place: str, suffixes: Sequence[str]) -> list[str]:
    files, path = file_system(place)
    if "*" in place:
        matched = files.glob(path)
    elif place.startswith("http") or asked(place, lambda: files.isfile(path)):
        return [place]
    else:
        everything = asked(place, lambda: files.find(path))
        matched = [name for name in everything if name.lower().endswith(tuple(suffixes))]
    return [files.unstrip_protocol(name) for name in matched]


def file_system(place: str) -> tuple[Any, str]:
    """fsspec's file system for an address, and the path in it."""
    try:
        import fsspec  # an optional extra
    except ImportError as error:
        raise InputError(
            f"{place} is an address in an object store: pip install beingvl[remote]"
        ) from error
    try:
        return fsspec.core.url_to_fs(place)
    except (ImportError, ValueError) as error:
        raise InputError(f"{place}: {error}") from error


def asked(place: str, question: Callable[[], Any]) -> Any:
    """What an object store answers. Raises InputError for missing credentials or objects."""
    try:
        return question()
    except FileNotFoundError as error:
        raise InputError(f"{place} is not there") from error
    except PermissionError as error:
        raise InputError(f"{place}: access is denied; give credentials ({error})") from error
    except Exception as error:
        if "redential" in type(error).__name__ or "redential" in str(error):
            raise InputError(f"{place}: no credentials were found ({error})") from error
        raise


def opened(place: str) -> IO[bytes]:
    """The file, to be read from anywhere in it."""
    if not is_address(place):
        return open(place, "rb")
    return io.BufferedReader(_RemoteFile(place), BLOCK_BYTES)


class _RemoteFile(io.RawIOBase):
    """An object read by ranges; a range that fails or comes truncated is asked for again."""

    def __init__(self, place: str) -> None:
        self._place = place
        self._pid = os.getpid()
        self._files, self._path = file_system(place)
        self._size = int(asked(place, lambda: self._files.info(self._path))["size"])
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        end = min(self._at + len(buffer), self._size)
        if self._at >= end:
            return 0
        data = self._range(self._at, end)
        buffer[: len(data)] = data
        self._at = end
        return len(data)

    def _range(self, start: int, end: int) -> bytes:
        if self._pid != os.getpid():  # fsspec's connections do not survive a fork
            self._pid = os.getpid()
            self._files, self._path = file_system(self._place)
        for pause in (*PAUSES_SECONDS, None):
            problem = "it came truncated"
            try:
                data = self._files.cat_file(self._path, start=start, end=end)
                if len(data) == end - start:
                    return data
            except (FileNotFoundError, PermissionError) as error:
                raise InputError(f"{self._place} vanished while it was read ({error})") from error
            except Exception as error:  # each protocol has its own
                problem = f"{type(error).__name__}: {error}"
            if pause is None:
                raise OSError(
                    errno.EIO, f"bytes {start} … {end} cannot be read ({problem})", self._place
                )
            time.sleep(pause)
        raise AssertionError


def stamp(place: str) -> str:
    """Size, and the store's own mark or the time: equal stamps, equal bytes."""
    if not is_address(place):
        found = os.stat(place)
        return f"{found.st_size} {found.st_mtime_ns}"
    files, path = file_system(place)
    facts = asked(place, lambda: files.info(path))
    mark = next((facts[name] for name in STAMPS if facts.get(name)), "")
    return f"{facts.get('size')} {mark}"
