"""Ask every host of a hostfile whether a run can start there, before it starts.

Asks each host over ssh, all at once: is it there; do its versions, code, clock, model and data equal the first host's; has it the
devices that its slots promise; is there disk space; is rank 0's port free. Then checks the stage's JSON, and measures an
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

from beingvl.errors import InputError
from beingvl.launch.host_probe import MARK, PACKAGES, probe
from beingvl.launch.hostfile import Host, is_this_machine_alone, read_hostfile

ANSWER_SECONDS = 60
MAX_CLOCK_DIFFERENCE = 5.0  # seconds; more makes logs and build caches misleading
MIN_FREE_BYTES = 1 << 30


@dataclass(frozen=True)
class Finding:
    """One row of the table. `remedy` is empty when nothing is wrong."""

    host: str
    check: str
    seen: str
    remedy: str = ""


@dataclass(frozen=True)
class Wanted:
    """What a run needs: rank 0's port, finished artefacts (folder -> kind), a place to write."""

    port: int
    folders: Mapping[str, str] = field(default_factory=dict)
    output: str | None = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--hostfile", type=Path, required=True, help="NAME slots=NUMBER, one line a host")
    parser.add_argument("--stage", type=Path, help="the stage's JSON to check (ds_configs/)")
    parser.add_argument("--model", help="start model; every host must see the same")
    parser.add_argument("--data", help="shard folder; every host must see the same")
    parser.add_argument("--output", help="stage folder that will be written; its disk must have room")
    parser.add_argument("--master_port", type=int, default=29500, help="rank 0's port")
    parser.add_argument("--seconds", type=float, default=5.0, help="of the all-reduce reading; 0 leaves it out")


def run(args: argparse.Namespace) -> int:
    hosts = read_hostfile(args.hostfile)
    wanted = Wanted(
        args.master_port,
        {**({args.model: "model"} if args.model else {}), **({args.data: "shards"} if args.data else {})},
        args.output,
    )
    _, findings = check_hosts(hosts, wanted)
    if args.stage:
        findings.append(_check_stage(args.stage, sum(host.slots for host in hosts)))
    if args.seconds and not any(finding.remedy for finding in findings):
        findings.append(_measure_all_reduce(args.hostfile, args.master_port, args.seconds))
    print(format_findings(findings))
    return 1 if any(finding.remedy for finding in findings) else 0


def format_findings(findings: Sequence[Finding]) -> str:
    """The table: red rows carry their remedy."""
    header = Finding("host", "check", "seen", "")
    widths = [max(len(getattr(row, name)) for row in [header, *findings]) for name in ("host", "check")]
    lines = [f"{'':<4}  {header.host:<{widths[0]}}  {header.check:<{widths[1]}}  seen"]
    for row in findings:
        lines.append(f"{'RED' if row.remedy else 'ok':<4}  {row.host:<{widths[0]}}  {row.check:<{widths[1]}}  {row.seen}")
        if row.remedy:
            lines.append(f"      -> {row.remedy}")
    return "\n".join(lines)


def ssh_options() -> list[str]:
    """For our own ssh and for pdsh's: the user's first, then no questions and no waiting for a host that went silent."""
    ours = "-o BatchMode=yes -o ConnectTimeout=10 -o ServerAliveInterval=10 -o ServerAliveCountMax=3"
    given = os.environ.get("PDSH_SSH_ARGS_APPEND", "")
    return shlex.split(given if ours in given else f"{given} {ours}")


def run_on(host: str, command: str, seconds: float = ANSWER_SECONDS) -> subprocess.CompletedProcess[str]:
    """Run a shell command on a host over ssh; a host that does not answer in time has exit code 255."""
    words = ["ssh", *ssh_options(), host, command]
    try:
        return subprocess.run(words, capture_output=True, text=True, timeout=seconds, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(words, 255, "", f"no answer in {seconds:.0f} s")


def check_hosts(hosts: Sequence[Host], wanted: Wanted) -> tuple[dict[str, dict[str, Any]], list[Finding]]:
    """Probe all hosts at once; returns the answers of those that gave one, and the rows of the table."""
    if is_this_machine_alone(hosts):
        answers = {hosts[0].name: probe(wanted.port, wanted.folders, wanted.output)}
        return answers, _judge(hosts[0], answers[hosts[0].name], answers[hosts[0].name], wanted, is_first=True, skew=0.0)
    with ThreadPoolExecutor(max_workers=min(64, len(hosts))) as pool:
        asked = list(pool.map(lambda host: _ask(host, wanted), hosts))
    answers = {host.name: answer for host, (answer, _, _) in zip(hosts, asked, strict=True) if answer}
    findings: list[Finding] = []
    reference = next(iter(answers.values()), None)
    for number, (host, (answer, skew, complaint)) in enumerate(zip(hosts, asked, strict=True)):
        if answer is None or reference is None:
            findings.append(complaint)
        else:
            findings += _judge(host, answer, reference, wanted, is_first=number == 0, skew=skew)
    return answers, findings


def _ask(host: Host, wanted: Wanted) -> tuple[dict[str, Any] | None, float, Finding]:
    """The host's answer (None: none), how far its clock is from ours in seconds, and the row that says why there is none."""
    from beingvl.launch.environment import remote_environment

    question = json.dumps({"port": wanted.port, "folders": dict(wanted.folders), "output": wanted.output})
    passed = remote_environment(os.environ, (Path.cwd(), Path.home()))
    passed["PYTHONPATH"] = f"{Path.cwd()}:{passed.get('PYTHONPATH', '')}"
    words = ["env", *[f"{name}={value}" for name, value in passed.items()]]
    words += [sys.executable, "-m", "beingvl.launch.host_probe", question]
    asked = time.time()
    done = run_on(host.name, f"cd {shlex.quote(str(Path.cwd()))} && {shlex.join(words)}")
    answered = time.time()
    lines = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
    last = (done.stderr.strip().splitlines() or ["nothing"])[-1]
    if done.returncode == 255:
        complaint = Finding(host.name, "reachable", f"no: {last}", f"`ssh {host.name}` must work without a password")
    else:
        remedy = f"this folder and {sys.executable} must be the same on every host (a shared file system, or equal copies)"
        complaint = Finding(host.name, "starts python", f"no: {last}", remedy)
    if not lines or done.returncode:
        return None, 0.0, complaint
    answer = json.loads(lines[-1].removeprefix(MARK))
    return answer, max(asked - answer["seconds"], answer["seconds"] - answered, 0.0), complaint


def _judge(
    host: Host, answer: Mapping[str, Any], reference: Mapping[str, Any], wanted: Wanted, is_first: bool, skew: float
) -> list[Finding]:
    """The rows of one host."""
    rows = [Finding(host.name, "reachable", "yes")]
    for name in ("python", *PACKAGES, "beingvl", "code"):
        remedy = f"the first host has {reference[name]}: install the same on every host"
        if answer[name] == "missing":
            rows.append(Finding(host.name, name, "missing", "install the same packages on every host"))
        else:
            rows.append(Finding(host.name, name, answer[name], remedy if answer[name] != reference[name] else ""))
    seen = f"{host.slots} slots, {answer['num_devices']} {answer['device']}{'s' if answer['num_devices'] != 1 else ''}"
    too_many = host.slots > answer["num_devices"]
    rows.append(Finding(host.name, "slots", seen, f"write slots={answer['num_devices']} or fewer" if too_many else ""))
    rows.append(Finding(host.name, "clock", f"{skew:.1f} s off", "set its clock (NTP)" if skew > MAX_CLOCK_DIFFERENCE else ""))
    if is_first:
        busy = f"another process listens there: stop it, or choose another --master_port than {wanted.port}"
        rows.append(
            Finding(
                host.name, f"port {wanted.port}", "free" if answer["port_free"] else "busy", "" if answer["port_free"] else busy
            )
        )
    for folder, found in answer["folders"].items():
        rows.append(_judge_folder(host.name, folder, found, reference["folders"][folder]))
    if answer["free_bytes"] is not None:
        little = answer["free_bytes"] < MIN_FREE_BYTES
        remedy = f"make room for {wanted.output}" if little else ""
        rows.append(Finding(host.name, "free disk", f"{answer['free_bytes'] / 1e9:.1f} GB", remedy))
    return rows


def _judge_folder(host: str, folder: str, found: str, expected: str) -> Finding:
    if found.startswith("error: "):
        return Finding(host, folder, "not there", found.removeprefix("error: "))
    remedy = f"the first host has {expected[:19]}…: copy it again" if found != expected else ""
    return Finding(host, folder, f"{found[:19]}…", remedy)


def _check_stage(path: Path, num_ranks: int) -> Finding:
    from beingvl.train.stage_config import load_stage_config

    try:
        accumulation = load_stage_config(path).accumulation_steps(num_ranks)
    except InputError as error:
        return Finding("-", path.name, "refused", str(error))
    return Finding("-", path.name, f"accepted, {accumulation} accumulation steps on {num_ranks} ranks")


def _measure_all_reduce(hostfile: Path, port: int, seconds: float) -> Finding:
    from beingvl.launch.measure_all_reduce import MARK as READING

    words = [sys.executable, "-m", "beingvl", "launch", "--hostfile", str(hostfile), "--master_port", str(port), "--no_preflight"]
    words += ["--module", "beingvl.launch.measure_all_reduce", "--", "--seconds", str(seconds)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300 + seconds)
    match = re.search(f"{READING}({{.*}})", done.stdout)
    if done.returncode or not match:
        last = (done.stderr.strip().splitlines() or ["nothing"])[-1]
        remedy = "ranks cannot reach each other: set GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME to the interface between the hosts"
        return Finding("-", "all-reduce", f"failed: {last}", remedy)
    found = json.loads(match[1])
    seen = f"{found['bytes_per_second'] / 1e9:.2f} GB/s, {found['latency_seconds'] * 1e6:.0f} us, {found['ranks']} ranks"
    return Finding("-", "all-reduce", seen)


if __name__ == "__main__":
    from beingvl.cli import main

    sys.exit(main(["preflight", *sys.argv[1:]]))
