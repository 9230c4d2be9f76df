"""A launcher that is killed takes its ranks along, and the same command just works again."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from beingvl.launch.start_training import exit_code_of
from beingvl.train.launchers import is_launcher
from tests.launcher import ENVIRONMENT, free_port, has_step, stage_words
from tests.tiny import stage_fields, write_inputs

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    fields = stage_fields(epochs=1000, max_steps=400, checkpoint_every_steps=2)
    return write_inputs(tmp_path_factory.mktemp("launchers"), stage=fields)


def start(work: Path, output: Path, port: int, *settings: str) -> subprocess.Popen:
    words = [sys.executable, "-m", "beingvl", "launch", "--master_port", str(port)]
    words += ["--hostfile", str(REPOSITORY / "hostfiles/hostfile-0"), "--num_ranks", "2", "--"]
    words += stage_words(work / "stage.json", work / "base", work / "shards", output)
    words += ["--set", *settings] if settings else []
    with open(f"{output}.log", "a") as log:
        return subprocess.Popen(words, env=ENVIRONMENT, stdout=log, stderr=log, cwd=REPOSITORY)


def wait_for_step(output: Path, step: int = 1) -> None:
    deadline = time.monotonic() + 180
    while not has_step(output, step):
        assert time.monotonic() < deadline, Path(f"{output}.log").read_text()[-3000:]
        time.sleep(0.05)


def below(launcher: subprocess.Popen) -> dict[str, psutil.Process]:
    """The processes between this one and the ranks, and rank 0."""
    found = {}
    for process in psutil.Process(launcher.pid).children(recursive=True):
        words = process.cmdline()
        if "deepspeed.launcher.launch" in words[:4]:
            found["of the host"] = process
        elif words[1:2] and os.path.basename(words[1]) == "deepspeed":
            found["deepspeed"] = process
        elif "--local_rank=0" in words[:6]:
            found["rank"] = process
    return found


@pytest.mark.parametrize(
    "killed",
    [
        pytest.param("beingvl launch", marks=pytest.mark.slow),
        "deepspeed",
        pytest.param("of the host", marks=pytest.mark.slow),
    ],
)
def test_ranks_of_a_killed_launcher_end_and_the_next_start_just_works(
    work, tmp_path, killed: str
) -> None:
    """On the same port, at once."""
    output, port = tmp_path / "out", free_port()
    launcher = start(work, output, port)
    wait_for_step(output, 3)
    processes = below(launcher)
    rank = processes["rank"]
    (launcher if killed == "beingvl launch" else processes[killed]).send_signal(signal.SIGKILL)
    if killed == "beingvl launch":
        launcher.wait()
    again = start(work, output, port, "beingvl.checkpoint_every_steps=50")
    launcher.wait(timeout=60)
    rank.wait(timeout=60)
    wait_for_step(output, 20)
    log = Path(f"{output}.log").read_text()
    assert "resumed from" in log and "in use by" not in log, log[-4000:]
    below(again)["rank"].kill()
    assert again.wait(timeout=60) == 137  # 128 + 9, as a shell tells it


def test_a_busy_port_names_who_listens(work, tmp_path) -> None:
    with socket.socket() as sock:
        sock.bind(("", 0))
        sock.listen()
        launcher = start(work, tmp_path / "out", sock.getsockname()[1])
        assert launcher.wait(timeout=60) == 2
    log = (tmp_path / "out.log").read_text()
    assert f"busy: process {os.getpid()} (`" in log and "an older run may still be there" in log


def test_exit_codes_are_those_of_a_shell() -> None:
    told = {0: 0, 2: 2, 85: 85, 130: 130, 137: 137, 255: 255, -9: 137, 247: 137, 241: 143}
    assert {code: exit_code_of(code) for code in told} == told


def test_only_programs_that_start_ranks_are_followed() -> None:
    slurm = "slurmstepd: [7.0]"
    for line in (
        "python /venv/bin/deepspeed --hostfile x --module beingvl.train.train_stage",
        "python -u -m deepspeed.launcher.launch --world_info=e30=",
        "/venv/bin/python -m beingvl launch --hostfile x",
        "python /venv/bin/torchrun --nproc-per-node 2 x",
        "mpirun -n 2 x",
    ):
        assert is_launcher(line.split()), line
    assert is_launcher([slurm])
    for line in (
        "bash scripts/quickstart.sh",
        "python -m pytest tests/launch",
        "/usr/sbin/sshd -D",
        "python -m beingvl train --output deepspeed",
    ):
        assert not is_launcher(line.split()), line
