"""Manifests: the small JSON file that makes a folder an artefact.

Every folder that a step writes has a `manifest.json`, **written last**. It holds the format
version, the beingvl version, the command, counts, a hash of every file, and the *lineage*: the
fingerprints of what the artefact was made with (`vqgan`, `vbpe`, `vocab`, …), inherited from step
to step. A folder without a manifest is incomplete and never used. Inputs are refused if their
lineages have different hashes for the same thing.

    start_folder(folder, kind)          the folder is incomplete from here on
    write_manifest(folder, …)           commits the folder
    read_manifest(folder, kind)         refuses incomplete folders, wrong kinds, newer formats
    already_made(folder, kind, request) lets a restarted step reuse what it finished
    verify_folder(folder)               re-hashes every file; `verify_file` re-hashes one
    verify_small_files(folder)          re-hashes what is read at once when the folder is opened
    join_lineages({name: lineage, …})   refuses inputs that contradict each other
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from beingvl.artefact.files import (
    command_line,
    make_folder,
    path_inside,
    refuse_outside,
    sync,
    to_json,
    write_atomically,
)
from beingvl.artefact.hashes import hash_bytes, hash_file
from beingvl.artefact.progress import progress
from beingvl.artefact.request import Request
from beingvl.errors import InputError
from beingvl.json_file import parse_json
from beingvl.published_form import refuse_published
from beingvl.version import __version__

MANIFEST_FILE = "manifest.json"
FORMAT_VERSION = 1
LARGE_SUFFIXES = (".safetensors", ".bin", ".arrow")  # weights and shards
OWN_HASH = "manifest_hash"  # a field in the file: the hash of all other fields

# The command that makes each kind of artefact, for messages (between backticks).
MADE_BY = {
    "dataset": "python scripts/make_digits_dataset.py",
    "vqgan": "beingvl train-vq",
    "vq_codes": "beingvl encode-images",
    "vbpe": "beingvl train-vbpe",
    "jsonl": "beingvl tokenize",
    "shards": "beingvl build-shards",
    "model": "beingvl convert` or `beingvl train",
    "published_model": "beingvl export",
    "adapter": "beingvl train",
    "checkpoint": "beingvl train",
    "evaluation": "beingvl evaluate",
}


@dataclass(frozen=True)
class Manifest:
    """The content of `manifest.json`. `files`: relative path -> its number of bytes and hash."""

    kind: str
    command: str
    counts: dict[str, int | float]
    lineage: dict[str, str]
    files: dict[str, dict[str, int | str]]
    details: dict = field(default_factory=dict)
    format_version: int = FORMAT_VERSION
    beingvl_version: str = __version__

    @property
    def content_hash(self) -> str:
        """Hash of all files' hashes: equal for equal files, whenever and wherever they are made."""
        entries = sorted(self.files.items())
        return hash_bytes("".join(f"{name} {entry['hash']}\n" for name, entry in entries).encode())


# ---- write ----


def start_folder(folder: Path | str, kind: str) -> Path:
    """Make `folder` incomplete and remove the files in its manifest; make it if it does not exist.

    Raises InputError if it holds a different kind of artefact, such as the input of this step.
    """
    folder = Path(folder)
    if is_complete(folder):
        manifest = refuse_other_kind(folder, kind)
        paths = [path_inside(folder, name) for name in manifest.files]
        (folder / MANIFEST_FILE).unlink()
        for path in paths:
            path.unlink(missing_ok=True)
    return make_folder(folder)


def refuse_other_kind(folder: Path, kind: str) -> Manifest:
    """The manifest of a finished folder that a step may replace.

    Raises InputError if the folder holds a different kind of artefact.
    """
    manifest = read_manifest(folder)
    if manifest.kind != kind:
        raise InputError(
            f"{folder} holds {manifest.kind!r}, which a step that writes {kind!r} does not "
            "replace; choose another folder"
        )
    return manifest


def write_manifest(
    folder: Path | str,
    kind: str,
    counts: Mapping[str, int | float],
    lineage: Mapping[str, str],
    details: Mapping | None = None,
    known_hashes: Mapping[str, str] | None = None,
    belongs: Callable[[str], bool] = lambda name: True,
) -> Manifest:
    """Hash every file below `folder`, flush it to disk, and write the manifest; call it last.

    `known_hashes` (relative path -> hash) avoids reading files whose hash the writer computed.
    Files for which `belongs` (relative path -> bool) is False are left out: several datasets may
    share a folder.
    """
    folder = Path(folder)
    known = known_hashes or {}
    files: dict[str, dict[str, int | str]] = {}
    for path in sorted(_finished_files(folder)):
        name = path.relative_to(folder).as_posix()
        if path.name != MANIFEST_FILE and belongs(name):
            sync(path)  # else a crash could leave the manifest of an empty file
            files[name] = {"bytes": path.stat().st_size, "hash": known.get(name) or hash_file(path)}
    manifest = Manifest(
        kind, command_line(sys.argv), dict(counts), dict(lineage), files, dict(details or {})
    )
    write_atomically(folder / MANIFEST_FILE, to_json(sealed(asdict(manifest))))
    return manifest


def sealed(fields: Mapping[str, Any]) -> dict[str, Any]:
    """A manifest's fields plus their hash, which does not depend on their order."""
    others = {name: value for name, value in fields.items() if name != OWN_HASH}
    others = json.loads(json.dumps(others))  # as they read back: all keys are strings
    text = json.dumps(others, sort_keys=True)
    return {**others, OWN_HASH: hash_bytes(text.encode())}


def _finished_files(folder: Path) -> Iterator[Path]:
    """Files below `folder`, except what ends in .tmp: other processes make and remove these."""

    def fail(error: OSError) -> None:
        raise error

    for where, folders, names in os.walk(folder, onerror=fail):
        folders[:] = [name for name in folders if not name.endswith(".tmp")]
        paths = [Path(where) / name for name in names if not name.endswith(".tmp")]
        yield from (path for path in paths if path.is_file())


# ---- read ----


def is_complete(folder: Path | str) -> bool:
    return (Path(folder) / MANIFEST_FILE).is_file()


class _Fields(dict[str, Any]):
    """An object in a manifest; reading a missing field, as in a damaged file, raises InputError."""

    def __init__(self, pairs: Iterable[tuple[str, Any]], path: Path | str = MANIFEST_FILE) -> None:
        super().__init__(pairs)
        self._path = path

    def __missing__(self, key: str) -> Any:
        raise InputError(
            f"{self._path} has no {key!r} where one is expected: it is damaged; make it again"
        )


def read_manifest(folder: Path | str, kind: str | Iterable[str] | None = None) -> Manifest:
    """The manifest of a finished folder.

    Raises InputError if it is missing, damaged, of a different kind or of a newer format.
    """
    path = Path(folder) / MANIFEST_FILE
    kinds = [kind] if isinstance(kind, str) else list(kind or [])
    if not Path(folder).is_dir():
        raise InputError(f"{folder} is not a folder{_hint(kinds)}")
    if "model" in kinds or not path.is_file():
        refuse_published(folder)
    if not path.is_file():
        raise InputError(f"{folder} has no {MANIFEST_FILE}, so it is incomplete{_hint(kinds)}")
    manifest = _parse(path)
    if kinds and manifest.kind not in kinds:
        expected = " or ".join(map(repr, kinds))
        raise InputError(f"{folder} holds {manifest.kind!r}, expected {expected}{_hint(kinds)}")
    return manifest


def _parse(path: Path) -> Manifest:
    again = "make the folder again"
    fields = parse_json(path.read_bytes(), path, again, lambda pairs: _Fields(pairs, path))
    version = fields.get("format_version") if isinstance(fields, dict) else None
    if not isinstance(version, int):
        raise InputError(f"{path} is not a beingvl manifest; {again}")
    if version > FORMAT_VERSION:
        raise InputError(
            f"{path} has format version {version}, this beingvl {__version__} "
            f"reads up to {FORMAT_VERSION}: update beingvl"
        )
    if fields.pop(OWN_HASH, None) != sealed(fields)[OWN_HASH]:
        found = "changed after it was written, or has no manifest_hash"
        raise InputError(f"{path} {found}: it is damaged; {again}")
    for name, holds in _FIELDS.items():
        if not holds(fields[name]):
            found = f"{name} {str(fields[name])[:60]!r}"
            raise InputError(f"{path} has {found}, which no step writes; {again}")
    for name in fields["files"]:
        refuse_outside(name, path)
    return Manifest(**{name: fields[name] for name in _FIELDS})


def _is(*types: type) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, types) and not isinstance(value, bool)


def _object_of(holds: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, dict) and all(map(holds, value.values()))


def _is_file(entry: Any) -> bool:
    return isinstance(entry, dict) and _is(int)(entry["bytes"]) and _is(str)(entry["hash"])


_FIELDS: dict[str, Callable[[Any], bool]] = {
    "kind": _is(str),
    "command": _is(str),
    "counts": _object_of(_is(int, float)),
    "lineage": _object_of(_is(str)),
    "files": _object_of(_is_file),
    "details": _is(dict),
    "format_version": _is(int),
    "beingvl_version": _is(str),
}
"""Type check for each field of a manifest."""


def _hint(kinds: list[str]) -> str:
    commands = " or ".join(f"`{MADE_BY[kind]}`" for kind in kinds if kind in MADE_BY)
    return f"; make it with {commands}" if commands else ""


def already_made(
    folder: Path | str, kind: str, request: Mapping[str, Any], overwrite: bool = False
) -> bool:
    """Whether `folder` was finished with the same request, according to its manifest's details.

    Raises InputError if it was made with a different request, unless `overwrite` is set.
    """
    if overwrite or not is_complete(folder):
        return False
    made_by = read_manifest(folder, kind).details.get("request", {})
    if difference := Request(request).difference(made_by):
        raise InputError(
            f"{folder} is finished, but with {difference}; choose another folder or add --overwrite"
        )
    print(f"{folder} is finished already, with the same inputs: reused")
    return True


# ---- verify ----


def verify_folder(folder: Path | str) -> Manifest:
    """Re-hash all files of a finished folder. Raises InputError for the first that changed."""
    folder = Path(folder)
    manifest = read_manifest(folder)
    for name in progress(manifest.files, name=f"verify {folder}", unit="file", leave=False):
        verify_file(folder, name, manifest)
    return manifest


def verify_small_files(folder: Path | str) -> None:
    """Re-hash all files of a folder but weights and shards, if it has a manifest: milliseconds for
    a model, 0.06 s per 100 MB of a shard folder's index files.

    Raises InputError for the first that changed.
    """
    folder = Path(folder)
    if is_complete(folder):
        manifest = read_manifest(folder)
        for name in manifest.files:
            if not name.endswith(LARGE_SUFFIXES):
                verify_file(folder, name, manifest)


def verify_file(
    folder: Path,
    name: str,
    manifest: Manifest,
    watch: Callable[[memoryview], object] = lambda block: None,
) -> None:
    """Re-hash one file that the folder's manifest lists; `watch` is called with each block.

    Raises InputError if it changed, or is not listed.
    """
    if found := difference_of_file(folder, name, manifest, watch):
        raise InputError(f"{folder / name} {found}; copy it again or make it again")


def difference_of_file(
    folder: Path,
    name: str,
    manifest: Manifest,
    watch: Callable[[memoryview], object] = lambda block: None,
) -> str | None:
    """How a file differs from its manifest entry, as the end of a sentence; None if it does not."""
    path, entry = path_inside(folder, name), manifest.files[name]
    size = path.stat().st_size if path.is_file() else None
    if size is None:
        return f"is missing although {MANIFEST_FILE} lists it"
    if size != entry["bytes"]:
        return f"has {size} bytes, {MANIFEST_FILE} says {entry['bytes']}"
    if hash_file(path, watch) != entry["hash"]:
        return f"does not have the hash that {MANIFEST_FILE} says: it changed after it was written"
    return None


# ---- lineage ----


def join_lineages(lineages: Mapping[str, Mapping[str, str]]) -> dict[str, str]:
    """Union of the lineages of several inputs (name of the input -> its lineage).

    Raises InputError naming two inputs that were made with different things.
    """
    joined: dict[str, str] = {}
    origin: dict[str, str] = {}
    for name, lineage in lineages.items():
        for key, value in lineage.items():
            if joined.setdefault(key, value) != value:
                raise InputError(
                    f"{origin[key]} and {name} do not match: they were made with different {key} "
                    f"({joined[key][:19]}… and {value[:19]}…); make one of them again with the "
                    f"other's {key}"
                )
            origin.setdefault(key, name)
    return joined
