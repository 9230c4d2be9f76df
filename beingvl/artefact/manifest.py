"""Manifests: the small JSON file that makes a folder an artefact.

Every folder that a step writes carries a `manifest.json`, **written last**. It holds the format
version, the beingvl version, the command, counts, a hash of every file, and the *lineage*: the
fingerprints of what the artefact was made with (`vqgan`, `vbpe`, `vocab`, …), inherited from step
to step. A folder without a manifest is incomplete and never used. Two inputs whose lineages name
the same thing with different hashes contradict each other and are refused.

    write_atomically(path, bytes)       a file appears whole or not at all
    start_folder(folder, kind)          from here on it is incomplete
    write_manifest(folder, …)           the commit marker
    read_manifest(folder, kind)         refuses the incomplete, the wrong kind, the newer format
    verify_folder(folder)               re-hashes every file
    join_lineages({name: lineage, …})   refuses inputs that contradict each other
    already_made(folder, kind, request) a step started again reuses what it finished
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import sys
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from blake3 import blake3

from beingvl.errors import InputError
from beingvl.version import __version__

MANIFEST_FILE = "manifest.json"
FORMAT_VERSION = 1
BLAKE3, SAMPLED, PIECES = "blake3:", "sampled-sha256:", "pieces-blake3:"
HASHES: dict[str, Callable[[], Any]] = {
    BLAKE3: blake3,
    "sha256:": hashlib.sha256,
}  # of whole files; the second was used before

# What makes each kind of artefact, for messages that say what to run; they stand between backticks
# there.
MADE_BY = {
    "dataset": "python scripts/make_digits_dataset.py",
    "vqgan": "beingvl train-vq",
    "vq_codes": "beingvl encode-images",
    "vbpe": "beingvl train-vbpe",
    "jsonl": "beingvl tokenize",
    "shards": "beingvl build-shards",
    "model": "beingvl convert` or `beingvl train",
    "checkpoint": "beingvl train",
    "evaluation": "beingvl evaluate",
}


@dataclass(frozen=True)
class Manifest:
    """What `manifest.json` holds. `files` maps a relative path to its size in bytes and its
    hash.
    """

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
        """Hash of all files' hashes: equal files, hashed in the same way, have it whenever and
        wherever they were made.
        """
        listing = "".join(f"{name} {entry['hash']}\n" for name, entry in sorted(self.files.items()))
        return hash_bytes(listing.encode())

    def hashed(self) -> str:
        """How the files are hashed, for messages: `12 files re-hashed` or `12 files re-hashed, 3
        of them by samples only`.
        """
        sampled = sum(str(entry["hash"]).startswith(SAMPLED) for entry in self.files.values())
        return f"{len(self.files)} files re-hashed" + (
            f", {sampled} of them by samples only" if sampled else ""
        )


def hash_bytes(data: bytes) -> str:
    return BLAKE3 + blake3(data).hexdigest()


def hash_file(path: Path, algorithm: str = BLAKE3) -> str:
    """Hash of a file's bytes, which `b3sum` gives too. BLAKE3 is four times as fast as SHA-256
    with the processor's own help.
    """
    digest = HASHES[algorithm]()
    block = memoryview(bytearray(1 << 20))
    with open(path, "rb", buffering=0) as file:
        while size := file.readinto(block):
            digest.update(block[:size])
    return algorithm + digest.hexdigest()


class HashedFile:
    """Hashes what is written to `file`, which stays its owner's to flush and close. Data without
    gaps, from the start on.
    """

    closed = False

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._digest = file, blake3()

    def write(self, data: bytes | memoryview) -> int:
        self._digest.update(data)
        return self._file.write(data)

    def flush(self) -> None: ...

    @property
    def hash(self) -> str:
        """As `hash_file` of all that was written."""
        return BLAKE3 + self._digest.hexdigest()


def hash_pieces(path: Path, piece_bytes: int = 1 << 26) -> str:
    """Hash of the hashes of a file's pieces, computed side by side: for large files that came
    without a manifest.
    """

    def hash_piece(start: int) -> bytes:
        digest = blake3()
        with open(path, "rb") as file:
            file.seek(start)
            left = piece_bytes
            while block := file.read(min(left, 1 << 20)):
                digest.update(block)
                left -= len(block)
        return digest.digest()

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        pieces = b"".join(pool.map(hash_piece, range(0, path.stat().st_size, piece_bytes)))
    return PIECES + blake3(pieces).hexdigest()


def hash_sample(path: Path) -> str:
    """Hash of the size and of 64 pieces of 256 KiB, evenly spaced, of a file: other weights
    differ, a flipped bit may not.

    For files that a step linked and did not read: 16 GB would take minutes from a disk.
    """
    size, piece, count = path.stat().st_size, 1 << 18, 64
    digest = hashlib.sha256(str(size).encode())
    with open(path, "rb") as file:
        for number in range(count):
            file.seek(max(0, size - piece) * number // (count - 1))
            digest.update(file.read(piece))
    return SAMPLED + digest.hexdigest()


def hash_inputs(folder: Path, names: Iterable[str], sampled: Iterable[str] = ()) -> str:
    """One hash of files of `folder`, names included; those `sampled` are not read as a whole.
    Manifests are left out.
    """
    whole = {name: hash_file(folder / name) for name in names if Path(name).name != MANIFEST_FILE}
    hashes = whole | {name: hash_sample(folder / name) for name in sampled}
    return hash_bytes(json.dumps(hashes, sort_keys=True).encode())


def has_hash(path: Path, recorded: str) -> bool:
    """Whether a file still has the hash that a manifest recorded, of whichever kind it is."""
    algorithm = recorded.partition(":")[0] + ":"
    return recorded == (hash_file(path, algorithm) if algorithm in HASHES else hash_sample(path))


def write_atomically(path: Path | str, data: bytes | str) -> None:
    """Write to a temporary neighbour, flush to disk, rename: a reader sees the old file or the
    new one, never a part.
    """
    path = Path(path)
    temporary = path.with_name(
        f".{path.name}.{uuid.uuid4().hex}.tmp"
    )  # another host may have a process of the same number
    try:
        with open(temporary, "wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def printable(text: str) -> str:
    """The same text, but for what UTF-8 cannot write, which becomes an escape: names of files
    may be any bytes.
    """
    return text.encode("utf-8", "backslashreplace").decode()


def to_json(value: object) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def write_manifest(
    folder: Path | str,
    kind: str,
    counts: Mapping[str, int | float],
    lineage: Mapping[str, str],
    details: Mapping | None = None,
    known_hashes: Mapping[str, str] | None = None,
    belongs: Callable[[str], bool] = lambda name: True,
) -> Manifest:
    """Hash every file below `folder` and write the manifest; call it last.

    `known_hashes` (relative path -> hash) spares reading files whose hash the writer already
    computed. Files that do not `belong` (by relative path) are left out: others' in a folder that
    several share.
    """
    folder = Path(folder)
    known = known_hashes or {}
    files: dict[str, dict[str, int | str]] = {}
    for path in sorted(_finished_files(folder)):
        name = path.relative_to(folder).as_posix()
        if path.name != MANIFEST_FILE and belongs(name):
            files[name] = {"bytes": path.stat().st_size, "hash": known.get(name) or hash_file(path)}
    manifest = Manifest(
        kind,
        printable(shlex.join(sys.argv)),
        dict(counts),
        dict(lineage),
        files,
        dict(details or {}),
    )
    write_atomically(folder / MANIFEST_FILE, to_json(asdict(manifest)))
    return manifest


def _finished_files(folder: Path) -> Iterator[Path]:
    """Files below `folder`. What ends in .tmp is not entered: other processes make and remove
    things there.
    """

    def fail(error: OSError) -> None:
        raise error

    for where, folders, names in os.walk(folder, onerror=fail):
        folders[:] = [name for name in folders if not name.endswith(".tmp")]
        paths = [Path(where) / name for name in names if not name.endswith(".tmp")]
        yield from (path for path in paths if path.is_file())


class _Fields(dict[str, Any]):
    """An object in a manifest; asking for what a damaged one has not raises InputError that
    names the file.
    """

    def __init__(self, pairs: Iterable[tuple[str, Any]], path: Path | str = MANIFEST_FILE) -> None:
        super().__init__(pairs)
        self._path = path

    def __missing__(self, key: str) -> Any:
        raise InputError(
            f"{self._path} has no {key!r} where one is expected: it is damaged, or of an "
            "older beingvl; make it again"
        )


def read_manifest(folder: Path | str, kind: str | Iterable[str] | None = None) -> Manifest:
    """The manifest of a finished folder. Raises InputError when it is missing, damaged, of
    another kind or of a newer format.
    """
    path = Path(folder) / MANIFEST_FILE
    kinds = [kind] if isinstance(kind, str) else list(kind or [])
    if not Path(folder).is_dir():
        raise InputError(f"{folder} is not a folder{_hint(kinds)}")
    if not path.is_file():
        raise InputError(f"{folder} has no {MANIFEST_FILE}, so it is incomplete{_hint(kinds)}")
    try:
        fields = json.loads(path.read_text(), object_pairs_hook=lambda pairs: _Fields(pairs, path))
        manifest = Manifest(**fields)
        if not isinstance(manifest.format_version, int):
            raise TypeError(f"its format_version is {manifest.format_version!r}")
    except (json.JSONDecodeError, TypeError, UnicodeDecodeError) as error:
        raise InputError(
            f"{path} is not a beingvl manifest ({error}); make the folder again"
        ) from error
    if manifest.format_version > FORMAT_VERSION:
        found = (
            f"has format version {manifest.format_version}, this beingvl {__version__} "
            f"reads up to {FORMAT_VERSION}"
        )
        raise InputError(f"{path} {found}: update beingvl")
    if kinds and manifest.kind not in kinds:
        raise InputError(
            f"{folder} holds {manifest.kind!r}, expected "
            f"{' or '.join(map(repr, kinds))}{_hint(kinds)}"
        )
    return manifest


def start_folder(folder: Path | str, kind: str) -> Path:
    """Make `folder` ready to be written: from here on it is incomplete; what an older manifest
    listed is removed.

    Raises InputError when the folder holds another kind of artefact, such as the input of this
    step.
    """
    folder = Path(folder)
    if is_complete(folder):
        manifest = refuse_other_kind(folder, kind)
        (folder / MANIFEST_FILE).unlink()
        for name in manifest.files:
            (folder / name).unlink(missing_ok=True)
    return make_folder(folder)


def make_folder(folder: Path) -> Path:
    """Make a folder to write in, with those it lies in. Raises InputError when a file is in the
    way.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise InputError(
            f"{folder} cannot be made, a file is in the way; choose another folder to write in"
        ) from error
    return folder


def refuse_other_kind(folder: Path, kind: str) -> Manifest:
    """The manifest of a finished folder that a step may replace; raises InputError when it holds
    another kind of artefact.
    """
    manifest = read_manifest(folder)
    if manifest.kind != kind:
        raise InputError(
            f"{folder} holds {manifest.kind!r}, which a step that writes {kind!r} does not "
            "replace; choose another folder"
        )
    return manifest


def is_complete(folder: Path | str) -> bool:
    return (Path(folder) / MANIFEST_FILE).is_file()


def already_made(folder: Path | str, kind: str, request: Mapping, overwrite: bool = False) -> bool:
    """True when `folder` was finished by the same request (options and input hashes, kept in the
    manifest's details).

    Raises InputError when it was finished by another request, unless `overwrite` is given.
    """
    if overwrite or not is_complete(folder):
        return False
    made_by = read_manifest(folder, kind).details.get("request", {})
    different = [key for key in {**made_by, **request} if made_by.get(key) != request.get(key)]
    if different:
        raise InputError(
            f"{folder} is finished, but with another {different[0]} (found "
            f"{made_by.get(different[0])!r}, asked for "
            f"{request.get(different[0])!r}); choose another folder or add --overwrite"
        )
    print(f"{folder} is finished already, with the same inputs: reused")
    return True


def _hint(kinds: list[str]) -> str:
    commands = " or ".join(f"`{MADE_BY[kind]}`" for kind in kinds if kind in MADE_BY)
    return f"; make it with {commands}" if commands else ""


def verify_folder(folder: Path | str) -> Manifest:
    """Re-hash every file of a finished folder. Raises InputError that names the first missing or
    changed file.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    for name, entry in manifest.files.items():
        verify_file(folder / name, entry)
    return manifest


def verify_file(path: Path, entry: Mapping[str, int | str]) -> None:
    """Re-hash one file that a manifest lists as `entry`. Raises InputError when it is missing or
    changed.
    """
    if not path.is_file():
        raise InputError(
            f"{path} is missing although {MANIFEST_FILE} lists it; make the folder again"
        )
    if path.stat().st_size != entry["bytes"]:
        raise InputError(
            f"{path} has {path.stat().st_size} bytes, {MANIFEST_FILE} says "
            f"{entry['bytes']}; it changed or was cut off"
        )
    if not has_hash(path, str(entry["hash"])):
        raise InputError(
            f"{path} does not have the hash that {MANIFEST_FILE} says; it changed after it "
            "was written"
        )


def join_lineages(lineages: Mapping[str, Mapping[str, str]]) -> dict[str, str]:
    """Union of the lineages of several inputs (name of the input -> its lineage).

    Raises InputError that names the two inputs when they were made with different things.
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
