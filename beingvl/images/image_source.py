"""Where images come from: a folder or tar files (webdataset shards), local or in an object store.
An image's key is its path below the folder or in the tar.

An image that does not exist, or is not a regular file, is rejected. If the disk fails, the read is
retried a few times; then the step ends, so a failing disk never rejects an image.
"""

from __future__ import annotations

import errno
import os
import stat
import time
from collections import Counter, deque
from collections.abc import Callable, Container, Iterator, Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, Protocol

from beingvl.artefact.files import printable, spellings
from beingvl.artefact.hashes import hash_bytes
from beingvl.artefact.progress import progress
from beingvl.errors import InputError
from beingvl.images.table_images import NO_STAMP, TableImages
from beingvl.sources.places import (
    COUNTS,
    as_place,
    bare,
    expand,
    file_name,
    is_address,
    listing,
    opened,
    read_object,
    stamp,
    stamps_elsewhere,
    without_notes,
)
from beingvl.sources.tables import SUFFIXES as TABLES
from beingvl.sources.tars import members_of

IMAGE_SUFFIXES = frozenset(
    {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}
)
CONTAINERS = (".tar", *TABLES)
LOOKED_FOR = ", ".join(sorted(IMAGE_SUFFIXES))
MAX_FILE_BYTES = 1 << 30
PAUSES_SECONDS = (0.5, 2, 8)  # between attempts to read
NOT_THERE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP)
LINK_OUT = "a link out of the image folder"


class ImageSource(Protocol):
    def keys(self) -> list[str]:
        """Sorted keys of all images; prints what was left out. Raises InputError without images."""

    def read(self, key: str) -> bytes:
        """One file's bytes. Raises InputError if it does not exist, OSError if the disk fails."""

    def stamp(self, key: str) -> str:
        """Size and time of an image's file, or NO_STAMP. Equal stamps mean equal bytes."""

    def elsewhere(self, keys: Sequence[str]) -> dict[str, str]:
        """URL -> current stamp, for all remote places that these images are read from."""


def _refuse_large(name: Path | str, size: int) -> None:
    if size > MAX_FILE_BYTES:
        raise InputError(f"{name} has {size:,} bytes, expected at most {MAX_FILE_BYTES:,}")


def read_file(path: Path) -> bytes:
    """A regular file's bytes. Raises InputError for other files: a FIFO would wait for a writer,
    and opening a device may do anything.
    """
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise InputError(f"{path} is not a regular file; it was not opened")
    _refuse_large(path, found.st_size)
    return path.read_bytes()


def read_patiently(path: Path | str, read: Callable[[], bytes]) -> bytes:
    """The result of `read` for `path`; retried after pauses if the disk fails."""
    for pause in (*PAUSES_SECONDS, None):
        try:
            return read()
        except OSError as error:
            if pause is None or error.errno in NOT_THERE:
                error.filename = str(path)  # a failing read does not set it
                raise
        time.sleep(pause)
    raise AssertionError


def open_images(named: Sequence[Path | str]) -> ImageSource:
    """Images of one folder (with image files, tar files or tables), or of tar files or tables;
    never a mixture.
    """
    places = [as_place(path) for path in named]
    tables = [place for place in places if file_name(place).lower().endswith(TABLES)]
    if len(tables) == len(places):
        return TableImages(expand(places, TABLES))
    if tables:
        other = next(place for place in places if place not in tables)
        raise InputError(
            f"--image_path: {bare(tables[0])} is a table and {bare(other)} is not; give tables or "
            "tar files, not both"
        )
    if any(map(is_address, places)) and all(map(_is_tar, map(file_name, places))):
        return TarImages(expand(places, (".tar",)))
    if len(places) == 1 and is_address(places[0]):
        return _open_folder_elsewhere(places[0].rstrip("/"))
    paths = [Path(place) for place in places]
    if len(paths) == 1 and paths[0].is_dir():
        folder = FolderImages(paths[0])
        names = (path.name for path in paths[0].iterdir() if _is_looked_at(path.name))
        files = [name for name in names if (paths[0] / name).is_file()]
        return _containers_in(places[0], files, folder) or folder
    for path in paths:
        if path.is_dir():
            raise InputError(
                f"--image_path {path} is a folder beside other paths; give one folder, or tar files"
            )
        if not path.is_file():
            found = bare(as_place(path))
            raise InputError(f"--image_path {found} is not a folder and not a tar file")
    return TarImages(places)


def _open_folder_elsewhere(folder: str) -> ImageSource:
    images = AddressImages(folder)
    names = [name for name in images.stamps if "/" not in name and _is_looked_at(name)]
    return _containers_in(folder, names, images) or images


def _is_tar(name: str) -> bool:
    return name.lower().endswith(".tar")


def _is_container(name: str) -> bool:
    return name.lower().endswith(CONTAINERS)


def _is_looked_at(name: str) -> bool:
    """Whether a name in a folder says something about containers in there."""
    return name.lower().endswith((*CONTAINERS, COUNTS))


def _containers_in(
    folder: str, names: Sequence[str], images: FolderImages | AddressImages
) -> ImageSource | None:
    """The tar files or tables among these names, directly in a folder; None if there are none, or
    only tables beside images (such as metadata.parquet). Raises InputError for tar files beside
    images.
    """
    if not any(map(_is_container, names)):
        return None
    if (image := images.any_key()) is None:
        found = filter(_is_container, without_notes(folder, sorted(names)))
        return open_images([f"{folder}/{name}" for name in found])
    if tars := sorted(filter(_is_tar, names)):
        raise InputError(
            f"--image_path {folder} holds tar files ({tars[0]}) and images ({image}): "
            "name the tar files, or move them out of the folder"
        )
    return None


def _spelled(key: str, names: Container[str]) -> str | None:
    """The spelling of the key that is in `names`, if any."""
    return next((name for name in spellings(key) if name in names), None)


def _refuse_names_without_text(key: str) -> None:
    """Raises InputError for a name that is not UTF-8: JSON cannot hold it."""
    if (name := printable(key)) != key:
        raise InputError(f"{name}: the name is not UTF-8; rename the file")


def _why_left_out(key: str) -> str | None:
    """Why a file is left out, judging by its name; None for an image."""
    path = PurePosixPath(key)
    if any(part.startswith(".") for part in path.parts):  # such as macOS's ._a.png
        return "hidden"
    suffix = path.suffix.lower()
    return None if suffix in IMAGE_SUFFIXES else suffix or "without suffix"


def _say_left_out(where: str, left_out: Counter[str]) -> None:
    if left_out:
        most = sorted(left_out.items(), key=lambda item: (-item[1], item[0]))[:8]
        shown = [f"{count} {what}" for what, count in most]
        shown += ["others"] if len(left_out) > len(shown) else []
        files = "file" if left_out.total() == 1 else "files"
        print(f"{where}: {left_out.total()} {files} left out ({', '.join(shown)})")


# ---- a folder ----


class FolderImages:
    """Images below a folder. Links to folders are followed, each folder once; links to files
    outside the folder are never opened.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def keys(self) -> list[str]:
        if not self.folder.is_dir():
            raise InputError(
                f"{self.folder} is not a folder; give the folder that holds the images"
            )
        left_out: Counter[str] = Counter()
        looked = progress(self._find(left_out), name="find images", unit="image", leave=False)
        keys = sorted(looked)
        if not keys:
            raise InputError(
                f"{self.folder} has no images (looked for {LOOKED_FOR}, also in subfolders)"
            )
        _say_left_out(str(self.folder), left_out)
        return keys

    def any_key(self) -> str | None:
        return next(self._find(Counter()), None)

    def _find(self, left_out: Counter[str]) -> Iterator[str]:
        """Keys, unsorted."""
        for key, entry in _files_below(str(self.folder), left_out):
            reason = _why_left_out(key)
            if reason is None and not entry.is_file(follow_symlinks=False):
                path = Path(entry.path)
                if self._leads_out(path):
                    reason = LINK_OUT
                elif not path.is_file():
                    reason = "not a regular file"
            if reason is None:
                yield key
            else:
                left_out[reason] += 1

    def _leads_out(self, path: Path) -> bool:
        """Whether a file is a link whose target is neither in this folder nor beside the link."""
        if not path.is_symlink():
            return False
        homes = map(os.path.realpath, (self.folder, path.parent))
        return not any(Path(os.path.realpath(path)).is_relative_to(home) for home in homes)

    def path(self, key: str) -> Path:
        """An image's path; it need not exist. Raises InputError for paths that we never open."""
        _refuse_names_without_text(key)
        path, *others = [self.folder / spelling for spelling in spellings(key)]
        if others and not path.exists():
            path = next((other for other in others if other.exists()), path)
        if PurePosixPath(key).is_absolute() or ".." in PurePosixPath(key).parts:
            raise InputError(f"{key} leaves the image folder")
        if self._leads_out(path):
            raise InputError(f"{key} is {LINK_OUT}; it was not opened: put the image itself there")
        return path

    def read(self, key: str) -> bytes:
        try:
            return read_patiently(self.folder / key, lambda: read_file(self.path(key)))
        except OSError as error:
            if error.errno not in NOT_THERE:
                raise
            raise InputError(f"{key}: {error.strerror}") from error
        except InputError:
            raise
        except ValueError as error:  # a name that no file system accepts
            raise InputError(f"{key!r}: {error}") from error

    def stamp(self, key: str) -> str:
        try:
            return stamp(str(self.path(key)))
        except (OSError, ValueError):
            return NO_STAMP

    def elsewhere(self, keys: Sequence[str]) -> dict[str, str]:
        return {}


def _files_below(folder: str, left_out: Counter[str]) -> Iterator[tuple[str, os.DirEntry[str]]]:
    """(key, entry) of all files. A folder that links reach again is listed at its real place if
    that is below `folder`, else at its first link. A link to an enclosing folder is a loop.
    """
    waiting, links, seen = [(folder, "")], deque[tuple[str, str]](), set[str]()
    while waiting or links:
        where, prefix = waiting.pop() if waiting else links.popleft()
        real = os.path.realpath(where)
        if real in seen:
            left_out["linked folders seen before"] += 1
            continue
        seen.add(real)
        with os.scandir(where) as entries:
            found = sorted(entries, key=lambda entry: entry.name)
        for entry in found:
            key = prefix + entry.name
            is_link = entry.is_symlink()
            if not (os.path.isdir(entry.path) if is_link else entry.is_dir()):
                yield key, entry
            elif entry.name.startswith("."):
                left_out["hidden"] += 1
            elif not is_link:
                waiting.append((entry.path, f"{key}/"))
            elif f"{real}/".startswith(os.path.join(os.path.realpath(entry.path), "")):
                left_out["linked folders around themselves"] += 1
            else:
                links.append((entry.path, f"{key}/"))


# ---- a folder of an object store ----


class AddressImages:
    """Images below a URL; one request per image."""

    def __init__(self, folder: str) -> None:
        self.folder = folder.rstrip("/")
        self.stamps = self._stamps_now()  # key -> stamp, for all files

    def _stamps_now(self) -> dict[str, str]:
        found = listing(self.folder).items()
        return {place.removeprefix(f"{self.folder}/"): stamp for place, stamp in found}

    def keys(self) -> list[str]:
        reasons = {key: _why_left_out(key) for key in self.stamps}
        _say_left_out(self.folder, Counter(filter(None, reasons.values())))
        keys = sorted(key for key, reason in reasons.items() if reason is None)
        if not keys:
            raise InputError(f"{self.folder} has no images (looked for {LOOKED_FOR})")
        return keys

    def any_key(self) -> str | None:
        return next((key for key in self.stamps if _why_left_out(key) is None), None)

    def read(self, key: str) -> bytes:
        _refuse_names_without_text(key)
        if (name := _spelled(key, self.stamps)) is None:
            raise InputError(f"{key}: not in {self.folder}")
        size = int(self.stamps[name].split()[0])
        _refuse_large(key, size)
        try:
            return read_object(f"{self.folder}/{name}", size)
        except FileNotFoundError as error:
            raise InputError(f"{key}: {error.strerror}") from error

    def stamp(self, key: str) -> str:
        name = _spelled(key, self.stamps)
        return NO_STAMP if name is None else self.stamps[name]

    def elsewhere(self, keys: Sequence[str]) -> dict[str, str]:
        now = self._stamps_now()
        found = "\n".join(now.get(_spelled(key, self.stamps) or "", NO_STAMP) for key in keys)
        return {self.folder: hash_bytes(found.encode())}


# ---- tar files ----


class TarImages:
    """Images in uncompressed tar files: found by their headers, read at their offsets."""

    def __init__(self, places: Sequence[Path | str]) -> None:
        self._paths = list(dict.fromkeys(map(as_place, places)))
        self._places: dict[str, tuple[int, int, int]] = {}  # key -> (tar, offset, size), in bytes
        self._sparse: set[str] = set()  # keys
        self._stamps: list[str] = []  # one per tar, taken before it is read
        self._left_out: Counter[str] = Counter()
        self._opened: tuple[int, IO[bytes]] | None = None  # the remote tar that was read last
        looked = progress(self._paths, name="look through tars", unit="tar", leave=False)
        for number, path in enumerate(looked):
            self._stamps.append(stamp(path))
            self._add(number, path)
        if not self._places:
            named = ", ".join(map(bare, self._paths))
            raise InputError(f"{named}: no images in there (looked for {LOOKED_FOR})")

    def _add(self, number: int, path: str) -> None:
        for _, member in members_of(path):
            name = member.name.removeprefix("./")
            if member.isdir():
                continue
            reason = _why_left_out(name)
            if reason is None and not member.isfile():
                reason = "links or special files"
            if reason:
                self._left_out[reason] += 1
                continue
            if name in self._places:
                other, this = bare(self._paths[self._places[name][0]]), bare(path)
                if number == self._places[name][0]:
                    raise InputError(f"{this} holds {name} twice; make the tar again")
                raise InputError(f"{other} and {this} both hold {name}: rename it in one of them")
            self._places[name] = (number, member.offset_data, member.size)
            if member.issparse():  # its zeros are not in the tar
                self._sparse.add(name)

    def keys(self) -> list[str]:
        where = bare(self._paths[0]) if len(self._paths) == 1 else f"{len(self._paths)} tar files"
        _say_left_out(where, self._left_out)
        return sorted(self._places)

    def read(self, key: str) -> bytes:
        _refuse_names_without_text(key)
        if (name := _spelled(key, self._places)) is None:
            raise InputError(f"{key}: not in the tar files")
        number, offset, size = self._places[name]
        path = self._paths[number]
        if name in self._sparse:
            found = f"{bare(path)} holds it as a sparse file"
            raise InputError(f"{key}: {found}; make it without --sparse")
        _refuse_large(key, size)
        data = self._piece(number, offset, size)
        if len(data) != size:
            raise InputError(f"{key}: {bare(path)} is truncated")
        return data

    def stamp(self, key: str) -> str:
        if (name := _spelled(key, self._places)) is None:
            return NO_STAMP
        number, offset, _ = self._places[name]
        return f"{offset} {self._stamps[number]}"

    def _piece(self, number: int, offset: int, size: int) -> bytes:
        path = self._paths[number]
        if not is_address(path):
            return read_patiently(path, partial(_read_piece, path, size, offset))
        if self._opened is None or self._opened[0] != number:
            self._opened = number, opened(path)
        self._opened[1].seek(offset)
        return self._opened[1].read(size)

    def elsewhere(self, keys: Sequence[str]) -> dict[str, str]:
        return stamps_elsewhere(self._paths)


def _read_piece(path: str, size: int, offset: int) -> bytes:
    with open(path, "rb") as file:
        return os.pread(file.fileno(), size, offset)


def listed_images(list_path: Path) -> list[str]:
    """Sorted keys from a text file, one per line. Raises InputError if it is empty or not text."""
    try:
        text = list_path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{list_path} is not UTF-8 text ({error}); expected one image per line"
        ) from error
    keys = sorted({line.strip() for line in text.split("\n")} - {""})
    if not keys:
        raise InputError(f"{list_path} names no images: there is nothing to encode")
    return keys
