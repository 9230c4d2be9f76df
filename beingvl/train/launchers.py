"""What a rank knows about the launcher that started it.

run_name             a name that all ranks of one run share, and no other run has
end_with_launcher    ends a rank when its launcher is gone: nothing else would ever stop it, and the
                     next start would find its port and its folder in use
"""

from __future__ import annotations

import itertools
import os
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence

import psutil

from beingvl.artefact.hashes import PREFIX, hash_bytes
from beingvl.artefact.processes import end_process

POLL_SECONDS = 0.5
RUN_VARIABLE = "BEINGVL_RUN"  # set by `beingvl launch`
RUN_VARIABLES = (RUN_VARIABLE, "SLURM_JOB_ID", "TORCHELASTIC_RUN_ID", "MASTER_PORT")
LAUNCHERS = ("deepspeed", "torchrun", "mpirun", "mpiexec", "orted", "prted", "hydra_pmi_proxy")
OF_HOST = "deepspeed.launcher.launch"  # started by `deepspeed`, here or over ssh
MODULES = (OF_HOST, "deepspeed.launcher.runner", "torch.distributed.run")


def run_name(environment: Mapping[str, str] = os.environ) -> str:
    """A name that the ranks of a run can all compute before they meet, and no other run has."""
    known = [environment.get(name, "") for name in RUN_VARIABLES]
    if environment.get("CROSS_SIZE") == "1":  # set by DeepSpeed: one host, one launcher for all
        known.append(str(os.getppid()))
    return hash_bytes("\n".join(known).encode()).removeprefix(PREFIX)[:16]


def end_with_launcher() -> None:
    """Start a thread that ends this process when one of its launchers is gone."""
    if launchers := find_launchers():
        threading.Thread(target=_watch, args=(launchers,), name="launcher", daemon=True).start()


def find_launchers() -> list[psutil.Process]:
    """The processes that started this one as a rank, innermost first, with those in between: on
    this machine, and across an ssh connection from this machine. Shells and logins above the
    outermost launcher are left out: they may end before the run does.
    """
    found: list[psutil.Process] = []
    between: list[psutil.Process] = []
    is_of_host = False
    waiting = deque(psutil.Process().parents())
    while waiting:
        process = waiting.popleft()
        try:
            words = process.cmdline()
        except psutil.Error:
            break
        between.append(process)
        is_session = is_of_host and _is_ssh_session(words)
        if is_launcher(words) or is_session:
            found += between
            between = []
            is_of_host = OF_HOST in words[:5]
        if is_session:  # `deepspeed --hostfile`: its pdsh outlives it
            waiting = deque(_client_of_session())
    return found


def _client_of_session() -> list[psutil.Process]:
    """The ssh client of this process's session, and its parents, if it runs on this machine."""
    client = os.environ.get("SSH_CONNECTION", "").split()[:2]
    try:
        for connection in psutil.net_connections("tcp"):
            if [*map(str, connection.laddr)] == client and connection.pid:
                ssh = psutil.Process(connection.pid)
                return [ssh, *ssh.parents()]
    except (psutil.Error, OSError):
        pass
    return []


def is_launcher(words: Sequence[str]) -> bool:
    """Whether a command line belongs to a program that starts ranks."""
    first = words[:5]
    names = [os.path.basename(word) for word in first]
    return (
        any(name in LAUNCHERS for name in names[:3])
        or any(module in first for module in MODULES)
        or ("beingvl", "launch") in itertools.pairwise(names)
        or "".join(names[:1]).startswith("slurmstepd")
    )


def _is_ssh_session(words: Sequence[str]) -> bool:
    """A session of a command, not of a login: pdsh's, which ends with its connection."""
    title = "".join(words[:1])
    return title.startswith("sshd") and title.endswith("@notty")


def _watch(launchers: Sequence[psutil.Process]) -> None:
    while True:
        for process in launchers:
            if not _is_alive(process):
                found = f"the launcher of this rank (process {process.pid}) is gone"
                end_process(f"beingvl train: {found}; this rank ends")
        time.sleep(POLL_SECONDS)


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
