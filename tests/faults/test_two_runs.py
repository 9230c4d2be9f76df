"""Two runs that write into one folder: one wins, the other says who has it."""

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from beingvl.artefact.manifest import read_manifest, verify_folder
from beingvl.artefact.owner import OWNER
from beingvl.commands import main as cli
from beingvl.errors import InputError
from beingvl.train.checkpoint import read_state
from beingvl.train.checkpoint_folders import complete_checkpoints
from beingvl.train.run_stage import write_final
from beingvl.train.stage_run import open_stage
from tests.launcher import ENVIRONMENT, log_of, rank_processes, run, start, wait_for_step
from tests.model.small_models import write_base_model
from tests.tiny import stage_fields, write_inputs

IN_USE = r"is in use by process (\d+) on \S+ \(`.*`, since 20\d\d-.*\); wait for it, or end it"


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("two-runs"), all=stage_fields(epochs=8))


def inputs_of(work: Path, output: Path) -> tuple[Path, Path, Path, Path]:
    return work / "all.json", work / "base", work / "shards", output


@pytest.mark.parametrize("seeds", [(0, 0), (1, 2)], ids=["identical", "two seeds"])
def test_of_two_trainings_in_one_folder_one_wins_and_the_other_names_it(
    work, tmp_path, seeds: tuple[int, int]
) -> None:
    """With two ranks each, started at the same moment."""
    output = tmp_path / "out"
    started = [start(2, *inputs_of(work, output), f"beingvl.seed={seed}") for seed in seeds]
    codes = [launcher.wait(timeout=300) for launcher in started]
    assert sorted(codes) == [0, 2], log_of(output)[-4000:]
    assert re.search(IN_USE, log_of(output)), log_of(output)[-4000:]
    won = read_manifest(output / "final").details["identity"]
    assert won["seed"] == seeds[codes.index(0)]
    for folder in complete_checkpoints(output):
        assert read_state(folder).identity == won
        verify_folder(folder)
    assert not (output / OWNER).exists()


def test_a_second_run_says_who_has_the_folder_and_disturbs_nothing(work, tmp_path) -> None:
    output = tmp_path / "out"
    first = start(2, *inputs_of(work, output), "beingvl.epochs=100")
    wait_for_step(first, output, 2)
    members = {process.pid for process in rank_processes(first).values()}
    assert run(2, *inputs_of(work, output), "beingvl.epochs=100") == 2
    named = {int(process) for process in re.findall(IN_USE, log_of(output))}
    assert named and named <= members and first.poll() is None
    for process in rank_processes(first).values():
        process.kill()
    first.wait(timeout=60)
    assert run(2, *inputs_of(work, output), "beingvl.epochs=100", "beingvl.max_steps=1") == 2
    assert "belongs to another run: different max_steps" in log_of(output)  # owned no more


def test_final_is_written_from_a_checkpoint_of_this_run_alone(work, tmp_path) -> None:
    output = tmp_path / "out"
    assert run(1, *inputs_of(work, output), "beingvl.max_steps=3") == 0, log_of(output)
    (output / "final" / "manifest.json").unlink()
    other = ["beingvl.max_steps=3", "beingvl.seed=5"]
    stage = open_stage(
        work / "base", work / "shards", output, work / "all.json", other, None, None, False
    )
    with pytest.raises(InputError, match=r"step-0\S+ belongs to another run: different seed"):
        write_final(stage)
    assert not (output / "final" / "manifest.json").exists()


STEPS: dict[str, str] = {
    "encode-images": "--image_path=IN/images --vq_path=IN/vqgan --output_path=OUT",
    "train-vq": "--image_path=IN/images --output_path=OUT",
    "train-vbpe": "--data_path=IN/encode-images --output_path=OUT",
    "convert": "--llama_path=LLAMA --being_vq_path=IN/vqgan --num_merges=0 --output_path=OUT",
    "tokenize": "--mode=pt --json_path=IN/rows.json --model_path=IN/base --output_dir=OUT"
    " --vq_codes=IN/encode-images",
    "build-shards": "--jsonl_path=IN/tokenize/data_base.jsonl --output_path=OUT",
    "export": "--model=IN/base --format=being-vl-0.5 --output_path=OUT",
    "evaluate": "--model=IN/base --text_parity=IN/base --output_path=OUT",
    "report vbpe": "IN/vbpe.json --output=OUT",
}


@pytest.fixture(scope="module")
def holder(tmp_path_factory) -> Iterator[tuple[Path, int]]:
    """A folder, and the process that owns it."""
    output = tmp_path_factory.mktemp("held") / "out"
    program = Path(__file__).parents[1] / "artefact" / "hold_folder.py"
    words = [sys.executable, str(program), str(output)]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT)
    assert process.stdout and process.stdout.readline() == "owned\n"
    (output / ".data.owner.tmp").symlink_to(OWNER)  # of one of the datasets of tokenize
    yield output, process.pid
    process.kill()
    process.wait()


@pytest.mark.parametrize("step", STEPS)
def test_every_step_names_the_process_that_has_its_output(
    inputs, holder, step: str, tmp_path, capsys, monkeypatch
) -> None:
    write_base_model(tmp_path / "llama")
    monkeypatch.setattr("beingvl.artefact.owner.PATIENCE_SECONDS", 0)
    output, process = holder
    places = {"IN/": f"{inputs}/", "OUT": f"{output}", "LLAMA": f"{tmp_path / 'llama'}"}
    words = STEPS[step]
    for name, place in places.items():
        words = words.replace(name, place)
    assert cli.main([*step.split(), *words.split()]) == 2
    error = capsys.readouterr().err
    assert re.search(IN_USE, error) and f"process {process} " in error, error
    assert sorted(path.name for path in output.iterdir()) == [".data.owner.tmp", OWNER]
