"""Re-hash finished artefacts: does every file match its manifest?

Content is not checked again: it passed its step's checks, and the hash proves that nothing changed
since.
"""

from __future__ import annotations

from pathlib import Path

from beingvl.artefact.manifest import (
    MANIFEST_FILE,
    Manifest,
    is_complete,
    read_manifest,
    verify_file,
    verify_folder,
)
from beingvl.errors import InputError


def verify(path: Path | str) -> dict[Path, Manifest]:
    """Re-hash an artefact folder, the finished artefacts in a stage's folder, or a single file.

    Returns each folder's manifest. Raises InputError naming the first file that is missing or
    changed, or a folder without a manifest.
    """
    path = Path(path)
    if path.name == MANIFEST_FILE:
        path = path.parent
    if not path.exists():
        raise InputError(f"{path} does not exist; give an artefact folder, or one of its files")
    if path.is_dir():
        return {folder: verify_folder(folder) for folder in artefacts_of(path)}
    manifest = read_manifest(path.parent)
    if path.name not in manifest.files:
        raise InputError(f"{path} is not listed in the {MANIFEST_FILE} beside it")
    verify_file(path.parent, path.name, manifest)
    return {path.parent: manifest}


def artefacts_of(path: Path) -> list[Path]:
    """`path`, or the finished artefacts in a training stage's folder, which is not an artefact
    itself.
    """
    folders = [*sorted(path.glob("checkpoints/step-*")), path / "final"]
    finished = [folder for folder in folders if is_complete(folder)]
    return [path] if is_complete(path) else finished or [path]
