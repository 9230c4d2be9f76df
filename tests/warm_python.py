#!/usr/bin/env -S python -I -S
"""A Python that has torch, DeepSpeed and transformers imported already; standard library only.

    tests/warm_python.py [-u] -m MODULE | -c PROGRAM | FILE [arguments]

What is run is a fork of one warm parent (tests/warm_parent.py), which the first of these programs
starts and which ends with the test session. This program stands in for it: it has its output, its
working folder, its variables and its exit code, forwards signals, and takes it along when it is
killed. Where the environment differs in what an import may have looked at, a new Python is
started, as it is when the variable BEINGVL_WARM_PARENT (FOLDER:PID of the session) is missing.
With BEINGVL_WARM_CHILDREN, what the program starts as `sys.executable` is a fork too.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import time

FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
# Variables that are not the parent's: they are of one rank, or of one test.
READ_LATER = {
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "TORCH_EXTENSIONS_DIR",
    "PYTEST_CURRENT_TEST",
    "TMPDIR",
}
# How variables begin that a library, or Python itself, may read while it starts.
READ_AT_IMPORT = (
    *("ACCELERATE_", "CUDA_", "DS_", "FSSPEC_", "HF_", "HOME", "KMP_", "LANG", "LC_ALL", "LD_"),
    *("MALLOC_", "MKL_", "MPL", "NUMBA_", "OMP_", "OPENBLAS_", "PYTHONHASHSEED", "PYTHONMALLOC"),
    *("PYTHONOPTIMIZE", "PYTHONUTF8", "PYTHONWARNINGS", "TOKENIZERS_", "TORCH", "TRANSFORMERS_"),
    *("USE_", "XDG_"),
)


def main() -> int:
    arguments, named = sys.argv[1:], os.environ.get("BEINGVL_WARM_PARENT")
    if arguments[:2] == ["-I", "-S"]:  # this program is Python to a program that starts this one
        arguments = arguments[3:]
    parent = connect(named) if named else None
    if parent is None:
        os.execv(sys.executable, [sys.executable, *arguments])
    request = {"arguments": arguments, "cwd": os.getcwd(), "environment": dict(os.environ)}
    text = json.dumps(request).encode()
    socket.send_fds(parent, [f"{len(text):>16}".encode()], [0, 1, 2])
    parent.sendall(text)
    answers = parent.makefile()
    child = int(answers.readline() or 0)
    if not child:
        os.execv(sys.executable, [sys.executable, *arguments])
    for number in FORWARDED:
        signal.signal(number, lambda number, frame: os.kill(child, number))
    write_child(named.rpartition(":")[0], child)
    code = int(answers.readline() or 1)
    if code < 0:  # by a signal
        if -code in FORWARDED:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    return code


def write_child(folder: str, child: int) -> None:
    """Under this program's id, for who wants to reach the process itself."""
    path = os.path.join(folder, str(os.getpid()))
    with open(f"{path}.tmp", "w") as file:
        file.write(str(child))
    os.replace(f"{path}.tmp", path)


def connect(named: str) -> socket.socket | None:
    """To the warm parent of this session, which is started when there is none yet; None when it
    cannot be.
    """
    folder, _, session = named.rpartition(":")
    path = os.path.join(folder, "socket")
    parent = socket.socket(socket.AF_UNIX)
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, "lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            parent.connect(path)
            return parent
        except (FileNotFoundError, ConnectionRefusedError):
            pass
        environment = {key: value for key, value in os.environ.items() if key not in READ_LATER}
        program = os.path.join(os.path.dirname(__file__), "warm_parent.py")
        with open(os.path.join(folder, "log"), "a") as log:
            started = subprocess.Popen(
                [sys.executable, program, path, session],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        while started.poll() is None:
            try:
                parent.connect(path)
                return parent
            except (FileNotFoundError, ConnectionRefusedError):
                time.sleep(0.02)
    return None


if __name__ == "__main__":
    sys.exit(main())
