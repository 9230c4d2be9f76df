"""Tar files of pairs, as webdataset has them: `0001.jpg` beside `0001.json` or `0001.txt`."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any

from beingvl.errors import InputError
from beingvl.sources.places import opened

TEXTS = (".txt", ".caption")
MAX_TEXT_BYTES = 1 << 26


def records_of_pairs(place: str, image_suffixes: frozenset[str]) -> Iterator[dict[str, Any]]:
    """One record per name: what its JSON says, else its text as `caption`; `images` are the tar's
    members. Members of one name stand beside each other.

    Raises InputError for a damaged tar, and for one without texts.
    """
    name, record, found = "", {}, False  # type: tuple[str, dict[str, Any], bool]
    try:
        with opened(place) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
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
                    images = record.get("images", [])
                    record = {**_object(tar, member), "images": images}
                elif suffix in TEXTS:
                    record["caption"] = _text(tar, member)
            if set(record) - {"images"}:
                found = True
                yield record
    except (tarfile.TarError, OSError) as error:
        raise InputError(
            f"{place} is not a readable, uncompressed tar file ({error}); copy it again"
        ) from error
    if not found:
        raise InputError(f"{place} holds no .json or .txt beside its images: name the rows' file")


def _text(tar: tarfile.TarFile, member: tarfile.TarInfo) -> str:
    if member.size > MAX_TEXT_BYTES:
        raise InputError(f"{member.name} has {member.size:,} bytes, expected a text")
    file = tar.extractfile(member)
    assert file is not None
    return file.read().decode("utf-8", "replace")


def _object(tar: tarfile.TarFile, member: tarfile.TarInfo) -> dict[str, Any]:
    """What a JSON member holds; its image names are those of the tar."""
    try:
        found = json.loads(_text(tar, member))
    except (ValueError, RecursionError) as error:
        return {"unreadable": f"{member.name} is not valid JSON ({error})"}
    if not isinstance(found, dict):
        return {"unreadable": f"{member.name} is not an object"}
    return {key: value for key, value in found.items() if key != "image"}
