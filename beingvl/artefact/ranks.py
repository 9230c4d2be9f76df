"""This process's rank and the number of ranks: from the user, a launcher, or a Slurm array."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import NamedTuple

from beingvl.errors import InputError

RANK_VARIABLES = (
    "RANK",
    "WORLD_SIZE",
    "SLURM_ARRAY_TASK_ID",
    "SLURM_ARRAY_TASK_MIN",
    "SLURM_ARRAY_TASK_STEP",
    "SLURM_ARRAY_TASK_COUNT",
)


class RankOf(NamedTuple):
    """Rank `rank` of `num_ranks` processes that share a piece of work."""

    rank: int
    num_ranks: int


def rank_of(
    rank: int | None = None,
    num_ranks: int | None = None,
    environment: Mapping[str, str] = os.environ,
) -> RankOf:
    """The given rank, else the launcher's variables combined with the Slurm array's, else 0 of 1.

    Nothing else reads these variables. Raises InputError if they contradict each other.
    """
    if (rank is None) != (num_ranks is None):
        raise InputError("--rank and --num_ranks belong together: give both or neither")
    if rank is None or num_ranks is None:
        values = {
            name: int(environment[name])
            for name in RANK_VARIABLES
            if environment.get(name, "").isdigit()
        }
        rank, num_ranks = values.get("RANK", 0), values.get("WORLD_SIZE", 1)
        if "SLURM_ARRAY_TASK_ID" in values:
            first = values.get("SLURM_ARRAY_TASK_MIN", 0)
            task = (values["SLURM_ARRAY_TASK_ID"] - first) // values.get("SLURM_ARRAY_TASK_STEP", 1)
            rank += task * num_ranks
            num_ranks *= values.get("SLURM_ARRAY_TASK_COUNT", 1)
    if not 0 <= rank < num_ranks:
        raise InputError(
            f"rank {rank} of {num_ranks} is impossible; give --rank below --num_ranks, or "
            "a Slurm array without gaps"
        )
    return RankOf(rank, num_ranks)
