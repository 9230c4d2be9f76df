"""What one host says of itself, and the table that is made of it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from beingvl.commands import main as cli
from beingvl.errors import InputError
from beingvl.launch.check_hosts import (
    MIN_FREE_BYTES,
    Wanted,
    check_hosts,
    format_findings,
    judge,
    ranks_here,
)
from beingvl.launch.host_probe import MARK, code_hash, count_devices, probe
from beingvl.launch.hostfile import Host
from beingvl.launch.start_training import find_master_address, rank_pattern
from tests.launcher import free_port
from tests.tiny import stage_fields, write_model

HOST = Host("worker-2", 2)


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("preflight")
    write_model(folder / "base")
    (folder / "stage.json").write_text(json.dumps(stage_fields()))
    (folder / "here").write_text("localhost slots=2\n")
    return folder


@pytest.fixture
def four_gpus(tmp_path, monkeypatch) -> None:
    """A program that lists GPUs as nvidia-smi does."""
    program = tmp_path / "nvidia-smi"
    program.write_text(
        '#!/bin/sh\nfor i in 0 1 2 3; do echo "GPU $i: NVIDIA H100 (UUID: GPU-$i)"; done\n'
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)


def test_the_probe_prints_what_the_function_returns(work) -> None:
    question = {
        "port": free_port(),
        "folders": {str(work / "base"): "model"},
        "output": str(work / "new/stage-1"),
    }
    question["stage"] = str(work / "stage.json")
    words = [sys.executable, "-m", "beingvl.launch.host_probe", json.dumps(question)]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    shown, here = json.loads(done.stdout.removeprefix(MARK)), probe(**question)
    for name in (
        "python",
        "torch",
        "deepspeed",
        "transformers",
        "beingvl",
        "code",
        "num_devices",
        "folders",
        "port_user",
        "stage",
    ):
        assert shown[name] == here[name], name
    assert (
        here["folders"][str(work / "base")].startswith("blake3:")
        and here["free_bytes"] > 0
        and len(code_hash()) == 12
    )


def red(**changes: object) -> dict[str, tuple[str, str]]:
    """The red rows of a host that differs from the first one in `changes`: check -> (seen,
    remedy).
    """
    first = {
        **probe(29500, {}, None),
        "host": "worker-1",
        "skew": 0.0,
        "port_user": "",
        "num_devices": 2,
        "folders": {"base": "sha256:1"},
        "free_bytes": 10**12,
        "stage": "1",
    }
    first |= changes.pop("first", {})
    wanted = Wanted(29500, {"base": "model"}, "out", "ds/stage1.json")
    rows = judge(HOST, {**first, **changes}, first, wanted)
    return {row.check: (row.seen, row.remedy) for row in rows if row.remedy}


@pytest.mark.parametrize(
    ("changes", "check", "seen", "remedy"),
    [
        ({"torch": "1.0"}, "torch", "1.0", "install the same"),
        ({"deepspeed": "missing"}, "deepspeed", "missing", "install the same packages"),
        ({"code": "abc"}, "code", "abc", "worker-1 has"),
        ({"stage": "2"}, "stage1.json", "2", "worker-1 has 1: copy it again"),
        ({"num_devices": 1}, "slots", "2 slots, 1 CPU core", "write slots=1 or fewer"),
        ({"skew": 60.0}, "clock", "60.0 s off", "NTP"),
        ({"port_user": "process 7"}, "port 29500", "busy: process 7", "older run may still be"),
        ({"folders": {"base": "sha256:2"}}, "base", "sha256:2…", "copy it again"),
        (
            {"folders": {"base": "error: base is not a folder"}},
            "base",
            "not there",
            "base is not a folder",
        ),
        (
            {"nvme": {"/nvme": None}},
            "nvme /nvme",
            "no folder to write to",
            "mount a local disk at /nvme",
        ),
        (
            {"free_bytes": MIN_FREE_BYTES - 1},
            "free disk",
            "1.1 GB, 1.1 GB needed at least",
            "make room for out",
        ),
    ],
)
def test_each_difference_is_one_red_row(changes, check, seen, remedy) -> None:
    found = red(**changes)
    assert list(found) == [check]
    assert found[check][0] == seen and remedy in found[check][1]


def test_equal_hosts_have_no_red_row() -> None:
    assert red() == {}


def test_what_the_first_host_lacks_is_not_the_others_fault() -> None:
    assert (
        red(
            first={"torch": "missing", "folders": {"base": "error: none"}},
            torch="2.13.0",
            folders={"base": "sha256:1"},
        )
        == {}
    )


def test_the_command_on_this_machine(work, capsys) -> None:
    words = [
        "preflight",
        "--hostfile",
        str(work / "here"),
        "--model",
        str(work / "base"),
        "--seconds",
        "0",
    ]
    words += ["--stage", str(work / "stage.json"), "--master_port", str(free_port())]
    assert cli.main(words) == (0 if count_devices()["num_devices"] >= 2 else 1)
    assert "accepted, 2 accumulation steps on 2 ranks" in capsys.readouterr().out
    disks = [{"device": "nvme", "nvme_path": str(path)} for path in (work, work / "none")]
    zero = {"stage": 3, "offload_optimizer": disks[0], "offload_param": disks[1]}
    (work / "nvme.json").write_text(json.dumps({**stage_fields(), "zero_optimization": zero}))
    words[words.index(str(work / "stage.json"))] = str(work / "nvme.json")
    assert cli.main(words) == 1
    shown = capsys.readouterr().out
    assert (
        f"nvme {work} " in shown
        and " GB free" in shown
        and f"mount a local disk at {work / 'none'} that" in shown
    )
    words[words.index(str(work / "nvme.json"))] = str(work / "stage.json")
    (work / "bad.json").write_text(json.dumps(stage_fields(epoch=1)))
    words[words.index(str(work / "stage.json"))] = str(work / "bad.json")
    assert cli.main(words) == 1
    shown = capsys.readouterr().out
    assert "RED   -          bad.json" in shown and "did you mean beingvl.epochs?" in shown


def test_a_host_that_ssh_cannot_reach_is_red(monkeypatch) -> None:
    monkeypatch.setenv("PDSH_SSH_ARGS_APPEND", "-p 1 -o StrictHostKeyChecking=no")
    answers, findings = check_hosts(
        [Host("127.0.0.1", 1), Host("127.0.0.2", 1)], Wanted(free_port())
    )
    assert answers == {} and [row.check for row in findings] == ["reachable", "reachable"]
    assert "without a password" in format_findings(findings)


def test_the_master_address_is_the_one_ssh_used() -> None:
    hosts = [Host("a", 1), Host("b", 1)]

    def answers(server: str | None, client: str | None) -> dict[str, dict]:
        return {
            "a": {"server_address": server, "client_address": "x"},
            "b": {"server_address": "y", "client_address": client},
        }

    assert find_master_address(hosts, answers("10.0.0.1", "10.0.0.9")) == "10.0.0.1"
    assert (
        find_master_address(hosts, answers("127.0.0.1", "10.0.0.9")) == "10.0.0.9"
    )  # started on a itself
    with pytest.raises(InputError, match="give --master_addr"):
        find_master_address(hosts, answers("127.0.0.1", None))


def test_gpus_are_counted_and_too_many_ranks_are_refused(four_gpus, monkeypatch) -> None:
    found = count_devices()
    assert found == {"device": "GPU", "num_devices": 4}
    assert ranks_here(Host("localhost", 2), None, found) == 4
    assert ranks_here(Host("localhost", 2), 3, found) == 3
    assert ranks_here(Host("node-a", 2), None, found) == 2
    with pytest.raises(InputError, match="this machine has 4 GPUs"):
        ranks_here(Host("localhost", 2), 5, found)
    with pytest.raises(InputError, match="node-a has slots=8 but 4 GPUs"):
        ranks_here(Host("node-a", 8), None, found)
    with pytest.raises(InputError, match="--num_ranks is 0"):
        ranks_here(Host("localhost", 2), 0, found)
    with pytest.raises(InputError, match="4096 CPU ranks asked for, this machine has 2 cores"):
        ranks_here(Host("localhost", 4096), None, {"device": "CPU core", "num_devices": 2})
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    assert count_devices() == {"device": "GPU", "num_devices": 2}


def test_the_rank_pattern_matches_ranks_of_this_run_only() -> None:
    pattern = rank_pattern("beingvl.train.train_stage", ["--output", "a+b", "--set", "x=1"])

    def matches(line: str) -> bool:
        return subprocess.run(["grep", "-qE", "--", pattern], input=line, text=True).returncode == 0

    assert matches("python -u -m beingvl.train.train_stage --local_rank=3 --output a+b --set x=1")
    assert not matches(
        "python -u -m beingvl.train.train_stage --local_rank=3 --output aab --set x=1"
    )
    assert not matches(
        "python -u -m beingvl.train.train_stage --local_rank=3 --output a+b --set x=1 y=2"
    )
    assert not matches("deepspeed --module beingvl.train.train_stage --output a+b --set x=1")
    assert not matches(f"pkill -USR1 -f -- {pattern}")
