"""Training across two hosts through the real `deepspeed --hostfile`, pdsh and sshd; and what is
shown when something is wrong.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from beingvl.train.metrics import read_metrics
from tests.launch.two_hosts import TwoHosts, two_hosts
from tests.launcher import ENVIRONMENT, free_port, has_step, log_of, stage_words
from tests.launcher import run as run_on_one_host
from tests.tiny import stage_fields, write_inputs

pytestmark = pytest.mark.needs_root
REPOSITORY = Path(__file__).parents[2]
DIRECT = "deepspeed alone"
ROWS_ONLY = [{"match": "visual_rows"}, {"match": ".*", "train": False}]


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    block = {"trainable": ROWS_ONLY, "checkpoint_every_steps": 0, "stall_timeout_seconds": 12}
    return write_inputs(
        tmp_path_factory.mktemp("hosts"),
        stage1=stage_fields(max_steps=20, epochs=20, **block),
        long=stage_fields(max_steps=10000, epochs=2000, **block),
    )


@pytest.fixture(scope="module")
def hosts(work):
    path = f"{REPOSITORY}:{os.environ.get('PYTHONPATH', '')}"
    with two_hosts(work, {**ENVIRONMENT, "PYTHONPATH": path}) as made:
        yield made


def trainer(work: Path, output: Path, stage: str = "stage1.json") -> list[object]:
    return stage_words(work / stage, work / "base", work / "shards", output)


def launch(
    hosts: TwoHosts, work: Path, output: Path, *options: object, stage: str = "stage1.json"
) -> list[object]:
    words = [sys.executable, "-m", "beingvl", "launch", "--hostfile", hosts.hostfile()]
    words += ["--master_port", free_port(), *options]
    return [*words, "--", *trainer(work, output, stage)]


def losses(output: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(output)]


@pytest.fixture(scope="module")
def one_host(work) -> list[float]:
    output = work / "one"
    assert run_on_one_host(2, work / "stage1.json", work / "base", work / "shards", output) == 0, (
        log_of(output)
    )
    return losses(output)


def test_the_stage_script_trains_across_two_hosts_as_on_one(hosts, work, one_host) -> None:
    output = work / "stage-1"
    paths = {
        "DATA_PATH": work / "shards",
        "OUTPUT_DIR": output,
        "LOG_DIR": work / "logs",
        "DS_CONFIG": work / "stage1.json",
    }
    code, shown = hosts.run(
        ["bash", "scripts/train-stage-1.sh", "1", work / "base"],
        **paths,
        HOSTFILE=hosts.hostfile(),
        MASTER_PORT=free_port(),
    )
    assert code == 0, shown[-4000:]
    assert all(f"{name}: " in shown for name in hosts.names)  # as pdsh begins their lines
    assert len(one_host) == 20 and losses(output) == one_host
    assert not list(output.glob(".deepspeed_env*"))
    hosts.wait_until_nothing_runs()


def direct(hosts: TwoHosts, work: Path, output: Path, stage: str) -> list[object]:
    """Words of a `deepspeed --hostfile` without `beingvl launch`, for DS_ENV_FILE."""
    (work / "direct_env").write_text(
        "GLOO_SOCKET_IFNAME=bvl0\nDS_ACCELERATOR=cpu\nOMP_NUM_THREADS=1\n"
    )
    words = [Path(sys.executable).parent / "deepspeed", "--hostfile", hosts.hostfile()]
    words += ["--no_ssh_check", "--master_addr", hosts.names[0], "--master_port", free_port()]
    return [*words, "--module", "beingvl.train.train_stage", *trainer(work, output, stage)]


def test_a_direct_deepspeed_hostfile_command_trains_the_same(hosts, work, one_host) -> None:
    output = work / "direct"
    words = direct(hosts, work, output, "stage1.json")
    code, shown = hosts.run(words, DS_ENV_FILE=work / "direct_env")
    assert code == 0, shown[-4000:]
    assert losses(output) == one_host
    hosts.wait_until_nothing_runs()


def test_preflight_of_two_hosts_is_green_and_measures(hosts, work) -> None:
    words = [
        sys.executable,
        "-m",
        "beingvl",
        "preflight",
        "--hostfile",
        hosts.hostfile(),
        "--stage",
        work / "stage1.json",
    ]
    words += [
        "--model",
        work / "base",
        "--data",
        work / "shards",
        "--output",
        work / "new",
        "--seconds",
        1,
    ]
    code, shown = hosts.run([*words, "--master_port", free_port()])
    assert code == 0 and "RED" not in shown, shown
    assert re.search(r"all-reduce +[0-9.]+ GB/s, [0-9]+ us, 2 ranks", shown), shown
    assert "accepted, 2 accumulation steps on 2 ranks" in shown
    hosts.wait_until_nothing_runs()


def test_wrong_slots_busy_port_and_typo_are_named_and_start_nothing(hosts, work, tmp_path) -> None:
    words = launch(hosts, work, tmp_path / "x")
    words[words.index("--hostfile") + 1] = hosts.hostfile((1, 4096))
    code, shown = hosts.run(words)
    assert (
        code == 2
        and f"{hosts.names[1]}: slots: 4096 slots, {os.cpu_count()} CPU cores (write slots="
        in shown
    ), shown
    (tmp_path / "typo").write_text(f"{hosts.names[0]} slots=1\n{hosts.names[1]} slost=1\n")
    words[words.index("--hostfile") + 1] = tmp_path / "typo"
    code, shown = hosts.run(words)
    assert code == 2 and f"typo, line 2: '{hosts.names[1]} slost=1' is not a host" in shown
    listen = (
        "import socket, time; s = socket.socket(); s.bind(('', 29777)); s.listen(); "
        "print('listening', flush=True)"
    )
    listen += "; time.sleep(60)"
    listener = hosts.start([sys.executable, "-c", listen])
    assert listener.stdout.readline() == "listening\n"
    code, shown = hosts.run(launch(hosts, work, tmp_path / "x", "--master_port", 29777))
    listener.kill()
    listener.wait()
    assert code == 2 and f"{hosts.names[0]}: port 29777: busy" in shown, shown
    assert not (tmp_path / "x").exists()
    hosts.wait_until_nothing_runs()


def test_another_version_on_one_host_is_named(hosts, work, tmp_path) -> None:
    """The second host sees another checkout: a wrapper around its sshd's shell puts an edited
    copy first.
    """
    shutil.copytree(
        REPOSITORY / "beingvl",
        tmp_path / "other/beingvl",
        ignore=shutil.ignore_patterns("__pycache__", "scripts"),
    )
    source = tmp_path / "other/beingvl/version.py"
    source.write_text(source.read_text().replace('__version__ = "', '__version__ = "9.'))
    wrapper = tmp_path / "python"
    wrapper.write_text(
        f"""#!/bin/sh
case "$SSH_CONNECTION" in
*"{hosts.names[1]} 2231") cd {tmp_path}/other && export PYTHONPATH={tmp_path}/other ;;
esac
exec {sys.executable} "$@"
"""
    )
    wrapper.chmod(0o755)
    code = (
        f"import sys; sys.executable = {str(wrapper)!r}; from beingvl.commands.main "
        "import main; sys.exit(main(sys.argv[1:]))"
    )
    words = launch(hosts, work, tmp_path / "x")
    exit_code, shown = hosts.run([sys.executable, "-c", code, *words[3:]])
    assert exit_code == 2, shown
    assert (
        f"{hosts.names[1]}: beingvl: 9." in shown
        and "install the same on every host" in shown
        and f"{hosts.names[1]}: code: " in shown
    )
    assert not (tmp_path / "x").exists()
    hosts.wait_until_nothing_runs()


def start_long(
    hosts: TwoHosts, work: Path, output: Path, words: list[object] | None = None
) -> subprocess.Popen:
    variables = {"DS_ENV_FILE": work / "direct_env"} if words else {}
    launcher = hosts.start(words or launch(hosts, work, output, stage="long.json"), **variables)
    deadline = time.monotonic() + 300
    while not has_step(output):
        if launcher.poll() is not None or time.monotonic() > deadline:
            launcher.kill()  # else its output never ends
            raise AssertionError(launcher.stdout.read()[-4000:])
        time.sleep(0.05)
    return launcher


def test_a_signal_to_the_launcher_stops_both_hosts_with_a_checkpoint(hosts, work, tmp_path) -> None:
    output = tmp_path / "stopped"
    launcher = start_long(hosts, work, output)
    launcher.send_signal(signal.SIGTERM)
    shown, _ = launcher.communicate(timeout=120)
    assert launcher.returncode == 85, shown[-4000:]
    assert len(list((output / "checkpoints").glob("step-*/manifest.json"))) == 1
    hosts.wait_until_nothing_runs()


def test_a_host_that_goes_silent_ends_the_run(hosts, work, tmp_path) -> None:
    launcher = start_long(hosts, work, tmp_path / "silent")
    try:
        hosts.silence(1)
        shown, _ = launcher.communicate(timeout=120)
        assert launcher.returncode not in (0, 85), shown[-4000:]
        # its process lives on behind the cut, and its heartbeats may be seen: both hosts are one
        # machine here
        lost = (
            r"rank 0, step \d+, phase .*rank 1 \(process \d+ on .*\) (gives no sign of "
            r"life|has stalled)"
        )
        assert re.search(lost, shown), shown[-4000:]
        hosts.wait_until_nothing_runs()
        code, shown = hosts.run(launch(hosts, work, tmp_path / "again"))
        assert code == 2 and f"{hosts.names[1]}: reachable: no: " in shown, shown
    finally:
        hosts.reconnect(1)


def test_a_killed_rank_ends_the_run_on_both_hosts(hosts, work, tmp_path) -> None:
    launcher = start_long(hosts, work, tmp_path / "killed")
    ranks = [process for process in hosts.processes(1) if "--local_rank=0" in process.cmdline()]
    assert len(ranks) == 1
    ranks[0].kill()
    shown, _ = launcher.communicate(timeout=120)
    assert launcher.returncode not in (0, 85), shown[-4000:]
    assert re.search(r"rank 1 \(process \d+ on .*\) gives no sign of life", shown), shown[-4000:]
    hosts.wait_until_nothing_runs()


@pytest.mark.slow  # on one host tests/faults/test_launchers.py kills one by default
@pytest.mark.parametrize("killed", ["beingvl launch", "deepspeed", "pdsh", DIRECT])
def test_ranks_of_both_hosts_end_when_a_launcher_is_killed(hosts, work, tmp_path, killed) -> None:
    """And the folder is free for the next start."""
    output = tmp_path / "left"
    words = direct(hosts, work, output, "long.json") if killed == DIRECT else None
    launcher = start_long(hosts, work, output, words)
    started = psutil.Process(launcher.pid).children(recursive=True)
    name = {"deepspeed": "deepspeed", "pdsh": "pdsh"}.get(killed)
    found = [process for process in started if process.name() == name] or [launcher]
    found[0].kill()
    shown, _ = launcher.communicate(timeout=120)
    hosts.wait_until_nothing_runs()
    assert launcher.returncode != 0 and not has_step(output, 10000), shown[-4000:]
    assert run_on_one_host(2, work / "stage1.json", work / "base", work / "shards", output) == 0, (
        log_of(output)
    )
