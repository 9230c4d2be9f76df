"""Where a dataset lies: a file, a folder, a pattern, or an address in an object store.

    expand    what a user names -> the files that it means, sorted
    listing   what lies below an address -> its stamps
    opened    a file for reading, here or there
    fetch     a whole one of an address
    stamp     what changes when its content may have changed
    asked     how a store is asked for any of these: again, after pauses, where that may help

Addresses (`s3://`, `gs://`, `hf://`, `https://`) need a package for their protocol:
`pip install '.[remote]'`. Whatever a store ends with is an OSError, never an InputError: an
image is not rejected, and no row is lost, because a connection or somebody's credentials were.
"""

from __future__ import annotations

import errno
import glob
import io
import os
import random
import re
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import IO, Any
from urllib.request import urlopen

import fsspec
from fsspec.utils import glob_translate

from beingvl.artefact.files import bare
from beingvl.errors import InputError

BLOCK_BYTES = 1 << 20  # asked of a store at once, at least
RANGE_BYTES = 1 << 23  # at most: what a lost connection costs
WHOLE_BYTES = 1 << 26  # of an object whose size its server does not say
PAUSES_SECONDS = (0.5, 2, 8, 20)  # between the tries, give or take half
SILENCE_SECONDS = 20  # of an https server, after which it is asked again
MAY_CHANGE = (408, 425, 429)  # the 4xx of HTTP that ask for patience
MARKS = ("ETag", "etag", "md5Hash", "Content-MD5", "blob_id", "mtime")
TIMES = ("LastModified", "Last-Modified", "last_modified")
# Names of errors of botocore, google.auth and huggingface_hub, whose settings would not change.
OF_ACCESS = re.compile("redential|Profile|Config|Region|Token|SSO|Login")
COUNTS = "_stats.json"  # how the name of img2dataset's counts beside a tar file ends
Question = Callable[[Any, str], Any]  # of fsspec's file system and a path in it


def is_address(place: str) -> bool:
    return "://" in place


def file_name(place: Path | str) -> str:
    return os.path.basename(bare(os.fspath(place)))


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
            matched = without_notes(place, matched)
        else:
            matched = [place]
            if not os.path.exists(place):
                matched = without_notes(place, glob.glob(place, recursive=True))
            if not matched and not glob.has_magic(place):
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), place)
        if not matched:
            plain = [suffix for suffix in suffixes if suffix.count(".") == 1]  # not .json.gz
            raise InputError(
                f"{place} is not there, or holds no file that ends in {', '.join(plain)}"
            )
        found += sorted(matched)
    return list(dict.fromkeys(found))


def without_notes(folder: str, files: Sequence[str]) -> list[str]:
    """The files of a folder less what img2dataset writes beside each of its tar files: counts, and
    a table of the same rows. A tar without counts is not img2dataset's. Prints what was left out.
    """
    tars = {file.removesuffix(".tar") for file in files if file.endswith(".tar")}
    counted = {file.removesuffix(COUNTS) for file in files if file.endswith(COUNTS)}
    notes = {f"{stem}{end}" for stem in tars & counted for end in (".parquet", COUNTS)}
    if left_out := [file for file in files if file in notes]:
        print(
            f"{folder}: left out {len(left_out)} of img2dataset's files, such as "
            f"{file_name(min(left_out))}; the tar files beside them hold the same rows"
        )
    return [file for file in files if file not in notes]


def _expand_address(place: str, suffixes: Sequence[str]) -> list[str]:
    if place.startswith("http") and "*" not in place:
        return [place]
    found = listing(place)
    if place in found:
        return list(found)
    if "*" in place:
        return without_notes(place, list(found))
    return without_notes(place, [name for name in found if name.lower().endswith(tuple(suffixes))])


def listing(place: str) -> dict[str, str]:
    """Address -> stamp of the object of that name, of those that a pattern matches, or of those
    below a folder. Raises InputError for https, which has no listings.
    """
    if place.startswith("http"):
        raise InputError(f"{bare(place)}: a web server does not list its files; name each of them")

    def find(files: Any, path: str) -> dict[str, str]:
        # fsspec's own glob leaves out silently what it could not list
        before, star, _ = path.partition("*")
        matches = re.compile(glob_translate(path) if star else "").match
        found = files.find(before.rpartition("/")[0] if star else path, detail=True)
        return {
            files.unstrip_protocol(name): _stamp_of(facts)
            for name, facts in sorted(found.items())
            if matches(name)
        }

    return asked(place, find)


def file_system(place: str, forget: bool = True) -> tuple[Any, str]:
    """fsspec's file system for an address, and the path in it. It is to `forget` what it has seen,
    so that what changed is noticed.
    """
    try:
        files, path = fsspec.core.url_to_fs(place)
        if place.startswith("http"):
            import aiohttp  # an optional extra

            quiet = {"sock_connect": SILENCE_SECONDS, "sock_read": SILENCE_SECONDS}
            timeout = aiohttp.ClientTimeout(total=None, **quiet)
            files.client_kwargs = {"timeout": timeout, "trust_env": True} | files.client_kwargs
    except ImportError as error:
        raise InputError(f"{bare(place)}: {error}: pip install '.[remote]'") from error
    except ValueError as error:
        raise InputError(f"{bare(place)}: {error}") from error
    files.retries = 1  # of s3fs, whose tries would multiply ours in silence
    if forget:
        files.invalidate_cache()
    return files, path


def asked(place: str, question: Question, forget: bool = True) -> Any:
    """What a store answers; asked again after pauses, each said in a line.

    Raises FileNotFoundError, PermissionError or ConnectionAbortedError, each with its sentence.
    """
    for pause in (*PAUSES_SECONDS, None):
        try:
            return question(*file_system(place, forget))
        except InputError:
            raise
        except Exception as error:  # each protocol has its own
            if final := _final(error, place):
                raise final from error
            origin = _origin(error, place)
            reason = f"{type(origin).__name__}: {_said(origin)}"
        if pause is not None:
            pause *= random.uniform(0.5, 1.5)  # many processes need not come back at once
            again = f"{bare(place)}: {reason}; asked again in {pause:.1f} s"
            print(again, file=sys.stderr, flush=True)
            time.sleep(pause)
    tries = len(PAUSES_SECONDS) + 1
    raise OSError(errno.ECONNABORTED, f"not read in {tries} tries ({reason})", bare(place))


def _final(error: Exception, place: str) -> OSError | None:
    """What asking again would not change; None for the rest."""
    origin = _origin(error, place)
    status = getattr(origin, "status", None)
    status = status or getattr(getattr(origin, "response", None), "status_code", None)
    said, number = _said(error), getattr(error, "errno", None)
    is_denied = isinstance(error, PermissionError) or status in (401, 403)
    if is_denied or OF_ACCESS.search(type(error).__name__) or "redential" in said:
        reason = f"access is denied, or credentials are missing or wrong ({said})"
        return PermissionError(errno.EACCES, reason, bare(place))
    if isinstance(error, FileNotFoundError) and (origin is error or status in (404, 410)):
        reason = error.strerror if error.strerror and number else "it is not there"
        return FileNotFoundError(errno.ENOENT, reason, bare(place))
    is_refused = status in range(400, 500) and status not in MAY_CHANGE
    if is_refused or type(error) is ValueError or number == errno.EINVAL:
        return FileNotFoundError(errno.ENOENT, f"it cannot be read ({said})", bare(place))
    return None


def _origin(error: Exception, place: str) -> BaseException:
    """fsspec's https says of whatever happened that the file was not found."""
    is_web = isinstance(error, FileNotFoundError) and place.startswith("http")
    return (error.__cause__ if is_web else None) or error


def _said(error: BaseException) -> str:
    """Without the query of an address, which may be a signature."""
    return re.sub(r"\?\S*", "", " ".join(str(error).split()))[:200]


def opened(place: str) -> IO[bytes]:
    """The file, to be read from anywhere in it."""
    if not is_address(place):
        return open(place, "rb")
    return io.BufferedReader(_RemoteFile(place), BLOCK_BYTES)


def fetch(place: str, max_bytes: int) -> bytes:
    """A whole object at an address; one of the web needs no extra. Raises InputError when it cannot
    be had, or has more than `max_bytes`.
    """
    try:
        of_web = place.startswith(("http://", "https://"))
        with urlopen(place, timeout=SILENCE_SECONDS) if of_web else opened(place) as file:
            data = file.read(max_bytes + 1)
    except OSError as error:
        raise InputError(f"{bare(place)} cannot be read ({error})") from error
    if len(data) > max_bytes:
        raise InputError(f"{bare(place)} has more than {max_bytes:,} bytes")
    return data


class _RemoteFile(io.RawIOBase):
    """An object read by ranges. Raises FileNotFoundError when it is no longer what was opened."""

    def __init__(self, place: str) -> None:
        self._place, self._stamp, self._at = place, "", 0
        self._file: Any = None
        self._pid = 0
        self._size: int = asked(place, self._open)

    def _open(self, files: Any, path: str) -> int:
        """Returns its size."""
        file = files.open(path, "rb", cache_type="none")  # s3 is told which version to send
        facts = getattr(file, "details", {})
        facts = facts if any(map(facts.get, MARKS)) else files.info(path)
        stamp, size = _stamp_of(facts), facts["size"]
        if self._stamp not in ("", stamp):
            reason = f"it changed while it was read ({self._stamp}, now {stamp})"
            raise FileNotFoundError(errno.ENOENT, reason, self._place)
        if size is None:
            file = io.BytesIO(_whole(file))
            size = len(file.getbuffer())
        self._file, self._stamp, self._pid = file, stamp, os.getpid()
        return size

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
        end = min(self._at + min(len(buffer), RANGE_BYTES), self._size)
        if self._at >= end:
            return 0
        data = asked(self._place, partial(self._range, self._at, end))
        buffer[: len(data)] = data
        self._at = end
        return len(data)

    def _range(self, start: int, end: int, files: Any, path: str) -> bytes:
        if self._file is None or self._pid != os.getpid():  # connections do not survive a fork
            self._open(files, path)
        file, self._file = self._file, None  # opened anew, and compared, when this fails
        file.seek(start)
        data = file.read(end - start)
        _refuse_truncated(data, end - start)
        self._file = file
        return data


def _whole(file: Any) -> bytes:
    data = bytearray()
    while len(data) <= WHOLE_BYTES and (block := file.read(BLOCK_BYTES)):
        data += block
    if len(data) > WHOLE_BYTES:
        raise ValueError(f"its server does not say its size, and it has over {WHOLE_BYTES:,} bytes")
    return bytes(data)


def _refuse_truncated(data: bytes, size: int) -> None:
    if len(data) != size:
        raise OSError(f"{len(data)} of {size} bytes came")


def read_object(place: str, size: int) -> bytes:
    """A small one, of known size, in one request; hf:// lists its folder, which may be large, when
    it has forgotten it.
    """

    def read(files: Any, path: str) -> bytes:
        data = files.cat_file(path, start=0, end=size) if size else b""
        _refuse_truncated(data, size)
        return data

    return asked(place, read, forget=False)


def stamp(place: str) -> str:
    """Size, and the store's own mark or the time: equal stamps, equal bytes."""
    if not is_address(place):
        found = os.stat(place)
        return f"{found.st_size} {found.st_mtime_ns}"
    return asked(place, lambda files, path: _stamp_of(files.info(path)))


def stamps_elsewhere(places: Iterable[str]) -> dict[str, str]:
    """Address -> stamp as it is now, of those places that are addresses."""
    return {bare(place): stamp(place) for place in places if is_address(place)}


def _stamp_of(facts: dict[str, Any]) -> str:
    mark = next((facts[name] for name in (*MARKS, *TIMES) if facts.get(name)), "")
    return f"{facts.get('size')} {mark}"
