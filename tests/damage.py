"""What disks and strangers do to finished folders."""

import json
import os
from pathlib import Path

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
