"""Ask every host of a hostfile whether a run can start there, before it starts.

Asks each host over ssh, all at once: is it there; do its versions, code, clock, model and data
equal the first host's; has it the devices that its slots promise; is there disk space, also where
the stage offloads to; is rank 0's port free. Then checks the stage's JSON, and measures an
all-reduce through the real launcher. Prints a table; exit code 1 when a row is red.
"""

from __future__ import annotations

import argparse
import json
import os
import re
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
from beingvl.errors import InputError
from beingvl.launch.environment import remote_environment, users_files
from beingvl.launch.host_probe import MARK, PACKAGES, count_devices, probe
from beingvl.launch.hostfile import THIS_MACHINE, Host, is_this_machine_alone, read_hostfile
from beingvl.launch.measure_all_reduce import MARK as READING
from beingvl.stage.stage_config import load_stage_config

ANSWER_SECONDS = 60
MAX_CLOCK_DIFFERENCE = 5.0  # seconds; more makes logs and build caches misleading
MIN_FREE_BYTES = 1 << 30
NO_CONNECTION = (
    "ranks cannot reach each other: set GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME "
    "to the interface between the hosts"
)
MAX_RANKS_A_CORE = 4  # CPU ranks of this machine alone share its cores


@dataclass(frozen=True)
class Finding:
    """One row of the table. `remedy` is empty when nothing is wrong."""

    host: str
    check: str
    seen: str
    remedy: str = ""


@dataclass(frozen=True)
class Wanted:
    """What a run needs: rank 0's port, finished artefacts (folder -> kind), a place to write,
    the stage's JSON, its overrides.
    """

    port: int
    folders: Mapping[str, str] = field(default_factory=dict)
    output: str | None = None
    stage: str | None = None
    overrides: tuple[str, ...] = ()

    @property
    def question(self) -> dict[str, Any]:
        """The arguments of `host_probe.probe`."""
        named = {
            "port": self.port,
            "folders": dict(self.folders),
            "output": self.output,
            "stage": self.stage,
        }
        return {**named, "nvme": self.nvme_paths}

    @property
    def nvme_paths(self) -> list[str]:
        """Where the stage offloads to, on every host; none when its JSON is refused, which is a
        row of its own.
        """
        try:
            offloads = (
                load_stage_config(self.stage, self.overrides).nvme_offloads if self.stage else {}
            )
        except InputError:
            return []
        return sorted({offload["nvme_path"] for offload in offloads.values()})

    @property
    def free_bytes(self) -> int:
        """`final/` takes at least as much as the start model, where that is visible here."""
        models = [
            Path(folder)
            for folder, kind in self.folders.items()
            if kind == "model" and is_complete(folder)
        ]
        sizes = [
            int(entry["bytes"])
            for folder in models
            for entry in read_manifest(folder).files.values()
        ]
        return max(MIN_FREE_BYTES, sum(sizes))


def run(args: argparse.Namespace) -> int:
    hosts = read_hostfile(args.hostfile)
    if is_this_machine_alone(hosts):
        hosts = [Host(hosts[0].name, ranks_here(hosts[0], None, count_devices()))]
    if not 0 < args.master_port < 1 << 16:
        raise InputError(f"--master_port is {args.master_port}, expected 1 to 65535")
    folders = {
        **({args.model: "model"} if args.model else {}),
        **({args.data: "shards"} if args.data else {}),
    }
    _, findings = check_hosts(hosts, Wanted(args.master_port, folders, args.output, args.stage))
    if args.seconds and not any(finding.remedy for finding in findings):
        findings.append(_measure_all_reduce(args.hostfile, args.master_port, args.seconds))
    print(format_findings(findings))
    return 1 if any(finding.remedy for finding in findings) else 0


def ranks_here(host: Host, num_ranks: int | None, found: Mapping[str, Any]) -> int:
    """Ranks on this machine alone, of what `count_devices` found: all GPUs unless the hostfile
    names this machine by its name or `num_ranks` is given; without a GPU the slots, as CPU
    ranks.
    """
    if num_ranks is not None and num_ranks < 1:
        raise InputError(f"--num_ranks is {num_ranks}, expected 1 or more")
    if found["device"] == "GPU":
        if num_ranks and num_ranks > found["num_devices"]:
            raise InputError(
                f"{num_ranks} ranks asked for, this machine has {found['num_devices']} GPUs; "
                "ask for fewer"
            )
        if not num_ranks and host.name not in THIS_MACHINE and host.slots > found["num_devices"]:
            raise InputError(
                f"{host.name} has slots={host.slots} but {found['num_devices']} GPUs; lower "
                "its slots"
            )
        return num_ranks or (found["num_devices"] if host.name in THIS_MACHINE else host.slots)
    ranks = num_ranks or host.slots
    if ranks > MAX_RANKS_A_CORE * found["num_devices"]:
        raise InputError(
            f"{ranks} CPU ranks asked for, this machine has {found['num_devices']} cores; "
            "lower --num_ranks or slots"
        )
    return ranks


def format_findings(findings: Sequence[Finding]) -> str:
    """The table: red rows carry their remedy."""
    header = Finding("host", "check", "seen", "")
    widths = [
        max(len(getattr(row, name)) for row in [header, *findings]) for name in ("host", "check")
    ]
    lines = [f"{'':<4}  {header.host:<{widths[0]}}  {header.check:<{widths[1]}}  seen"]
    for row in findings:
        lines.append(
            f"{'RED' if row.remedy else 'ok':<4}  {row.host:<{widths[0]}}  "
            f"{row.check:<{widths[1]}}  {row.seen}"
        )
        if row.remedy:
            lines.append(f"      -> {row.remedy}")
    return "\n".join(lines)


def ssh_options() -> list[str]:
    """For our own ssh and for pdsh's: the user's first, then no questions and no waiting for a
    host that went silent.
    """
    ours = (
        "-o BatchMode=yes -o ConnectTimeout=10 -o ServerAliveInterval=10 -o ServerAliveCountMax=3"
    )
    given = os.environ.get("PDSH_SSH_ARGS_APPEND", "")
    return shlex.split(given if ours in given else f"{given} {ours}")


def run_on(
    host: str, command: str, seconds: float = ANSWER_SECONDS
) -> subprocess.CompletedProcess[str]:
    """Run a shell command on a host over ssh; a host that does not answer in time has exit code
    255.
    """
    words = ["ssh", *ssh_options(), host, command]
    try:
        return subprocess.run(
            words, capture_output=True, text=True, timeout=seconds, stdin=subprocess.DEVNULL
        )
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(words, 255, "", f"no answer in {seconds:.0f} s")


def check_hosts(
    hosts: Sequence[Host], wanted: Wanted
) -> tuple[dict[str, dict[str, Any]], list[Finding]]:
    """Probe all hosts at once; returns the answers of those that gave one, and the rows of the
    table.
    """
    num_ranks = sum(host.slots for host in hosts)
    stage = [_check_stage(wanted, num_ranks)] if wanted.stage else []
    if is_this_machine_alone(hosts):
        name, found = hosts[0].name, probe(**wanted.question)
        return {name: found}, _judge(
            hosts[0], found, name, found, wanted, is_first=True, is_alone=True
        ) + stage
    with ThreadPoolExecutor(max_workers=min(64, len(hosts))) as pool:
        asked = list(pool.map(lambda host: _ask(host, wanted), hosts))
    answers = {
        host.name: answer for host, (answer, _, _) in zip(hosts, asked, strict=True) if answer
    }
    findings: list[Finding] = []
    reference = next(iter(answers), "")
    for number, (host, (answer, skew, complaint)) in enumerate(zip(hosts, asked, strict=True)):
        if answer is None:
            findings.append(complaint)
        else:
            findings += _judge(
                host, answer, reference, answers[reference], wanted, is_first=number == 0, skew=skew
            )
    return answers, findings + stage


def _ask(host: Host, wanted: Wanted) -> tuple[dict[str, Any] | None, float, Finding]:
    """The host's answer (None: none), how far its clock is from ours in seconds, and the row
    that says why there is none.
    """
    passed = remote_environment(os.environ, users_files())
    passed["PYTHONPATH"] = f"{Path.cwd()}:{passed.get('PYTHONPATH', '')}"
    words = ["env", *[f"{name}={value}" for name, value in passed.items()]]
    words += [sys.executable, "-m", "beingvl.launch.host_probe", json.dumps(wanted.question)]
    asked = time.time()
    done = run_on(host.name, f"cd {shlex.quote(str(Path.cwd()))} && {shlex.join(words)}")
    answered = time.time()
    lines = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
    last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}, no word"])[-1]
    if done.returncode == 255:
        complaint = Finding(
            host.name, "reachable", f"no: {last}", f"`ssh {host.name}` must work without a password"
        )
    else:
        remedy = (
            f"this folder and {sys.executable} must be the same on every host (a shared "
            "file system, or equal copies)"
        )
        complaint = Finding(host.name, "starts python", f"no: {last}", remedy)
    if not lines or done.returncode:
        return None, 0.0, complaint
    answer = json.loads(lines[-1].removeprefix(MARK))
    return answer, max(asked - answer["seconds"], answer["seconds"] - answered, 0.0), complaint


def _judge(
    host: Host,
    answer: Mapping[str, Any],
    reference_name: str,
    reference: Mapping[str, Any],
    wanted: Wanted,
    is_first: bool,
    skew: float = 0.0,
    is_alone: bool = False,
) -> list[Finding]:
    """The rows of one host, compared with the first host that answered."""
    rows = [Finding(host.name, "reachable", "yes")]
    for name in ("python", *PACKAGES, "beingvl", "code"):
        remedy = f"{reference_name} has {reference[name]}: install the same on every host"
        if answer[name] == "missing":
            rows.append(
                Finding(host.name, name, "missing", "install the same packages on every host")
            )
        else:
            differs = reference[name] not in (answer[name], "missing")
            rows.append(Finding(host.name, name, answer[name], remedy if differs else ""))
    seen = (
        f"{host.slots} slots, {answer['num_devices']} "
        f"{answer['device']}{'s' if answer['num_devices'] != 1 else ''}"
    )
    too_many = host.slots > answer["num_devices"] and not (is_alone and answer["device"] != "GPU")
    rows.append(
        Finding(
            host.name,
            "slots",
            seen,
            f"write slots={answer['num_devices']} or fewer" if too_many else "",
        )
    )
    rows.append(
        Finding(
            host.name,
            "clock",
            f"{skew:.1f} s off",
            "set its clock (NTP)" if skew > MAX_CLOCK_DIFFERENCE else "",
        )
    )
    if is_first:
        busy = (
            "another process listens there: stop it, or choose another --master_port than "
            f"{wanted.port}"
        )
        rows.append(
            Finding(
                host.name,
                f"port {wanted.port}",
                "free" if answer["port_free"] else "busy",
                "" if answer["port_free"] else busy,
            )
        )
    for folder, found in answer["folders"].items():
        rows.append(
            _judge_folder(host.name, folder, found, reference_name, reference["folders"][folder])
        )
    if wanted.stage:
        remedy = (
            f"{reference_name} has {reference['stage']}: copy it again"
            if answer["stage"] != reference["stage"]
            else ""
        )
        rows.append(Finding(host.name, Path(wanted.stage).name, answer["stage"], remedy))
    for path, free in answer["nvme"].items():
        remedy = (
            f"offload goes there: mount a local disk at {path} that can be written, or "
            "change nvme_path"
        )
        seen = "no folder to write to" if free is None else f"{free / 1e9:.1f} GB free"
        rows.append(Finding(host.name, f"nvme {path}", seen, remedy if free is None else ""))
    if answer["free_bytes"] is not None:
        little = answer["free_bytes"] < wanted.free_bytes
        remedy = f"make room for {wanted.output}" if little else ""
        seen = (
            f"{answer['free_bytes'] / 1e9:.1f} GB, {wanted.free_bytes / 1e9:.1f} GB needed at least"
        )
        rows.append(Finding(host.name, "free disk", seen, remedy))
    return rows


def _judge_folder(
    host: str, folder: str, found: str, reference_name: str, expected: str
) -> Finding:
    if found.startswith("error: "):
        return Finding(host, folder, "not there", found.removeprefix("error: "))
    differs = found != expected and not expected.startswith("error: ")
    return Finding(
        host,
        folder,
        f"{found[:19]}…",
        f"{reference_name} has {expected[:19]}…: copy it again" if differs else "",
    )


def _check_stage(wanted: Wanted, num_ranks: int) -> Finding:
    assert wanted.stage
    path = Path(wanted.stage)
    try:
        accumulation = load_stage_config(path, wanted.overrides).accumulation_steps(num_ranks)
    except InputError as error:
        return Finding("-", path.name, "refused", str(error))
    return Finding(
        "-", path.name, f"accepted, {accumulation} accumulation steps on {num_ranks} ranks"
    )


def _measure_all_reduce(hostfile: Path, port: int, seconds: float) -> Finding:
    words = [
        sys.executable,
        "-m",
        "beingvl",
        "launch",
        "--hostfile",
        str(hostfile),
        "--master_port",
        str(port),
        "--no_preflight",
    ]
    words += ["--module", "beingvl.launch.measure_all_reduce", "--", "--seconds", str(seconds)]
    limit = 300 + seconds
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return Finding("-", "all-reduce", f"no end within {limit:.0f} s", NO_CONNECTION)
    match = re.search(f"{READING}({{.*}})", done.stdout)
    if done.returncode or not match:
        lines = [
            line
            for line in (done.stdout + done.stderr).splitlines()
            if re.search(r"error|exception|refused", line, re.I)
        ]
        last = (lines or done.stderr.strip().splitlines() or ["no word"])[-1].strip()
        is_connection = re.search(
            r"connect|timed? ?out|socket|route|unreachable|NCCL|gloo",
            done.stdout + done.stderr,
            re.I,
        )
        remedy = (
            NO_CONNECTION
            if is_connection
            else "see that message; `beingvl launch` with these hosts shows all of it"
        )
        return Finding("-", "all-reduce", f"failed: {last}", remedy)
    found = json.loads(match[1])
    seen = (
        f"{found['bytes_per_second'] / 1e9:.2f} GB/s, "
        f"{found['latency_seconds'] * 1e6:.0f} us, {found['ranks']} ranks"
    )
    return Finding("-", "all-reduce", seen)


if __name__ == "__main__":
    from beingvl.commands.main import main

    sys.exit(main(["preflight", *sys.argv[1:]]))
