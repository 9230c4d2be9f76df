"""Which model folder a path means."""

from __future__ import annotations

from pathlib import Path

from beingvl.artefact.manifest import is_complete


def find_start_model(path: Path) -> Path:
    """A model folder, or the `final/` inside a stage folder."""
    if not is_complete(path) and (path / "final").is_dir():
        return path / "final"
    return path
