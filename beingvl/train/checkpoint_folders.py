"""Where a stage's checkpoints are, which are finished, and which can be deleted. No torch."""

from __future__ import annotations

import shutil
from pathlib import Path

from beingvl.artefact.manifest import MANIFEST_FILE, is_complete

CHECKPOINTS = "checkpoints"


def checkpoint_folder(output: Path, step: int) -> Path:
    return output / CHECKPOINTS / f"step-{step:08d}"


def complete_checkpoints(output: Path) -> list[Path]:
    """A stage folder's finished checkpoints, oldest first."""
    return sorted(path for path in _started_checkpoints(output) if is_complete(path))


def _started_checkpoints(output: Path) -> list[Path]:
    """Finished or not. A `step-00000500-copy` is the user's own and left alone."""
    return [
        path
        for path in (output / CHECKPOINTS).glob("step-*")
        if path.name.removeprefix("step-").isdigit()
    ]


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def delete_old_checkpoints(output: Path, keep_last: int, keep_every: int = 0) -> None:
    """Keeps the newest `keep_last`, multiples of `keep_every` steps, and one being written."""
    complete = complete_checkpoints(output)
    for folder in _started_checkpoints(output):
        is_old = bool(complete) and folder < complete[-1]
        is_kept = folder in complete[-keep_last:] or (
            keep_every and folder in complete and step_of(folder) % keep_every == 0
        )
        if is_old and not is_kept:
            delete_checkpoint(folder)


def delete_checkpoint(folder: Path) -> None:
    """Remove the manifest first, so that a half-deleted folder never counts as complete."""
    (folder / MANIFEST_FILE).unlink(missing_ok=True)
    # a network disk keeps files that another process has open
    shutil.rmtree(folder, ignore_errors=True)
