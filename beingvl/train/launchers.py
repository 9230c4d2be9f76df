"""What a rank knows of the launcher that started it.

run_name             what all ranks of one run, and no others, were given
end_with_launcher    a rank ends when its launcher is gone: nobody else would ever stop it, and the
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
RUN_VARIABLE = "BEINGVL_RUN"  # of `beingvl launch`
RUN_VARIABLES = (RUN_VARIABLE, "SLURM_JOB_ID", "TORCHELASTIC_RUN_ID", "MASTER_PORT")
LAUNCHERS = ("deepspeed", "torchrun", "mpirun", "mpiexec", "orted", "prted", "hydra_pmi_proxy")
OF_HOST = "deepspeed.launcher.launch"  # started by `deepspeed`, here or over ssh
MODULES = (OF_HOST, "deepspeed.launcher.runner", "torch.distributed.run")


def run_name(environment: Mapping[str, str] = os.environ) -> str:
    """What the ranks of a run know of it before they meet, and no other run has."""
    known = [environment.get(name, "") for name in RUN_VARIABLES]
    if environment.get("CROSS_SIZE") == "1":  # DeepSpeed's, of one host: one launcher has all ranks
        known.append(str(os.getppid()))
    return hash_bytes("\n".join(known).encode()).removeprefix(PREFIX)[:16]


def end_with_launcher() -> None:
    """From now on a thread ends this process when one of its launchers is gone."""
    if launchers := find_launchers():
        threading.Thread(target=_watch, args=(launchers,), name="launcher", daemon=True).start()


def find_launchers() -> list[psutil.Process]:
    """What started this process as a rank, innermost first, with what stands between: here, and
    beyond an ssh connection that comes from this machine. Shells and logins above are not followed:
    they may end before a run that goes on without them.
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
        if is_session:  # of `deepspeed --hostfile`, whose pdsh outlives it
            waiting = deque(_client_of_session())
    return found


def _client_of_session() -> list[psutil.Process]:
    """The ssh that this process's session was asked by, and its parents, if it runs here."""
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
    """Whether a command line is that of a program that starts ranks."""
    first = words[:5]
    names = [os.path.basename(word) for word in first]
    return (
        any(name in LAUNCHERS for name in names[:3])
        or any(module in first for module in MODULES)
        or ("beingvl", "launch") in itertools.pairwise(names)
        or "".join(names[:1]).startswith("slurmstepd")
    )


def _is_ssh_session(words: Sequence[str]) -> bool:
    """Of a command, not of a login: that of pdsh, which ends with its connection."""
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
