"""`beingvl launch` and the stage scripts on this machine alone: what is started, what is
refused, what a signal does.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from beingvl.train.metrics import read_metrics
from tests.launcher import ENVIRONMENT, free_port, has_step, stage_words
from tests.tiny import stage_fields, write_inputs

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    fields = stage_fields(max_steps=300, epochs=1000, checkpoint_every_steps=0)
    return write_inputs(tmp_path_factory.mktemp("launch"), stage=fields)


def command(work: Path, output: Path, *options: object) -> list[str]:
    hostfile = REPOSITORY / "hostfiles/hostfile-0"
    words = [sys.executable, "-m", "beingvl", "launch", "--hostfile", hostfile, *options, "--"]
    words += stage_words(work / "stage.json", work / "base", work / "shards", output)
    return [str(word) for word in words]


def run(words: list[str], **variables: object) -> subprocess.CompletedProcess:
    environment = {**ENVIRONMENT, **{name: str(value) for name, value in variables.items()}}
    return subprocess.run(
        words, env=environment, capture_output=True, text=True, timeout=120, cwd=REPOSITORY
    )


def write_program(path: Path, script: str) -> None:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def processes_of(folder: Path) -> list[str]:
    """Command lines, except this test's own, in which the folder is named."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        line = " ".join(process.info["cmdline"] or [])
        if str(folder) in line and process.pid != os.getpid():
            found.append(line)
    return found


def test_dry_run_shows_command_and_variables_and_starts_nothing(work, tmp_path) -> None:
    done = run(
        command(work, tmp_path / "x", "--dry_run"), NCCL_DEBUG="INFO", http_proxy="http://proxy"
    )
    assert done.returncode == 0, done.stderr
    assert "NCCL_DEBUG=INFO\n" in done.stdout and "proxy" not in done.stdout
    assert (
        "deepspeed --quiet --hostfile /dev/null --num_gpus 2 " in done.stdout
        and "--module beingvl.train.train_stage" in done.stdout
    )
    assert not (tmp_path / "x").exists()


def test_dry_run_of_two_hosts(work, tmp_path) -> None:
    write_program(tmp_path / "pdsh", "")
    path = f"{tmp_path}:{ENVIRONMENT['PATH']}"
    words = command(work, tmp_path / "x", "--dry_run", "--master_addr", "10.0.0.1")
    words[words.index("--hostfile") + 1] = str(REPOSITORY / "hostfiles/hostfile-1")
    done = run(words, PATH=path)
    assert done.returncode == 0, done.stderr
    assert "hostfile-1 --force_multi --no_ssh_check --master_addr 10.0.0.1" in done.stdout
    at = words.index("--dry_run")
    done = run([*words[:at], "--num_ranks", "3", *words[at:]], PATH=path)
    assert done.returncode == 2 and "--num_ranks is for this machine alone" in done.stderr


def test_a_busy_port_is_named(work, tmp_path) -> None:
    with socket.socket() as sock:
        sock.bind(("", 0))
        sock.listen()
        port = sock.getsockname()[1]
        done = run(command(work, tmp_path / "x", "--master_port", port))
    assert (
        done.returncode == 2
        and f"port {port}: busy" in done.stderr
        and "older run may still be there" in done.stderr
    )
    assert not (tmp_path / "x").exists()


def test_a_missing_model_and_a_missing_hostfile_are_named(work, tmp_path) -> None:
    words = command(work, tmp_path / "x", "--master_port", free_port())
    words[words.index(str(work / "base"))] = str(tmp_path / "none")
    done = run(words)
    assert done.returncode == 2 and "make it with `beingvl convert" in done.stderr
    words[words.index("--hostfile") + 1] = "hostfiles/hostfile-99"
    done = run(words)
    assert done.returncode == 2 and "hostfile-99 does not exist" in done.stderr


def test_a_signal_to_the_launcher_stops_after_the_step_with_a_checkpoint(work, tmp_path) -> None:
    """Ranks of this run only: another run's launcher is not touched, as DeepSpeed's own answer
    to a signal would.
    """
    output = tmp_path / "stopped"
    bystander = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import time; time.sleep(600)",
            "beingvl.train.train_stage --local_rank=0",
        ]
    )
    with open(tmp_path / "log", "w") as log:
        words = command(work, output, "--master_port", free_port())
        launcher = subprocess.Popen(words, env=ENVIRONMENT, stdout=log, stderr=log, cwd=REPOSITORY)
    deadline = time.monotonic() + 240
    while not has_step(output) and time.monotonic() < deadline:
        time.sleep(0.05)
    launcher.send_signal(signal.SIGTERM)
    assert launcher.wait(timeout=120) == 85, (tmp_path / "log").read_text()[-3000:]
    assert len(list((output / "checkpoints").glob("step-*/manifest.json"))) == 1
    assert 0 < len(read_metrics(output)) < 300
    assert not list(output.glob(".deepspeed_env*")) and not processes_of(output)
    assert bystander.poll() is None
    bystander.kill()
    bystander.wait()


def test_a_signal_before_there_is_a_rank_is_not_lost(work, tmp_path) -> None:
    with open(tmp_path / "log", "w") as log:
        words = command(work, tmp_path / "early", "--master_port", free_port())
        launcher = subprocess.Popen(words, env=ENVIRONMENT, stdout=log, stderr=log, cwd=REPOSITORY)
    deadline = time.monotonic() + 240
    while not list((tmp_path / "early").glob(".deepspeed_env*")) and time.monotonic() < deadline:
        time.sleep(0.005)
    launcher.send_signal(signal.SIGTERM)
    assert launcher.wait(timeout=60) == 85, (tmp_path / "log").read_text()[-3000:]
    assert not list((tmp_path / "early").glob(".deepspeed_env*")) and not processes_of(
        tmp_path / "early"
    )


def test_a_second_signal_kills(work, tmp_path) -> None:
    output = tmp_path / "killed"
    with open(tmp_path / "log", "w") as log:
        words = command(work, output, "--master_port", free_port())
        launcher = subprocess.Popen(words, env=ENVIRONMENT, stdout=log, stderr=log, cwd=REPOSITORY)
    while not list(output.glob(".deepspeed_env*")):
        assert launcher.poll() is None
        time.sleep(0.005)
    launcher.send_signal(signal.SIGTERM)
    while "a second signal kills them" not in (tmp_path / "log").read_text():
        assert launcher.poll() is None
        time.sleep(0.005)
    launcher.send_signal(signal.SIGTERM)
    assert launcher.wait(timeout=60) not in (0, 85)
    deadline = time.monotonic() + 60
    while processes_of(output) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not processes_of(output)


def test_the_devices_of_cuda_visible_devices_are_taken(work, tmp_path) -> None:
    write_program(
        tmp_path / "nvidia-smi",
        'for i in 0 1 2 3; do echo "GPU $i: NVIDIA H100 (UUID: GPU-$i)"; done',
    )
    variables = {
        "PATH": f"{tmp_path}:{ENVIRONMENT['PATH']}",
        "DS_ACCELERATOR": "",
        "CUDA_VISIBLE_DEVICES": "1,3",
    }
    assert (
        " --include localhost:1,3 "
        in run(command(work, tmp_path / "x", "--dry_run"), **variables).stdout
    )
    done = run(
        command(work, tmp_path / "x", "--dry_run"),
        **{**variables, "CUDA_VISIBLE_DEVICES": "GPU-ab12"},
    )
    assert done.returncode == 2 and "DeepSpeed takes numbers only" in done.stderr


def test_the_stages_json_and_the_port_are_checked_first(work, tmp_path) -> None:
    (tmp_path / "bad.json").write_text(json.dumps(stage_fields(epoch=1)))
    words = command(work, tmp_path / "x", "--master_port", free_port())
    words[words.index(str(work / "stage.json"))] = str(tmp_path / "bad.json")
    done = run(words)
    assert (
        done.returncode == 2
        and "bad.json: refused" in done.stderr
        and "did you mean beingvl.epochs?" in done.stderr
    )
    done = run(command(work, tmp_path / "x", "--master_port", 99999))
    assert done.returncode == 2 and "--master_port is 99999, expected 1 to 65535" in done.stderr
    assert not (tmp_path / "x").exists()


def test_a_stage_script_takes_a_model_and_a_stage_folder(work, tmp_path) -> None:
    variables = {
        "DATA_PATH": work / "shards",
        "OUTPUT_DIR": tmp_path / "stage-1",
        "LOG_DIR": tmp_path / "logs",
    }
    variables |= {"DS_CONFIG": work / "stage.json", "DRY_RUN": 1}
    done = run(["bash", "beingvl/scripts/train-stage-1.sh", "0", str(work / "base")], **variables)
    assert (
        done.returncode == 0
        and f"start model {work / 'base'}" in done.stdout
        and "--num_gpus 2" in done.stdout
    ), done.stderr
    assert not (tmp_path / "stage-1").exists() and not (tmp_path / "logs").exists()
    done = run(
        ["bash", "scripts/train-stage-1.sh", "0", str(work / "base")],
        **{**variables, "NUM_RANKS": 1},
    )
    assert "--num_gpus 1" in done.stdout
    done = run(["bash", "scripts/train-stage-1.sh", "0", str(tmp_path / "later")], **variables)
    assert done.returncode == 0 and f"note: {tmp_path / 'later'} is missing" in done.stderr
    del variables["DRY_RUN"]
    done = run(
        ["bash", "scripts/train-stage-1.sh", "0", str(work / "base"), "--set", "beingvl.epoch=1"],
        **variables,
    )
    assert done.returncode == 2 and "did you mean beingvl.epochs?" in done.stderr
    assert not list(tmp_path.iterdir())  # a refused start leaves nothing
