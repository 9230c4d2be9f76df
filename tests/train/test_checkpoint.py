import itertools
import json
import os
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from beingvl.artefact.manifest import read_manifest
from beingvl.artefact.request import Request
from beingvl.errors import InputError
from beingvl.train import checkpoint
from beingvl.train.agreement import check_identity
from beingvl.train.checkpoint import CheckpointState, StateReader, read_state
from beingvl.train.checkpoint_folders import (
    checkpoint_folder,
    complete_checkpoints,
    delete_old_checkpoints,
    step_of,
)
from beingvl.train.failures import SaveError

SHAPES = {"a": (3, 5), "b": (7,)}
KEYS = ("master", "exp_avg", "exp_avg_sq")


def size_of(name: str) -> int:
    return torch.Size(SHAPES[name]).numel()


def values(name: str, key: str) -> torch.Tensor:
    return torch.arange(1, torch.Size(SHAPES[name]).numel() + 1) * 10.0 + KEYS.index(key)


def meet(num_ranks: int, work) -> list:
    """`work(rank, gather)` in one thread per rank, with a `gather` that waits for all; results or
    errors, in rank order.
    """
    values, barrier = [None] * num_ranks, threading.Barrier(num_ranks)

    def gather(rank, value):
        values[rank] = value
        barrier.wait(timeout=20)
        everything = list(values)
        barrier.wait(timeout=20)
        return everything

    with ThreadPoolExecutor(num_ranks) as pool:
        futures = [
            pool.submit(work, rank, lambda value, rank=rank: gather(rank, value))
            for rank in range(num_ranks)
        ]
    return [future.exception() or future.result() for future in futures]


def write(output, step: int, cuts: list[float]):
    """What ranks write, a thread each, whose slices end at `cuts`."""
    borders = {
        name: [0, *(round(cut * size_of(name)) for cut in sorted(cuts)), size_of(name)]
        for name in SHAPES
    }
    spans = {name: [list(pair) for pair in itertools.pairwise(borders[name])] for name in SHAPES}
    parameters = {
        name: {"shape": list(shape), "spans": spans[name], "adam_steps": 1}
        for name, shape in SHAPES.items()
    }
    num_ranks = len(cuts) + 1
    identity = {"seed": 0, "lineage": {}, "start_model": ""}
    state = CheckpointState(step, step, num_ranks, identity, parameters)
    folder = checkpoint_folder(output, step)

    def save(rank, gather):
        tensors = {f"{n}.{k}": values(n, k)[slice(*spans[n][rank])] for n in SHAPES for k in KEYS}
        writer = checkpoint.CheckpointWriter(rank, gather)
        writer.begin(folder, state, tensors.items(), lambda folder: None)
        writer.commit()

    assert meet(num_ranks, save) == [None] * num_ranks
    return folder, state


@given(st.lists(st.floats(0, 1), max_size=3), st.floats(0, 1), st.floats(0, 1))
@settings(max_examples=16, deadline=None)
def test_any_range_is_read_however_the_ranks_had_cut_it(
    tmp_path_factory, cuts, first: float, last: float
) -> None:
    folder, state = write(tmp_path_factory.mktemp("run"), 1, cuts)
    assert read_state(folder) == state
    with StateReader(folder) as reader:
        for name in SHAPES:
            start, stop = sorted((round(first * size_of(name)), round(last * size_of(name))))
            for key in KEYS:
                assert torch.equal(
                    reader.fetch(name, key, start, stop), values(name, key)[start:stop]
                )
        assert torch.equal(reader.master("a"), values("a", "master").view(3, 5))


def test_only_finished_checkpoints_count_and_old_ones_go_with_what_killed_saves_left(
    tmp_path,
) -> None:
    for step in (1, 2, 3, 4, 5):
        write(tmp_path, step, [0.5])
    for step in (2, 5):  # the last one may be being written
        (checkpoint_folder(tmp_path, step) / "manifest.json").unlink()
    assert [path.name for path in complete_checkpoints(tmp_path)] == [
        "step-00000001",
        "step-00000003",
        "step-00000004",
    ]
    delete_old_checkpoints(tmp_path, keep_last=2)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        f"step-0000000{step}" for step in (3, 4, 5)
    ]
    assert [path.name for path in complete_checkpoints(tmp_path)] == [
        "step-00000003",
        "step-00000004",
    ]


def test_a_copy_that_somebody_made_beside_the_checkpoints_is_neither_taken_nor_deleted(
    tmp_path,
) -> None:
    for step in (1, 2, 3):
        folder, _ = write(tmp_path, step, [0.5])
        shutil.copytree(folder, folder.with_name(f"{folder.name}-copy"))
    delete_old_checkpoints(tmp_path, keep_last=1, keep_every=5)
    assert [path.name for path in complete_checkpoints(tmp_path)] == ["step-00000003"]
    left = [f"step-0000000{step}-copy" for step in (1, 2, 3)]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == sorted(
        [*left, "step-00000003"]
    )


def test_a_checkpoint_holds_nothing_of_a_save_of_the_same_step_that_was_killed(tmp_path) -> None:
    left, _ = write(tmp_path, 1, [0.3, 0.6])
    (left / "manifest.json").unlink()
    folder, _ = write(tmp_path, 1, [0.5])
    expected = {"state.json", *(checkpoint.rank_file(rank, 2) for rank in range(2))}
    assert folder == left and set(read_manifest(folder).files) == expected
    assert {path.name for path in folder.iterdir()} == {*expected, "manifest.json"}


def test_a_slice_is_written_in_pieces_that_are_waited_for_and_tell_of_themselves(
    tmp_path, monkeypatch
) -> None:
    """3 and 7 elements in pieces of 2, of which every second fills what may wait for the disk."""
    tensors = {"a": torch.arange(3.0), "b": torch.arange(7.0)}
    sizes = {name: tensor.numel() for name, tensor in tensors.items()}
    whole = checkpoint._write_slices(
        tmp_path / "whole.safetensors", sizes, tensors.items(), lambda: None
    )[1]
    told, flushed, fsync = [], [], checkpoint.os.fsync
    monkeypatch.setattr(checkpoint, "FLUSH_BYTES", 8)
    monkeypatch.setattr(
        checkpoint.os,
        "fsync",
        lambda number: flushed.append(os.fstat(number).st_size) or fsync(number),
    )
    path = tmp_path / "pieces.safetensors"
    assert (
        checkpoint._write_slices(path, sizes, tensors.items(), lambda: told.append(1))[1] == whole
    )
    assert path.read_bytes() == (tmp_path / "whole.safetensors").read_bytes()
    size = path.stat().st_size
    assert len(told) == 2 + 4 and [size - done for done in flushed] == [32, 20, 12, 4, 0]


def test_damage_and_other_runs_are_named(tmp_path) -> None:
    folder, state = write(tmp_path, 1, [0.5])
    with pytest.raises(InputError, match=r"another run: different seed \(found 0, asked for 1\)"):
        check_identity(folder, state.identity, Request({**state.identity, "seed": 1}))
    path = folder / "rank-00001-of-00002.safetensors"
    whole = path.read_bytes()
    path.write_bytes(b"\xff" * len(whole))
    with pytest.raises(InputError, match=r"is missing or damaged: .*header"):
        StateReader(folder)
    path.unlink()
    with pytest.raises(InputError, match="is missing or damaged: it has 0 bytes"):
        StateReader(folder)
    (folder / "state.json").write_text(json.dumps({"step": 1}))
    with pytest.raises(InputError, match="is missing or damaged"):
        read_state(folder)


def test_a_truncated_file_is_named_with_the_older_checkpoint_that_is_whole(tmp_path) -> None:
    for step in (1, 2, 3):
        folder, _ = write(tmp_path, step, [0.5])
    path = folder / "rank-00001-of-00002.safetensors"
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-4])
    found = (
        f"has {size - 4} bytes, manifest.json says {size}; remove .*step-00000003 to "
        "continue from step-00000002"
    )
    with pytest.raises(InputError, match=rf"{path.name} is missing or damaged: it {found}"):
        StateReader(folder)
    (tmp_path / "checkpoints" / "step-00000002" / "manifest.json").unlink()
    with pytest.raises(InputError, match="to continue from step-00000001"):
        StateReader(folder)


@pytest.mark.parametrize("spans", [[[0, 3], [4, 7]], [[0, 4], [2, 5]], [[0, 0], [4, 7]]])
def test_spans_that_leave_elements_out_give_no_memory_that_nobody_wrote(tmp_path, spans) -> None:
    folder, state = write(tmp_path, 1, [4 / 7])
    state.parameters["b"]["spans"] = spans
    with (
        StateReader(folder, state) as reader,
        pytest.raises(InputError, match="do not give the elements 0 … 7"),
    ):
        reader.fetch("b", "master", 0, 7)


def test_every_nth_checkpoint_stays(tmp_path) -> None:
    for step in range(1, 8):
        write(tmp_path, step, [])
    delete_old_checkpoints(tmp_path, keep_last=2, keep_every=3)
    assert [step_of(path) for path in complete_checkpoints(tmp_path)] == [3, 6, 7]


def test_a_rank_that_cannot_write_stops_all_and_leaves_older_checkpoints(tmp_path) -> None:
    folder, state = write(tmp_path, 1, [0.5])
    tensors = {f"{n}.{k}": values(n, k) for n in SHAPES for k in KEYS}
    new = checkpoint_folder(tmp_path, 2)

    def gather_with_a_full_disk(value):
        return [value, (None, "rank 1: No space left on device")]

    with pytest.raises(SaveError, match=r"could not be written.*rank 1: No space left"):
        checkpoint.CheckpointWriter(0, gather_with_a_full_disk).begin(
            new, state, tensors.items(), lambda folder: None
        )
    assert complete_checkpoints(tmp_path) == [folder] and not new.exists()


def test_what_is_begun_counts_only_when_it_is_committed_and_the_next_one_commits_it(
    tmp_path,
) -> None:
    folder, state = write(tmp_path, 1, [])
    tensors = {f"{n}.{k}": values(n, k) for n in SHAPES for k in KEYS}
    writer = checkpoint.CheckpointWriter(0, lambda value: [value])
    second, third = (checkpoint_folder(tmp_path, step) for step in (2, 3))
    assert not writer.is_written
    writer.begin(second, state, tensors.items(), lambda folder: None)
    while not writer.is_written:
        time.sleep(0.01)
    assert complete_checkpoints(tmp_path) == [folder]  # as if the process were killed here
    writer.begin(third, state, tensors.items(), lambda folder: None)
    assert complete_checkpoints(tmp_path) == [folder, second]
    writer.commit()
    writer.commit()
    assert complete_checkpoints(tmp_path) == [folder, second, third] and not writer.is_written


def test_a_thread_that_cannot_write_stops_the_run_when_it_commits(tmp_path) -> None:
    folder, state = write(tmp_path, 1, [])
    new = checkpoint_folder(tmp_path, 2)
    tensors = {f"{n}.{k}": values(n, k) for n in SHAPES for k in KEYS}

    def gather(value):
        (new / checkpoint.rank_file(0, 1) / "x").mkdir(
            parents=True, exist_ok=True
        )  # a folder where the file should be
        return [value]

    writer = checkpoint.CheckpointWriter(0, gather)
    writer.begin(new, state, tensors.items(), lambda folder: None)
    with pytest.raises(SaveError, match="could not be written"):
        writer.commit()
    assert complete_checkpoints(tmp_path) == [folder] and not new.exists()
