"""What disks and strangers do to finished folders."""

import json
import os
from pathlib import Path

from beingvl.artefact.hashes import hash_file
from beingvl.artefact.manifest import MANIFEST_FILE, sealed


def change_manifest(folder: Path, **fields: object) -> None:
    """As somebody does who knows of the hash that a manifest has of itself."""
    path = folder / MANIFEST_FILE
    path.write_text(json.dumps(sealed({**json.loads(path.read_text()), **fields})))


def flip_bit(path: Path, at: int) -> None:
    """In the byte `at`; from the end when it is negative. Size and time stay the same."""
    stamp, data = path.stat(), bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))


def list_anew(folder: Path) -> None:
    """Give every file that the manifest lists, and that is there, its size and hash of now."""
    if not (folder / MANIFEST_FILE).is_file():
        return
    names = json.loads((folder / MANIFEST_FILE).read_text())["files"]
    entries = {
        name: {"bytes": (folder / name).stat().st_size, "hash": hash_file(folder / name)}
        for name in names
        if (folder / name).is_file()
    }
    change_manifest(folder, files=entries)
