import pytest

from beingvl.artefact.ranks import rank_of
from beingvl.errors import InputError


def test_ranks_come_from_options_launcher_and_array() -> None:
    assert rank_of(1, 3, {"RANK": "5", "WORLD_SIZE": "6"}) == (1, 3)
    assert rank_of(environment={}) == (0, 1)
    assert rank_of(environment={"RANK": "5", "WORLD_SIZE": "6"}) == (5, 6)
    array = {
        "SLURM_ARRAY_TASK_ID": "14",
        "SLURM_ARRAY_TASK_MIN": "10",
        "SLURM_ARRAY_TASK_STEP": "2",
        "SLURM_ARRAY_TASK_COUNT": "4",
    }
    assert rank_of(environment=array) == (2, 4)
    assert rank_of(environment={**array, "RANK": "1", "WORLD_SIZE": "2"}) == (5, 8)
    with pytest.raises(InputError, match="belong together"):
        rank_of(1, None, {})
    with pytest.raises(InputError, match="rank 3 of 2 is impossible"):
        rank_of(environment={"RANK": "3", "WORLD_SIZE": "2"})
