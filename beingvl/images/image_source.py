"""Where images come from: a folder, or tar files (webdataset shards). An image's key is its path
below the folder or in the tar.

An image that is not there is rejected. A disk that fails is asked again, a few times, and then the
step ends, so that no image is lost for it.
"""

from __future__ import annotations

import errno
import os
import tarfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Protocol

from beingvl.artefact.files import printable
from beingvl.errors import InputError
from beingvl.images.vq_codes import IMAGE_SUFFIXES, find_images, iterate_images

PAUSES_SECONDS = (0.5, 2, 8)  # between the tries of one read
NOT_THERE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP)
NO_STAMP = "none"


class ImageSource(Protocol):
    def keys(self) -> list[str]:
        """Sorted keys of all images. Raises InputError when there are none."""

    def read(self, key: str) -> bytes:
        """One file's bytes. Raises InputError when it is not there, OSError when the disk fails."""

    def stamp(self, key: str) -> str:
        """Size and time of the file that holds an image, or NO_STAMP: equal stamps, equal bytes."""


def read_patiently(path: Path, read: Callable[[], bytes]) -> bytes:
    """What `read` gives of `path`; asked again after pauses where a disk fails."""
    for pause in (*PAUSES_SECONDS, None):
        try:
            return read()
        except OSError as error:
            if pause is None or error.errno in NOT_THERE:
                error.filename = str(path)  # a failing read does not say it
                raise
        time.sleep(pause)
    raise AssertionError


def _stamp_of(path: Path) -> str:
    found = path.stat()
    return f"{found.st_size} {found.st_mtime_ns}"


def open_images(paths: Sequence[Path]) -> ImageSource:
    """One folder of image files, one folder of tar files, or tar files; nothing mixed."""
    if len(paths) == 1 and paths[0].is_dir():
        tars = sorted(paths[0].glob("*.tar"))
        if tars and (image := next(iterate_images(paths[0]), None)) is not None:
            raise InputError(
                f"--image_path {paths[0]} holds tar files ({tars[0].name}) and images ({image}): "
                "name the tar files, or move them out of the folder"
            )
        return TarImages(tars) if tars else FolderImages(paths[0])
    for path in paths:
        if path.is_dir():
            raise InputError(
                f"--image_path {path} is a folder beside other paths; give one folder, or tar files"
            )
        if not path.is_file():
            raise InputError(f"--image_path {path} is not a folder and not a tar file")
    return TarImages(paths)


def _refuse_names_without_text(key: str) -> None:
    """Raises InputError for a name that is not UTF-8, which no JSON file could hold."""
    if (name := printable(key)) != key:
        raise InputError(f"{name}: the name is not UTF-8; rename the file")


class FolderImages:
    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def keys(self) -> list[str]:
        return find_images(self._folder)

    def read(self, key: str) -> bytes:
        _refuse_names_without_text(key)
        if _leaves(key):
            raise InputError(f"{key} leaves the image folder")
        try:
            path = self._folder / key
            return read_patiently(path, path.read_bytes)
        except OSError as error:
            if error.errno not in NOT_THERE:
                raise
            raise InputError(f"{key}: {error.strerror}") from error
        except ValueError as error:  # a name that no file system takes
            raise InputError(f"{key!r}: {error}") from error

    def stamp(self, key: str) -> str:
        try:
            return NO_STAMP if _leaves(key) else _stamp_of(self._folder / key)
        except (OSError, ValueError):
            return NO_STAMP


def _leaves(key: str) -> bool:
    return PurePosixPath(key).is_absolute() or ".." in PurePosixPath(key).parts


class _ForgetfulTarFile(tarfile.TarFile):
    """tarfile keeps every header it has seen; this one reads millions in the memory of one."""

    def next(self) -> tarfile.TarInfo | None:
        self.members: list[tarfile.TarInfo] = []
        if self.offset == 0 and self.fileobj.tell():
            return None  # an empty tar, seen when it was opened; Python 3.10 seeks before its start
        return super().next()


def _refuse_lost_members(path: Path, end: int) -> None:
    """tarfile takes any header but the first that it cannot read for the end; there are zeros."""
    with open(path, "rb") as file:
        if os.pread(file.fileno(), tarfile.BLOCKSIZE, end) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError(f"neither a header nor the end of the tar at byte {end}")


class TarImages:
    """Images in uncompressed tar files, found through their headers and read at their offsets."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = list(paths)
        self._places: dict[str, tuple[int, int, int]] = {}  # key -> (tar, offset, size), in bytes
        self._stamps: list[str] = []  # of the tars, taken before they are read
        for number, path in enumerate(paths):
            self._stamps.append(_stamp_of(path))
            self._add(number, path)
        if not self._places:
            named, looked_for = ", ".join(map(str, paths)), ", ".join(sorted(IMAGE_SUFFIXES))
            raise InputError(f"{named}: no images in there (looked for {looked_for})")

    def _add(self, number: int, path: Path) -> None:
        try:
            with _ForgetfulTarFile.open(path, "r:") as tar:
                while (member := tar.next()) is not None:
                    name = member.name.removeprefix("./")
                    is_image = PurePosixPath(name).suffix.lower() in IMAGE_SUFFIXES
                    if not (is_image and member.isfile()):
                        continue
                    if name in self._places:
                        other = self._paths[self._places[name][0]]
                        raise InputError(
                            f"{path} and {other} both hold {name}: rename one or encode them apart"
                        )
                    self._places[name] = (number, member.offset_data, member.size)
                _refuse_lost_members(path, tar.offset)
        except (tarfile.TarError, OSError) as error:
            raise InputError(
                f"{path} is not a readable, uncompressed tar file ({error}); copy it again"
            ) from error

    def keys(self) -> list[str]:
        return sorted(self._places)

    def read(self, key: str) -> bytes:
        _refuse_names_without_text(key)
        if key not in self._places:
            raise InputError(f"{key}: not in the tar files")
        number, offset, size = self._places[key]
        path = self._paths[number]
        data = read_patiently(path, partial(_read_piece, path, size, offset))
        if len(data) != size:
            raise InputError(f"{key}: {path} is truncated")
        return data

    def stamp(self, key: str) -> str:
        if key not in self._places:
            return NO_STAMP
        number, offset, _ = self._places[key]
        return f"{offset} {self._stamps[number]}"


def _read_piece(path: Path, size: int, offset: int) -> bytes:
    with open(path, "rb") as file:
        return os.pread(file.fileno(), size, offset)


def listed_images(list_path: Path) -> list[str]:
    """Sorted keys of a text file, one per line. Raises InputError when it is empty or no text."""
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
