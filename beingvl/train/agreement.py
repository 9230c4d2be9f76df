"""Decisions that all ranks take together, so that none leaves the others waiting in a collective.

    refuse_different_inputs    do all ranks have the same inputs?
    is_finished                is there a `final/`, and does it belong to this run?
    newest_checkpoint          where does the run resume?

Hosts may see a network disk in different states; the newest state seen by any rank is the right
one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from beingvl.artefact.manifest import is_complete, read_manifest
from beingvl.artefact.request import Request
from beingvl.errors import InputError
from beingvl.train.checkpoint_folders import CHECKPOINTS, complete_checkpoints, step_of
from beingvl.train.failures import TrainingError
from beingvl.train.stage_run import Stage

Gather = Callable[[Any], list[Any]]  # gives every rank's value to all ranks, in rank order
LONGEST_PATIENCE_SECONDS = 60  # by default, NFS asks its server again after that


def refuse_different_inputs(inputs: Request, gather: Gather) -> None:
    """Raises InputError, on all ranks, with all differences of the first rank unlike rank 0."""
    first, *others = gather(inputs)
    for rank, given in enumerate(others, 1):
        if differences := Request(first).differences(given):
            raise InputError(
                f"rank {rank} has different inputs than rank 0: {', '.join(differences)}; "
                "every host must read the same files"
            )


def is_finished(stage: Stage, rank: int, gather: Gather) -> bool:
    """Whether rank 0 sees `final/`. Raises InputError, on all ranks, if it is another run's."""
    final = stage.output / "final"
    sees_it = rank == 0 and is_complete(final)
    identity = (
        read_manifest(final, ("model", "adapter")).details.get("identity", {}) if sees_it else None
    )
    found = gather(identity)[0]
    if found is None:
        return False
    check_identity(final, found, stage.identity)
    if rank == 0:
        print(f"{final} is finished already: nothing to do", flush=True)
    return True


def check_identity(folder: Path, found: Mapping[str, Any], identity: Request) -> None:
    """Raises InputError if a checkpoint, or a `final/`, belongs to a different run."""
    if difference := identity.difference(found):
        raise InputError(
            f"{folder} belongs to another run: {difference}; give another --output, or remove "
            "the folder to start this stage again"
        )


def newest_checkpoint(
    output: Path, gather: Gather, stall_timeout_seconds: float, before_step: int | None = None
) -> Path | None:
    """The newest complete checkpoint (before `before_step`) that any rank sees; same on every rank.

    A rank that does not see it yet waits. Raises TrainingError, on all ranks, naming those that
    never see it.
    """
    found = [
        folder.name
        for folder in complete_checkpoints(output)
        if before_step is None or step_of(folder) < before_step
    ]
    seen = gather(found[-1] if found else "")
    if not any(seen):
        return None
    newest, started = output / CHECKPOINTS / max(seen), time.monotonic()
    patience_seconds = min(LONGEST_PATIENCE_SECONDS, stall_timeout_seconds / 2)
    while not is_complete(newest) and time.monotonic() - started < patience_seconds:
        time.sleep(0.2)
    blind = [str(rank) for rank, sees_it in enumerate(gather(is_complete(newest))) if not sees_it]
    if blind:
        raise TrainingError(
            f"rank {', '.join(blind)} cannot see {newest}, which rank {seen.index(newest.name)} "
            "sees; all hosts need the same output folder: share it, or start again when its disk "
            "shows the same to all"
        )
    return newest
