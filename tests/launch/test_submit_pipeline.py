"""What scripts/slurm/submit-pipeline.sh submits, with programs in the place of Slurm's."""

import os
import subprocess
from pathlib import Path

import pytest

from tests.launcher import ENVIRONMENT

REPOSITORY = Path(__file__).parents[2]
INPUTS = ("images", "data/train.json", "models/llama3.1-8b", "models/being-vq-8k")


@pytest.fixture
def workspace(tmp_path) -> Path:
    """Inputs that are there, and programs that take every job for submitted."""
    for name, words in (
        ("sbatch", 'echo 7; echo "$@" TOKENIZED=$TOKENIZED DS_CONFIG=$DS_CONFIG >> $0.log'),
        ("squeue", ""),
    ):
        program = tmp_path / "bin" / name
        program.parent.mkdir(exist_ok=True)
        program.write_text(f"#!/bin/sh\n{words}\n")
        program.chmod(0o755)
    for name in INPUTS:
        (tmp_path / name).mkdir(parents=True)
    return tmp_path


def submit(workspace: Path, **variables: object) -> subprocess.CompletedProcess[str]:
    path = f"{workspace}/bin:{os.environ['PATH']}"
    own = {name: str(value) for name, value in variables.items()}
    environment = {**ENVIRONMENT, "PATH": path, "WORKSPACE": str(workspace), **own}
    words = ["bash", "scripts/slurm/submit-pipeline.sh"]
    return subprocess.run(words, cwd=REPOSITORY, env=environment, text=True, capture_output=True)


@pytest.mark.parametrize("name", ["vbpe.json", "vbpe"])
def test_a_vbpe_file_or_folder_that_is_finished_is_not_trained_again(workspace, name) -> None:
    path = workspace / name
    assert "train-vbpe: job 7" in submit(workspace, VBPE_PATH=path).stdout
    marker = path if name.endswith(".json") else path / "manifest.json"
    marker.parent.mkdir(exist_ok=True)
    marker.write_text("{}")
    assert "train-vbpe: finished" in submit(workspace, VBPE_PATH=path).stdout


@pytest.mark.parametrize(
    ("variables", "found"),
    [
        ({"WORKSPACE": "/path/to/your/workspace"}, "/path/to/your/workspace, the example"),
        ({"LLAMA_PATH": "/no/llama"}, "LLAMA_PATH is /no/llama, which does not exist"),
        ({"JSON_PATH_1": "/no/pt.json"}, "JSON_PATH_1 is /no/pt.json, which does not exist"),
        ({"DS_CONFIG_PREFIX": "ds_configs/stag"}, "ds_configs/stag1.json, which does not exist"),
        ({"PYTHON": "/no/python"}, "/no/python cannot import beingvl"),
    ],
)
def test_nothing_is_submitted_where_something_is_missing(workspace, variables, found) -> None:
    done = submit(workspace, **variables)
    assert done.returncode == 2 and found in done.stderr, done.stderr
    assert not (workspace / "bin/sbatch.log").exists() and not (workspace / "slurm").exists()


def test_each_stage_may_have_rows_of_its_own(workspace) -> None:
    rows = {f"JSON_PATH_{stage}": workspace / f"data/{stage}.json" for stage in (1, 2, 3)}
    for path in rows.values():
        path.write_text("[]")
    done = submit(workspace, **rows)
    names = [line.split(":")[0] for line in done.stdout.splitlines()]
    of_stages = [f"{step}-{stage}" for stage in (1, 2, 3) for step in ("tokenize", "build-shards")]
    trained = ["train-1", "train-2", "train-3"]
    assert names == ["encode-images", "train-vbpe", "convert", *of_stages, *trained], done.stderr
    submitted = (workspace / "bin/sbatch.log").read_text().splitlines()
    for stage in (1, 2, 3):
        (line,) = (line for line in submitted if f"--job-name=tokenize-{stage} " in line)
        assert f" TOKENIZED={workspace}/data/tokenized-{stage} " in line


def test_each_stage_may_have_a_json_of_its_own(workspace) -> None:
    own = {f"DS_CONFIG_{stage}": f"ds_configs/stage{stage}-lora.json" for stage in (2, 3)}
    assert submit(workspace, **own).returncode == 0
    submitted = (workspace / "bin/sbatch.log").read_text().splitlines()
    for stage, name in enumerate(("stage1", "stage2-lora", "stage3-lora"), 1):
        (line,) = (line for line in submitted if f"--job-name=train-{stage} " in line)
        assert line.endswith(f" DS_CONFIG=ds_configs/{name}.json")
    gone = submit(workspace, DS_CONFIG_2="ds_configs/gone.json")
    assert "DS_CONFIG_2 is ds_configs/gone.json, which does not exist" in gone.stderr
