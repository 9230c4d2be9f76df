"""How a run was made: command, version and time of every artefact, and disk usage."""

from __future__ import annotations

import os
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

from beingvl.artefact.manifest import MANIFEST_FILE, is_complete, read_manifest


class Made(NamedTuple):
    """One artefact. `finished`: modification time of its manifest, local time. `version`: of
    beingvl and, for trained weights, of the libraries.
    """

    path: str
    finished: str
    version: str
    command: str


def read_made(run: Path, stages: Path) -> list[Made]:
    """Every finished artefact of a run, in the order in which they finished."""
    found = {}
    for folder in (run, stages):
        for pattern in ("*", "*/*"):
            for path in filter(is_complete, folder.glob(pattern)):
                found[path.resolve()] = path
    made = []
    for path in sorted(found.values(), key=_finished_at):
        manifest = read_manifest(path)
        if manifest.kind in ("report", "checkpoint"):
            continue
        finished = datetime.fromtimestamp(_finished_at(path)).strftime("%Y-%m-%d %H:%M")
        name = os.path.relpath(path, run)
        libraries = manifest.details.get("versions", {}).items()
        versions = [manifest.beingvl_version, *(" ".join(library) for library in libraries)]
        made.append(Made(name, finished, ", ".join(versions), manifest.command))
    return made


def _finished_at(path: Path) -> float:
    return (path / MANIFEST_FILE).stat().st_mtime


def bytes_on_disk(folder: Path) -> int:
    """Size of all files in a folder. Hard links count once; symbolic links are not followed."""
    files = {(status.st_dev, status.st_ino): status.st_size for status in _regular(folder)}
    return sum(files.values())


def _regular(folder: Path) -> Iterator[os.stat_result]:
    for parent, _, names in os.walk(folder):
        for name in names:
            path = Path(parent, name)
            if not path.is_symlink():
                yield path.stat()
