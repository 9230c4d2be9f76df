"""Tar files of pairs, as webdataset has them: `0001.jpg` beside `0001.json` or `0001.txt`."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any

from beingvl.errors import InputError
from beingvl.json_file import parse_json
from beingvl.sources.places import bare
from beingvl.sources.tars import members_of, readable_tar

TEXTS = (".txt", ".caption")
MAX_TEXT_BYTES = 1 << 26


def records_of_pairs(place: str, image_suffixes: frozenset[str]) -> Iterator[dict[str, Any]]:
    """One record per name: what its JSON says, else its text as `caption`; `images` are the tar's
    members. Members of one name stand beside each other.

    Raises InputError for a damaged tar, and for one without texts.
    """
    with readable_tar(place):
        yield from _records(place, image_suffixes)


def _records(place: str, image_suffixes: frozenset[str]) -> Iterator[dict[str, Any]]:
    name, found = "", False
    record: dict[str, Any] = {}
    for tar, member in members_of(place):
        path = PurePosixPath(member.name.removeprefix("./"))
        if not member.isfile() or path.name.startswith("."):
            continue
        stem = str(path.parent / path.name.split(".")[0])
        if stem != name:
            if set(record) - {"images"}:
                found = True
                yield record
            name, record = stem, {}
        suffix = path.suffix.lower()
        if suffix in image_suffixes:
            record.setdefault("images", []).append(str(path))
        elif suffix == ".json":
            record = {**_object(tar, member), "images": record.get("images", [])}
        elif suffix in TEXTS:
            record |= _caption(tar, member)
    if set(record) - {"images"}:
        found = True
        yield record
    if not found:
        raise InputError(
            f"{bare(place)} holds no .json or .txt beside its images: name the rows' file"
        )


def _text(tar: tarfile.TarFile, member: tarfile.TarInfo) -> str:
    """Raises ValueError for what is too large to be a text."""
    if member.size > MAX_TEXT_BYTES:
        raise ValueError(f"it has {member.size:,} bytes, expected at most {MAX_TEXT_BYTES:,}")
    file = tar.extractfile(member)
    assert file is not None
    return file.read().decode()


def _caption(tar: tarfile.TarFile, member: tarfile.TarInfo) -> dict[str, Any]:
    try:
        return {"caption": _text(tar, member)}
    except ValueError as error:
        return {"unreadable": f"{member.name} is not a text ({error})"}


def _object(tar: tarfile.TarFile, member: tarfile.TarInfo) -> dict[str, Any]:
    """What a JSON member holds; its image names are those of the tar."""
    try:
        found = parse_json(_text(tar, member), member.name)
    except (ValueError, InputError) as error:
        return {"unreadable": f"{member.name}: {error}"}
    if not isinstance(found, dict):
        return {"unreadable": f"{member.name} is not an object"}
    return {key: value for key, value in found.items() if key != "image"}
