"""Check on every host of a hostfile that a run can start there, before it starts.

The checks are those of `beingvl launch` (check_hosts.py). If all are green, an all-reduce is
measured through the real launcher.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path

from beingvl.artefact.progress import progress
from beingvl.errors import InputError
from beingvl.launch.check_hosts import Finding, Wanted, check_hosts, hosts_of
from beingvl.launch.environment import environment_file
from beingvl.launch.host_probe import READING
from beingvl.launch.start_training import Run, find_master_address

REMEDY = (
    "`beingvl launch` with these hosts shows all of it; where ranks cannot reach each other, set "
    "GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME to the interface between the hosts"
)
MEASURE = "beingvl.launch.measure_all_reduce"
START_SECONDS = 300  # for starting the all-reduce's ranks: imports from slow disks


def preflight(
    hostfile: Path | str,
    *,
    stage: Path | str | None = None,
    model: Path | str | None = None,
    data: Path | str | None = None,
    output: Path | str | None = None,
    overrides: Sequence[str] = (),
    master_port: int = 29500,
    seconds: float = 5.0,
) -> list[Finding]:
    """The table's findings; one with a `remedy` is red.

    `stage` is the stage's JSON, which must be valid and equal on every host. `model` and `data`
    must be the same on every host, and the disk of `output` must have enough space. If nothing is
    red, all-reduce is measured for `seconds`; 0 skips it.
    """
    hosts = hosts_of(hostfile)
    folders = {str(path): kind for path, kind in ((model, "model"), (data, "shards")) if path}
    wanted = Wanted(master_port, folders, output, stage, overrides)
    answers, findings = check_hosts(hosts, wanted)
    if not seconds or any(finding.remedy for finding in findings):
        return findings
    address = "127.0.0.1" if len(hosts) == 1 else find_master_address(hosts, answers)
    words = [str(seconds)]
    run = Run(Path(hostfile), hosts, MEASURE, words, address, master_port)
    return [*findings, measure_all_reduce(run, START_SECONDS + seconds)]


def measure_all_reduce(run: Run, limit_seconds: float) -> Finding:
    """Start the ranks as training does, and parse what rank 0 prints."""
    with environment_file(Path.cwd(), run.environment) as environment:
        try:
            command = run.command
        except InputError as error:
            return Finding("-", "all-reduce", "not started", str(error))
        launcher = subprocess.Popen(
            command,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        try:
            with progress(name="all-reduce", unit="measurement", total=1, leave=False):
                shown, complaints = launcher.communicate(timeout=limit_seconds)
        except subprocess.TimeoutExpired:
            os.killpg(launcher.pid, signal.SIGKILL)
            launcher.communicate()
            return Finding("-", "all-reduce", f"no end within {limit_seconds:.0f} s", REMEDY)
    match = re.search(f"{READING}({{.*}})", shown)
    if match and not launcher.returncode:
        found = json.loads(match[1])
        seen = (
            f"{found['bytes_per_second'] / 1e9:.2f} GB/s, "
            f"{found['latency_seconds'] * 1e6:.0f} us, {found['ranks']} ranks"
        )
        return Finding("-", "all-reduce", seen)
    named = re.findall(r"^.*(?:error|exception|refused).*$", shown + complaints, re.I | re.M)
    last = (named or complaints.strip().splitlines() or ["no word"])[-1].strip()
    return Finding("-", "all-reduce", f"failed: {last}", REMEDY)
