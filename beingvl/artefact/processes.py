"""Identify a process, so that others can check later whether it still runs.

A process id alone is not enough: ids are reused, and each host or container has its own.
"""

from __future__ import annotations

import os
import socket
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import psutil

from beingvl.artefact.files import command_line

LONGEST_COMMAND = 120  # characters of a command that messages show


@dataclass(frozen=True)
class Process:
    """`machine`: where `pid` is valid, "" if unknown. `started`: clock ticks from boot to the
    process's start.
    """

    host: str
    machine: str
    pid: int
    started: int
    since: str
    command: str

    def is_dead(self) -> bool | None:
        """Whether it has ended; None if that cannot be determined here."""
        if not self.machine or self.machine != this_machine():
            return None
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except PermissionError:  # another user's process
            pass
        found = _read_stat(self.pid)
        if found is None:  # /proc may hide other users' processes
            return False
        state, num_threads, started = found
        # A thread of a killed process may still be blocked in a write.
        return started != self.started or (state in "ZX" and num_threads <= 1)

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} (`{self.command}`, since {self.since})"


def end_process(reason: str) -> NoReturn:
    """End this process with all its threads, even if its stderr is closed."""
    with suppress(OSError):
        print(reason, file=sys.stderr, flush=True)
    os._exit(1)


def this_process() -> Process:
    pid = os.getpid()
    started = (_read_stat(pid) or ("", 0, 0))[2]
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    return Process(
        socket.gethostname(), this_machine(), pid, started, since, shortened(command_line(sys.argv))
    )


def this_machine() -> str:
    """Identifies host, boot and process-id namespace; "" if the system does not tell."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        table = os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        return ""
    return f"{socket.gethostname()}/{boot}/{table}"


def _read_stat(pid: int) -> tuple[str, int, int] | None:
    """(state, number of threads, clock ticks from boot to start), see proc(5)."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()
    return fields[0], int(fields[17]), int(fields[19])


def shortened(command: str) -> str:
    return command if len(command) <= LONGEST_COMMAND else f"{command[:LONGEST_COMMAND]}…"


def listener_on(port: int) -> str:
    """The process on this machine that listens on a port, as far as this user may see."""
    try:
        sockets = psutil.net_connections("tcp")
    except (psutil.Error, OSError):
        sockets = []
    for found in sockets:
        if found.status == psutil.CONN_LISTEN and found.laddr.port == port and found.pid:
            try:
                process = psutil.Process(found.pid)
                command = shortened(command_line(process.cmdline()))
                since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(process.create_time()))
            except psutil.Error:
                break
            return f"process {found.pid} (`{command}`, since {since})"
    return "a process of another user or container"
