"""Start training on CPU ranks of this machine, and reach its processes."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

SPAWN_RANKS = Path(__file__).parent / "spawn_ranks.py"
# that of this session, or in a program that a test has started, of the test's
WARM_PARENT = os.environ.get(
    "BEINGVL_WARM_PARENT", f"{tempfile.gettempdir()}/beingvl-warm-{os.getpid()}:{os.getpid()}"
)
WARM_FOLDER = Path(WARM_PARENT.rpartition(":")[0])
# a Python whose heavy imports are done; what it may be told begins with -m, -c or a file's name
PYTHON = [sys.executable, "-I", "-S", str(Path(__file__).parent / "warm_python.py")]
ENVIRONMENT = {
    **os.environ,
    "DS_ACCELERATOR": "cpu",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "BEINGVL_WARM_PARENT": WARM_PARENT,
    "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
}


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def stage_words(config: Path, model: Path, data: Path, output: Path) -> list[str]:
    """The trainer's arguments for a stage."""
    paths = {"deepspeed_config": config, "model": model, "data": data, "output": output}
    return [word for name, path in paths.items() for word in (f"--{name}", str(path))]


def start(
    num_ranks: int,
    config: Path,
    model: Path,
    data: Path,
    output: Path,
    *overrides: str,
    device: str = "cpu",
) -> subprocess.Popen:
    """Start one stage on devices of a type (`cpu`, `cuda`); standard output and error end up in
    OUTPUT.log.
    """
    command = [sys.executable, str(SPAWN_RANKS), str(num_ranks), str(free_port())]
    command += ["beingvl.train.train_stage", *stage_words(config, model, data, output)]
    if overrides:
        command += ["--set", *overrides]
    with open(f"{output}.log", "a") as log:
        environment = {**ENVIRONMENT, "DS_ACCELERATOR": device}
        return subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)


def run(num_ranks: int, *stage: Path | str, device: str = "cpu") -> int:
    """`start` a stage and wait for its end; returns the launcher's exit code."""
    return start(num_ranks, *stage, device=device).wait(timeout=300)


def run_alone(
    work: Path, output: Path, *more: str, model: Path | None = None, **environment: str
) -> subprocess.CompletedProcess:
    """One rank without a launcher, which is the quick way, of the stage WORK/all.json."""
    words = stage_words(work / "all.json", model or work / "base", work / "shards", output)
    variables = {**ENVIRONMENT, "MASTER_PORT": str(free_port()), **environment}
    command = [*PYTHON, "-m", "beingvl", "train", *words, *more]
    return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=300)


def run_each(commands: list[list[str]]) -> list[subprocess.CompletedProcess]:
    """One command per rank, as if each were started on its own host."""
    common, started = (
        {**ENVIRONMENT, "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(len(commands))},
        [],
    )
    for rank, command in enumerate(commands):
        environment = {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        started.append(
            subprocess.Popen(
                command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
        )
    shown = [process.communicate(timeout=300) for process in started]
    return [
        subprocess.CompletedProcess(process.args, process.returncode, *texts)
        for process, texts in zip(started, shown, strict=True)
    ]


def log_of(output: Path) -> str:
    return Path(f"{output}.log").read_text()


def rank_processes(launcher: subprocess.Popen) -> dict[int, psutil.Process]:
    """Rank -> its process. Signals go to ranks: DeepSpeed's runner answers a signal with pkill
    on every host.
    """
    found = {}
    for child in psutil.Process(launcher.pid).children(recursive=True):
        # It may just have ended; a zombie is one of these.
        with contextlib.suppress(psutil.NoSuchProcess):
            for word in child.cmdline():
                if word.startswith("--local_rank="):
                    found[int(word.split("=")[1])] = process_of(child)
    return found


def process_of(started: psutil.Process) -> psutil.Process:
    """The process itself, for which `PYTHON` stands in. Raises NoSuchProcess when it has ended."""
    path = WARM_FOLDER / str(started.pid)
    while PYTHON[-1] in started.cmdline():  # until it is a Python of its own
        if path.exists():
            return psutil.Process(int(path.read_text()))
        time.sleep(0.005)
    return started


def has_step(output: Path, step: int = 1) -> bool:
    """Whether metrics.jsonl holds `step`: a run that is asked to stop before has nothing to
    save.
    """
    path = output / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
    return any(json.loads(line)["step"] >= step for line in lines if line.endswith("\n"))


def wait_for_step(
    launcher: subprocess.Popen, output: Path, step: int, seconds: float = 240
) -> None:
    """Return as soon as metrics.jsonl holds `step`."""
    deadline = time.monotonic() + seconds
    while not has_step(output, step):
        assert launcher.poll() is None, (
            f"the run ended before step {step}: {log_of(output)[-3000:]}"
        )
        assert time.monotonic() < deadline, (
            f"step {step} was not reached in {seconds} s: {log_of(output)[-3000:]}"
        )
        time.sleep(0.005)
