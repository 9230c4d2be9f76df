"""Hostfiles: one line per host, `NAME slots=NUMBER`, the format of DeepSpeed, read strictly.

    # a comment
    worker-1 slots=8
    worker-2 slots=8      # the first host is rank 0's

DeepSpeed's own reader ignores anything after the number, and takes a missing hostfile to mean "this
machine alone".
"""

from __future__ import annotations

import re
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from beingvl.errors import InputError

THIS_MACHINE = ("localhost", "127.0.0.1")
LINE = re.compile(r"(?P<name>[A-Za-z0-9][A-Za-z0-9._-]*)\s+slots=(?P<slots>[0-9]+)")
MAX_SLOTS_DIGITS = 4


@dataclass(frozen=True)
class Host:
    """A host and the number of ranks on it."""

    name: str
    slots: int


def read_hostfile(path: Path | str) -> list[Host]:
    """The hosts in file order. Raises InputError that names file, line and text."""
    path = Path(path)
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise InputError(f"{path} {what}; write one line per host: NAME slots=NUMBER")
    hosts: dict[str, tuple[int, Host]] = {}  # lower-case name -> line number, host
    for number, text in enumerate(path.read_text(errors="replace").splitlines(), start=1):
        line = text.partition("#")[0].strip()
        if not line:
            continue
        place = f"{path}, line {number}: {text.strip()!r}"
        match = LINE.fullmatch(line)
        if not match:
            raise InputError(f"{place} is not a host; {_remedy(line)}")
        if len(match["slots"]) > MAX_SLOTS_DIGITS:
            raise InputError(f"{place} has more slots than a host can have; write its GPUs")
        host = Host(match["name"], int(match["slots"]))
        if host.slots == 0:
            raise InputError(
                f"{place} has no slot; remove the line, or give the number of ranks to run there"
            )
        first, _ = hosts.setdefault(host.name.lower(), (number, host))
        if first != number:
            raise InputError(
                f"{place} names {host.name} again, first in line {first}; add up the slots in "
                "one line"
            )
    if not hosts:
        raise InputError(f"{path} names no host; write one line per host: NAME slots=NUMBER")
    for name in THIS_MACHINE:
        if name in hosts and len(hosts) > 1:
            raise InputError(
                f"{path}, line {hosts[name][0]}: {name!r} among other hosts means another "
                "machine on each of them; write the name by which all hosts reach it"
            )
    return [host for _, host in hosts.values()]


def _remedy(line: str) -> str:
    if line.startswith("\N{BYTE ORDER MARK}"):
        return (
            "the file begins with a byte order mark, which DeepSpeed takes for a part of the name: "
            "save it as UTF-8 without one"
        )
    if "@" in line.split()[0]:
        return "write its name alone, and its user in ~/.ssh/config (Host NAME, User USER)"
    return "expected NAME slots=NUMBER, for example worker-1 slots=8"


def is_this_machine_alone(hosts: Sequence[Host]) -> bool:
    """Whether no other machine takes part; then no ssh is needed."""
    return len(hosts) == 1 and hosts[0].name in (*THIS_MACHINE, socket.gethostname())
