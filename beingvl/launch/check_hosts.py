"""Checks all hosts of a run at once over ssh; every problem is a red line of a table.

hosts_of      the hosts of a hostfile, with the number of ranks for each
check_hosts   every host runs `host_probe`; `judge` compares its answer with the first host's
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from beingvl.artefact.manifest import is_complete, read_manifest
from beingvl.data.made_with import FACTS
from beingvl.errors import InputError, check_at_least
from beingvl.launch.environment import is_secret, remote_environment, users_files
from beingvl.launch.host_probe import MARK, PACKAGES, count_devices, probe
from beingvl.launch.hostfile import THIS_MACHINE, Host, is_this_machine_alone, read_hostfile
from beingvl.model.start_model import check_context, context_of
from beingvl.stage.mixture import fit_mixture
from beingvl.stage.stage_config import StageConfig, load_stage_config

ANSWER_SECONDS = 60
MAX_CLOCK_DIFFERENCE = 5.0  # seconds; with more, logs and build caches mislead
MIN_FREE_BYTES = 1 << 30
MAX_RANKS_PER_CORE = 4  # on this machine alone, CPU ranks share its cores

Row = tuple[str, str, str]  # of one host: what is checked, what was found, remedy


@dataclass(frozen=True)
class Finding:
    """One line of the table. `remedy` is empty if nothing is wrong."""

    host: str
    check: str
    seen: str
    remedy: str = ""


@dataclass(frozen=True)
class Wanted:
    """What a run needs: rank 0's port, finished artefacts (folder -> kind; the first shards are the
    training data), an output folder, the stage's JSON and its overrides.
    """

    port: int
    folders: Mapping[str, str] = field(default_factory=dict)
    output: Path | str | None = None
    stage: Path | str | None = None
    overrides: Sequence[str] = ()

    def __post_init__(self) -> None:
        if not 0 < self.port < 1 << 16:
            raise InputError(f"--master_port is {self.port}, expected 1 to 65535")

    @property
    def free_bytes(self) -> int:
        """`final/` takes at least as much as the start model, if that is visible here."""
        models = [name for name, kind in self.folders.items() if kind == "model"]
        files = [read_manifest(name).files for name in models if is_complete(name)]
        sizes = [int(entry["bytes"]) for entries in files for entry in entries.values()]
        return max(MIN_FREE_BYTES, sum(sizes))


def hosts_of(hostfile: Path | str, num_ranks: int | None = None) -> list[Host]:
    """The hosts of a hostfile; on this machine alone, `num_ranks` or its GPUs override slots."""
    hosts = read_hostfile(hostfile)
    if is_this_machine_alone(hosts):
        return [Host(hosts[0].name, ranks_here(hosts[0], num_ranks, count_devices()))]
    if num_ranks is not None:
        raise InputError(
            f"--num_ranks is for this machine alone; {hostfile} names {len(hosts)} hosts: "
            "change their slots"
        )
    return hosts


def ranks_here(host: Host, num_ranks: int | None, found: Mapping[str, Any]) -> int:
    """Number of ranks on this machine alone, given what `count_devices` found: all GPUs, unless the
    hostfile uses this machine's host name (then its slots) or `num_ranks` is given; without a GPU,
    the slots as CPU ranks.
    """
    number = found["num_devices"]
    check_at_least(1, num_ranks=num_ranks)
    if found["device"] != "GPU":
        ranks = num_ranks or host.slots
        if ranks > MAX_RANKS_PER_CORE * number:
            raise InputError(
                f"{ranks} CPU ranks asked for, this machine has {number} cores; lower "
                "--num_ranks or slots"
            )
        return ranks
    if num_ranks and num_ranks > number:
        raise InputError(
            f"{num_ranks} ranks asked for, this machine has {number} GPUs; ask for fewer"
        )
    if num_ranks or host.name in THIS_MACHINE:
        return num_ranks or number
    if host.slots > number:
        raise InputError(f"{host.name} has slots={host.slots} but {number} GPUs; lower its slots")
    return host.slots


def format_findings(findings: Sequence[Finding]) -> str:
    """The table; red lines are followed by their remedy."""
    header = Finding("host", "check", "seen")
    widths = [
        max(len(getattr(row, name)) for row in [header, *findings]) for name in ("host", "check")
    ]
    lines = []
    for row in [header, *findings]:
        mark = "" if row is header else "RED" if row.remedy else "ok"
        lines.append(f"{mark:<4}  {row.host:<{widths[0]}}  {row.check:<{widths[1]}}  {row.seen}")
        if row.remedy:
            lines.append(f"      -> {row.remedy}")
    return "\n".join(lines)


def ssh_options() -> list[str]:
    """Options for our own ssh and for pdsh's: the user's first, then: ask nothing, and do not wait
    for a host that went silent.
    """
    ours = (
        "-o BatchMode=yes -o ConnectTimeout=10 -o ServerAliveInterval=10 -o ServerAliveCountMax=3"
    )
    return shlex.split(f"{os.environ.get('PDSH_SSH_ARGS_APPEND', '')} {ours}")


def run_on(
    host: str, command: str, seconds: float = ANSWER_SECONDS
) -> subprocess.CompletedProcess[str]:
    """Run a command on a host over ssh; exit code 255 if it does not answer in time."""
    words = ["ssh", "-n", *ssh_options(), host, command]
    try:
        return subprocess.run(words, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(words, 255, "", f"no answer in {seconds:.0f} s")


def check_hosts(
    hosts: Sequence[Host], wanted: Wanted
) -> tuple[dict[str, dict[str, Any]], list[Finding]]:
    """Probe all hosts at once; returns the answers received, and the findings of the table."""
    is_alone = is_this_machine_alone(hosts)
    nvme, stage_rows = _check_stage(wanted, sum(host.slots for host in hosts))
    question: dict[str, Any] = {
        "folders": dict(wanted.folders),
        "output": wanted.output and str(wanted.output),
        "stage": wanted.stage and str(wanted.stage),
        "nvme": nvme,
    }
    questions = [{**question, "port": wanted.port if host is hosts[0] else None} for host in hosts]
    asked: list[dict[str, Any] | Finding]
    if is_alone:
        asked = [{**probe(**questions[0]), "host": hosts[0].name, "skew": 0.0}]
    else:
        with ThreadPoolExecutor(max_workers=min(64, len(hosts))) as pool:
            asked = list(pool.map(_ask, hosts, questions))
    answers = {found["host"]: found for found in asked if isinstance(found, dict)}
    rows: list[Finding] = []
    for host, found in zip(hosts, asked, strict=True):
        if isinstance(found, Finding):
            rows.append(found)
        else:
            rows += judge(host, found, next(iter(answers.values())), wanted, is_alone)
    return answers, rows + stage_rows


def _ask(host: Host, question: Mapping[str, Any]) -> dict[str, Any] | Finding:
    """The host's answer, with its name and its clock's difference from ours in seconds, or a
    finding that says why there is none.
    """
    passed = remote_environment(os.environ, users_files())
    passed["PYTHONPATH"] = f"{Path.cwd()}:{passed.get('PYTHONPATH', '')}"
    # command lines are visible to everybody on both machines
    words = [
        "env",
        *[f"{name}={value}" for name, value in passed.items() if not is_secret(name, value)],
    ]
    words += [sys.executable, "-m", "beingvl.launch.host_probe", json.dumps(question)]
    asked = time.time()
    done = run_on(host.name, f"cd {shlex.quote(str(Path.cwd()))} && {shlex.join(words)}")
    answered = time.time()
    lines = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
    if lines and not done.returncode:
        answer = json.loads(lines[-1].removeprefix(MARK))
        skew = max(asked - answer["seconds"], answer["seconds"] - answered, 0.0)
        return {**answer, "host": host.name, "skew": skew}
    last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}, no word"])[-1]
    if done.returncode == 255:
        remedy = f"`ssh {host.name}` must work without a password"
        return Finding(host.name, "reachable", f"no: {last}", remedy)
    remedy = (
        f"this folder and {sys.executable} must be the same on every host (a shared file system, "
        "or equal copies)"
    )
    return Finding(host.name, "starts python", f"no: {last}", remedy)


def judge(
    host: Host,
    answer: Mapping[str, Any],
    first: Mapping[str, Any],
    wanted: Wanted,
    is_alone: bool = False,
) -> list[Finding]:
    """One host's findings, compared with the first host that answered. On this machine alone, CPU
    ranks may share a core.
    """
    number, device, skew = answer["num_devices"], answer["device"], answer["skew"]
    too_many = host.slots > number and not (is_alone and device != "GPU")
    rows = [
        ("reachable", "yes", ""),
        *_same_versions(answer, first),
        (
            "slots",
            f"{host.slots} slots, {number} {device}{'s' if number != 1 else ''}",
            f"write slots={number} or fewer" if too_many else "",
        ),
        (
            "clock",
            f"{skew:.1f} s off",
            "set its clock (NTP)" if skew > MAX_CLOCK_DIFFERENCE else "",
        ),
        *_same_files(answer, first, wanted),
    ]
    if (user := answer["port_user"]) is not None:
        remedy = (
            "an older run may still be there: wait for its end, or end it; only a second run on "
            "the same host needs another --master_port"
        )
        seen, remedy = (f"busy: {user}", remedy) if user else ("free", "")
        rows.append((f"port {wanted.port}", seen, remedy))
    for path, free in answer["nvme"].items():
        remedy = (
            f"offload goes there: mount a local disk at {path} that can be written, or "
            "change nvme_path"
        )
        seen = "no folder to write to" if free is None else f"{free / 1e9:.1f} GB free"
        rows.append((f"nvme {path}", seen, remedy if free is None else ""))
    if (free := answer["free_bytes"]) is not None:
        remedy = f"make room for {wanted.output}" if free < wanted.free_bytes else ""
        seen = f"{free / 1e9:.1f} GB, {wanted.free_bytes / 1e9:.1f} GB needed at least"
        rows.append(("free disk", seen, remedy))
    return [Finding(host.name, *row) for row in rows]


def _same_versions(answer: Mapping[str, Any], first: Mapping[str, Any]) -> list[Row]:
    rows = []
    for name in ("python", *PACKAGES, "beingvl", "code"):
        remedy = ""
        if answer[name] == "missing":
            remedy = "install the same packages on every host"
        elif first[name] not in (answer[name], "missing"):
            remedy = f"{first['host']} has {first[name]}: install the same on every host"
        rows.append((name, answer[name], remedy))
    return rows


def _same_files(answer: Mapping[str, Any], first: Mapping[str, Any], wanted: Wanted) -> list[Row]:
    rows = []
    for folder, found in answer["folders"].items():
        expected = first["folders"][folder]
        if found.startswith("error: "):
            rows.append((folder, "not there", found.removeprefix("error: ")))
            continue
        is_same = found == expected or expected.startswith("error: ")
        remedy = "" if is_same else f"{first['host']} has {expected[:19]}…: copy it again"
        rows.append((folder, f"{found[:19]}…", remedy))
    if wanted.stage:
        is_same = answer["stage"] == first["stage"]
        remedy = "" if is_same else f"{first['host']} has {first['stage']}: copy it again"
        rows.append((Path(wanted.stage).name, answer["stage"], remedy))
    return rows


def _check_stage(wanted: Wanted, num_ranks: int) -> tuple[list[str], list[Finding]]:
    """The stage's NVMe folders, which every host needs, and the findings about its JSON."""
    if not wanted.stage:
        return [], []
    name = Path(wanted.stage).name
    try:
        config = load_stage_config(wanted.stage, wanted.overrides)
        accumulation = config.accumulation_steps(num_ranks)
    except InputError as error:
        return [], [Finding("-", name, "refused", str(error))]
    seen = f"accepted, {accumulation} accumulation steps on {num_ranks} ranks"
    paths = {offload["nvme_path"] for offload in config.nvme_offloads.values()}
    return sorted(paths), [Finding("-", name, seen), *_check_data(wanted, config)]


def _check_data(wanted: Wanted, config: StageConfig) -> list[Finding]:
    """Whether the stage can train on its data, as far as the data is visible here."""
    here = {name: kind for name, kind in wanted.folders.items() if is_complete(name)}
    try:
        seen = {name: read_manifest(name, kind) for name, kind in here.items()}
        shards = [manifest for manifest in seen.values() if manifest.kind == "shards"]
        made_with = [
            f"{fact.words} {fact.join({name: fact.of(found) for name, found in seen.items()})}"
            for fact in FACTS
        ]
        config, note = fit_mixture(config, shards[0]) if shards else (config, "")
        models = [name for name, manifest in seen.items() if manifest.kind == "model"]
        notes = [
            check_context(context_of(Path(name)), config, shards[0]) for name in models if shards
        ]
    except InputError as error:
        return [Finding("-", "data", "refused", str(error))]
    drawn = ", ".join(f"{name} {weight}" for name, weight in config.beingvl.mixture.items())
    return (
        [
            Finding(
                "-",
                "data",
                "; ".join(filter(None, [*made_with, note or drawn, *notes])),
            )
        ]
        if shards
        else []
    )
