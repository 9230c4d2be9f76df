import itertools
import json
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from beingvl.errors import InputError
from beingvl.train import checkpoint
from beingvl.train.checkpoint import (
    CheckpointState,
    StateReader,
    check_identity,
    complete_checkpoints,
    read_state,
)
from beingvl.train.failures import SaveError

SHAPES = {"a": (3, 5), "b": (7,)}
KEYS = ("master", "exp_avg", "exp_avg_sq")


def size_of(name: str) -> int:
    return torch.Size(SHAPES[name]).numel()


def values(name: str, key: str) -> torch.Tensor:
    return torch.arange(1, torch.Size(SHAPES[name]).numel() + 1) * 10.0 + KEYS.index(key)


def write(output, step: int, cuts: list[float]):
    """What ranks write, one after the other, whose slices end at `cuts`; rank 0 is last and commits, as when all have written."""
    borders = {name: [0, *(round(cut * size_of(name)) for cut in sorted(cuts)), size_of(name)] for name in SHAPES}
    spans = {name: [list(pair) for pair in itertools.pairwise(borders[name])] for name in SHAPES}
    parameters = {name: {"shape": list(shape), "spans": spans[name], "adam_steps": 1} for name, shape in SHAPES.items()}
    num_ranks = len(cuts) + 1
    state = CheckpointState(step, step, num_ranks, {"seed": 0, "lineage": {}}, parameters)
    folder = checkpoint.checkpoint_folder(output, step)
    for rank in reversed(range(num_ranks)):
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {f"{n}.{k}": values(n, k)[slice(*spans[n][rank])] for n in SHAPES for k in KEYS}
        writer = checkpoint.CheckpointWriter(rank, lambda value: [value])
        writer.begin(folder, state, tensors, lambda folder: None)
        writer.commit()
    return folder, state


@given(st.lists(st.floats(0, 1), max_size=3), st.floats(0, 1), st.floats(0, 1))
@settings(max_examples=16, deadline=None)
def test_any_range_is_read_however_the_ranks_had_cut_it(tmp_path_factory, cuts, first: float, last: float) -> None:
    folder, state = write(tmp_path_factory.mktemp("run"), 1, cuts)
    assert read_state(folder) == state
    with StateReader(folder) as reader:
        for name in SHAPES:
            start, stop = sorted((round(first * size_of(name)), round(last * size_of(name))))
            for key in KEYS:
                assert torch.equal(reader.fetch(name, key, start, stop), values(name, key)[start:stop])
        assert torch.equal(reader.master("a"), values("a", "master").view(3, 5))


def test_only_finished_checkpoints_count_and_old_ones_go(tmp_path) -> None:
    for step in (1, 2, 3):
        write(tmp_path, step, [0.5])
    (tmp_path / "checkpoints" / "step-00000002" / "manifest.json").unlink()
    assert [path.name for path in complete_checkpoints(tmp_path)] == ["step-00000001", "step-00000003"]
    checkpoint.delete_old_checkpoints(tmp_path, keep_last=1)
    assert [path.name for path in complete_checkpoints(tmp_path)] == ["step-00000003"]


def test_damage_and_other_runs_are_named(tmp_path) -> None:
    folder, state = write(tmp_path, 1, [0.5])
    with pytest.raises(InputError, match=r"belongs to another run: its seed is 0, this run's is 1"):
        check_identity(folder, state.identity, {"seed": 1, "lineage": {}})
    (folder / "rank-00001-of-00002.safetensors").unlink()
    with pytest.raises(InputError, match="is missing"):
        StateReader(folder)
    (folder / "state.json").write_text(json.dumps({"step": 1}))
    with pytest.raises(InputError, match="is damaged"):
        read_state(folder)


def test_every_nth_checkpoint_stays(tmp_path) -> None:
    for step in range(1, 8):
        write(tmp_path, step, [])
    checkpoint.delete_old_checkpoints(tmp_path, keep_last=2, keep_every=3)
    assert [checkpoint.step_of(path) for path in complete_checkpoints(tmp_path)] == [3, 6, 7]


def test_a_rank_that_cannot_write_stops_all_and_leaves_older_checkpoints(tmp_path) -> None:
    folder, state = write(tmp_path, 1, [0.5])
    tensors = {f"{n}.{k}": values(n, k) for n in SHAPES for k in KEYS}
    new = checkpoint.checkpoint_folder(tmp_path, 2)

    def gather_with_a_full_disk(value):
        return [value, (None, "rank 1: No space left on device")]

    with pytest.raises(SaveError, match=r"could not be written.*rank 1: No space left"):
        checkpoint.CheckpointWriter(0, gather_with_a_full_disk).begin(new, state, tensors, lambda folder: None)
    assert complete_checkpoints(tmp_path) == [folder] and not new.exists()


def test_what_is_begun_counts_only_when_it_is_committed_and_the_next_one_commits_it(tmp_path) -> None:
    folder, state = write(tmp_path, 1, [])
    tensors = {f"{n}.{k}": values(n, k) for n in SHAPES for k in KEYS}
    writer = checkpoint.CheckpointWriter(0, lambda value: [value])
    second, third = (checkpoint.checkpoint_folder(tmp_path, step) for step in (2, 3))
    assert not writer.is_written
    writer.begin(second, state, tensors, lambda folder: None)
    while not writer.is_written:
        time.sleep(0.01)
    assert complete_checkpoints(tmp_path) == [folder]  # as if the process were killed here
    writer.begin(third, state, tensors, lambda folder: None)
    assert complete_checkpoints(tmp_path) == [folder, second]
    writer.commit()
    writer.commit()
    assert complete_checkpoints(tmp_path) == [folder, second, third] and not writer.is_written


def test_a_thread_that_cannot_write_stops_the_run_when_it_commits(tmp_path) -> None:
    folder, state = write(tmp_path, 1, [])
    new = checkpoint.checkpoint_folder(tmp_path, 2)
    (new / checkpoint.rank_file(0, 1)).mkdir(parents=True)  # a folder where the file should be
    (new / checkpoint.rank_file(0, 1) / "x").touch()
    tensors = {f"{n}.{k}": values(n, k) for n in SHAPES for k in KEYS}
    writer = checkpoint.CheckpointWriter(0, lambda value: [value])
    writer.begin(new, state, tensors, lambda folder: None)
    with pytest.raises(SaveError, match="could not be written"):
        writer.commit()
    assert complete_checkpoints(tmp_path) == [folder] and not new.exists()
