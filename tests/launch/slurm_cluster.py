"""A Slurm cluster of two nodes on one machine: munged, slurmctld and two slurmd in one folder.
Needs root and apt packages.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from tests.launch.two_hosts import SBIN, require
from tests.launcher import free_port

NODES = ("bvl-n1", "bvl-n2")


@dataclass
class Cluster:
    folder: Path
    environment: dict[str, str]
    daemons: dict[str, subprocess.Popen] = field(default_factory=dict)

    def run(self, *words: object, **variables: object) -> str:
        """A command's output; raises AssertionError with its complaint when it fails."""
        environment = {
            **self.environment,
            **{name: str(value) for name, value in variables.items()},
        }
        done = subprocess.run(
            [str(word) for word in words],
            env=environment,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
        return done.stdout

    def start(self, name: str, *words: object) -> None:
        with open(self.folder / f"{name}.log", "a") as log:
            self.daemons[name] = subprocess.Popen(
                [str(word) for word in words],
                env=self.environment,
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
            )

    def start_node(self, node: str) -> None:
        self.start(node, "slurmd", "-D", "-N", node)

    def field_of(self, job: str, name: str) -> str:
        for word in self.run("scontrol", "show", "job", job).split():
            if word.startswith(f"{name}="):
                return word.partition("=")[2]
        raise AssertionError(f"job {job} has no {name}")

    def wait_for(self, job: str, *states: str, seconds: float = 240) -> str:
        deadline = time.monotonic() + seconds
        while (state := self.field_of(job, "JobState")) not in states:
            assert time.monotonic() < deadline, f"job {job} is {state}, not {states}\n{self.logs()}"
            assert state not in ("FAILED", "NODE_FAIL", "TIMEOUT", "CANCELLED", "COMPLETED"), (
                f"{job}: {state}\n{self.logs()}"
            )
            time.sleep(0.5)
        return state

    def logs(self) -> str:
        texts = [
            f"== {path}\n{path.read_text()[-1500:]}" for path in sorted(self.folder.rglob("*.log"))
        ]
        return "\n".join(texts)[-12000:]

    def processes(self, word: str) -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter(["cmdline"]):
            line = process.info["cmdline"] or []
            if any(word in part for part in line) and "beingvl" in line:
                found.append(process)
        return found

    def wait_until_nothing_runs(self, word: str, seconds: float = 40) -> None:
        deadline = time.monotonic() + seconds
        while left := self.processes(word):
            assert time.monotonic() < deadline, f"left behind: {left}"
            time.sleep(0.3)


@contextmanager
def slurm_cluster(folder: Path, environment: Mapping[str, str]) -> Iterator[Cluster]:
    """Build, yield when both nodes are idle, and take everything away again."""
    require("slurmctld", "munged")
    path = f"{environment['PATH']}:{SBIN}"
    cluster = Cluster(folder, {**environment, "PATH": path, "SLURM_CONF": f"{folder}/slurm.conf"})
    (folder / "munge.key").write_bytes(os.urandom(64))
    (folder / "munge.key").chmod(0o400)
    _write_configuration(folder)
    try:
        files = [f"--{name}-file={folder}/munged.{name}" for name in ("pid", "log", "seed")]
        key = [f"--key-file={folder}/munge.key", f"--socket={folder}/munge.socket"]
        cluster.start("munged", "munged", "--foreground", "--force", *key, *files)
        _wait(lambda: (folder / "munge.socket").exists(), cluster)
        cluster.start("slurmctld", "slurmctld", "-D")
        for node in NODES:
            cluster.start_node(node)
        _wait(lambda: _num_idle(cluster) == 2, cluster)
        yield cluster
    finally:
        _take_away(cluster)


def _write_configuration(folder: Path) -> None:
    ports = [free_port() for _ in range(3)]
    for name in ("state", *NODES):
        (folder / name).mkdir()
    host = socket.gethostname()
    (folder / "slurm.conf").write_text(
        f"""ClusterName=bvltest
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
SlurmctldPort={ports[0]}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2
JobRequeue=1
ReturnToService=2
KillWait=5
SlurmdTimeout=10
MpiDefault=none
SlurmdParameters=config_overrides
NodeName={NODES[0]} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2 State=UNKNOWN
NodeName={NODES[1]} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=60 State=UP
"""
    )


def _num_idle(cluster: Cluster) -> int:
    words = ["sinfo", "--noheader", "--Node", "--format=%T"]
    return (
        subprocess.run(words, env=cluster.environment, capture_output=True, text=True)
        .stdout.split()
        .count("idle")
    )


def _wait(condition, cluster: Cluster, seconds: float = 40) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, cluster.logs()
        time.sleep(0.2)


def _take_away(cluster: Cluster) -> None:
    subprocess.run(
        ["scancel", "--user=root"], env=cluster.environment, capture_output=True, timeout=30
    )
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and _stepds(cluster):
        time.sleep(0.2)
    for name in (*NODES, "slurmctld", "munged"):
        if name in cluster.daemons:
            cluster.daemons[name].terminate()
    for daemon in cluster.daemons.values():
        try:
            daemon.wait(timeout=10)
        except subprocess.TimeoutExpired:
            daemon.kill()
    for process in _stepds(cluster):
        os.kill(process.pid, signal.SIGKILL)


def _stepds(cluster: Cluster) -> list[psutil.Process]:
    """Step daemons of this cluster: those that were started with its configuration."""
    found = []
    for process in psutil.process_iter(["name"]):
        try:
            if process.info["name"] == "slurmstepd" and process.environ().get(
                "SLURM_CONF", ""
            ).startswith(str(cluster.folder)):
                found.append(process)
        except psutil.Error:
            continue
    return found
