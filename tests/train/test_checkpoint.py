import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from beingvl.errors import InputError
from beingvl.train import checkpoint
from beingvl.train.checkpoint import (
    CheckpointState,
    check_identity,
    complete_checkpoints,
    read_local_state,
    read_master,
    read_state,
)

SHAPES = {"a": (3, 5), "b": (7,)}
KEYS = ("master", "exp_avg", "exp_avg_sq")


def slice_elements(num_ranks: int) -> dict[str, int]:
    return {name: -(-torch.Size(shape).numel() // num_ranks) for name, shape in SHAPES.items()}


def slices_of(flat: torch.Tensor, elements: int, rank: int) -> torch.Tensor:
    padded = torch.zeros(elements * 8)
    padded[: flat.numel()] = flat
    return padded[rank * elements : (rank + 1) * elements]


def values(name: str, key: str) -> torch.Tensor:
    return torch.arange(1, torch.Size(SHAPES[name]).numel() + 1) * 10.0 + KEYS.index(key)


def write(output, step: int, num_ranks: int):
    """What `num_ranks` ranks write, one after the other; the last one commits, as rank 0 does when all have written."""
    elements = slice_elements(num_ranks)
    parameters = {name: {"shape": list(shape), "slice_elements": elements[name]} for name, shape in SHAPES.items()}
    state = CheckpointState(step, step, num_ranks, {"seed": 0, "lineage": {}}, parameters)
    folder = checkpoint.checkpoint_folder(output, step)
    for rank in reversed(range(num_ranks)):
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {f"{n}.{k}": slices_of(values(n, k), elements[n], rank) for n in SHAPES for k in KEYS}
        checkpoint.write_checkpoint(folder, state, tensors, rank, lambda value: [value], lambda folder: None)
    return folder, state


@given(st.integers(1, 4), st.integers(1, 4))
@settings(max_examples=16, deadline=None)
def test_slices_are_read_by_any_number_of_ranks(tmp_path_factory, written_by: int, read_by: int) -> None:
    folder, state = write(tmp_path_factory.mktemp("run"), 1, written_by)
    assert read_state(folder) == state
    elements = slice_elements(read_by)
    for rank in range(read_by):
        found = read_local_state(folder, state, rank, elements)
        for name in SHAPES:
            for key in KEYS:
                assert torch.equal(found[f"{name}.{key}"], slices_of(values(name, key), elements[name], rank))
    assert torch.equal(read_master(folder, state, "a"), values("a", "master").view(3, 5))


def test_only_finished_checkpoints_count_and_old_ones_go(tmp_path) -> None:
    for step in (1, 2, 3):
        write(tmp_path, step, 2)
    (tmp_path / "checkpoints" / "step-00000002" / "manifest.json").unlink()
    assert [path.name for path in complete_checkpoints(tmp_path)] == ["step-00000001", "step-00000003"]
    checkpoint.delete_old_checkpoints(tmp_path, keep_last=1)
    assert [path.name for path in complete_checkpoints(tmp_path)] == ["step-00000003"]


def test_damage_and_other_runs_are_named(tmp_path) -> None:
    folder, state = write(tmp_path, 1, 2)
    with pytest.raises(InputError, match=r"belongs to another run: its seed is 0, this run's is 1"):
        check_identity(folder, state.identity, {"seed": 1, "lineage": {}})
    (folder / "rank-00001-of-00002.safetensors").unlink()
    with pytest.raises(InputError, match="is missing"):
        read_local_state(folder, state, 0, slice_elements(2))
    (folder / "state.json").write_text(json.dumps({"step": 1}))
    with pytest.raises(InputError, match="is damaged"):
        read_state(folder)
