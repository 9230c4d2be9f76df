"""A flipped bit in what a step reads never reaches what it writes."""

import shutil
from pathlib import Path

import pytest

from beingvl.errors import InputError
from beingvl.train.checkpoint import rank_file
from beingvl.train.checkpoint_folders import complete_checkpoints
from beingvl.train.hf_folder import write_hf_folder
from tests.damage import flip_bit
from tests.launcher import log_of, run, run_alone
from tests.tiny import stage_fields, write_inputs

# ---- training ----


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """Inputs, and a run of two ranks that was killed before `final/`, with two checkpoints."""
    work = write_inputs(tmp_path_factory.mktemp("damage"), all=stage_fields(keep_last=2))
    inputs = work / "all.json", work / "base", work / "shards"
    assert run(2, *inputs, work / "stage") == 0, log_of(work / "stage")
    shutil.rmtree(work / "stage" / "final")
    return work


@pytest.fixture
def stage(tmp_path, work) -> Path:
    return Path(shutil.copytree(work / "stage", tmp_path / "stage"))


def test_a_damaged_start_model_is_not_trained(work, tmp_path) -> None:
    model, output = tmp_path / "base", tmp_path / "stage"
    shutil.copytree(work / "base", model)
    flip_bit(model / "model.safetensors", -1)
    assert run(2, work / "all.json", model, work / "shards", output) != 0
    said = f"{model / 'model.safetensors'} does not have the hash that manifest.json says"
    assert log_of(output).count(said) == 2  # by both ranks, though one has read it
    assert "Traceback" not in log_of(output) and not complete_checkpoints(output)


def test_a_run_does_not_go_on_from_damaged_slices(work, stage) -> None:
    older, newest = complete_checkpoints(stage)
    path = newest / rank_file(1, 2)
    flip_bit(path, path.stat().st_size // 2)
    done = run_alone(work, stage)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert f"{path} is missing or damaged: it does not have the hash" in done.stderr
    assert f"remove {newest} to go on from {older.name}" in done.stderr
    assert not (stage / "final").exists()


@pytest.mark.parametrize("name", [rank_file(0, 2), rank_file(1, 2), "state.json"])
def test_damaged_slices_do_not_reach_final(work, stage, name) -> None:
    newest = complete_checkpoints(stage)[-1]
    flip_bit(newest / name, -1)
    with pytest.raises(InputError, match=rf"{name} is missing or damaged: it does not have"):
        write_hf_folder(work / "base", newest, stage / "final")
    assert not (stage / "final").exists()


@pytest.mark.parametrize("name", ["model.safetensors", "generation_config.json"])
def test_a_start_model_that_was_damaged_during_the_run_does_not_reach_final(
    work, stage, tmp_path, name
) -> None:
    model = Path(shutil.copytree(work / "base", tmp_path / "base"))
    flip_bit(model / name, -1)
    with pytest.raises(InputError, match=rf"{model / name} does not have the hash"):
        write_hf_folder(model, complete_checkpoints(stage)[-1], stage / "final")
    assert not (stage / "final" / "manifest.json").exists()
