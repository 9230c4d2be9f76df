"""The parent of all warm processes of a test session: it imports, computes nothing, and forks.

    python tests/warm_parent.py SOCKET PID        ends, with all its children, when PID ends

tests/warm_python.py asks for a child over the socket. The parent answers with the child's process
id, or 0 when the variables differ from its own, and later with its exit code. A child whose asker
goes away is killed.
"""

from __future__ import annotations

import atexit
import gc
import json
import logging
import multiprocessing.spawn
import os
import runpy
import selectors
import shutil
import signal
import socket
import sys
import tempfile
import threading
import traceback
import types
from contextlib import suppress
from typing import Any

from warm_python import READ_AT_IMPORT, READ_LATER  # this file's folder is where Python looks first

STARTED_WITH = dict(os.environ)
WARM_PYTHON = os.path.join(os.path.dirname(os.path.abspath(__file__)), "warm_python.py")


def import_all() -> None:
    """The libraries that training imports. Our own modules are forgotten: a program may patch one
    before another is imported.
    """
    import transformers.models.llama.modeling_llama  # noqa: F401

    import beingvl.train.run_stage  # noqa: F401

    for name in [name for name in sys.modules if name.split(".")[0] == "beingvl"]:
        del sys.modules[name]


def serve(path: str, session: int) -> tuple[dict[str, Any], list[int]]:
    """Answer until the session ends; returns a request, and the files that go with it, in the
    child that is to carry it out.
    """
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen(64)
    selector = selectors.DefaultSelector()
    selector.register(listener, selectors.EVENT_READ, "listener")
    selector.register(os.pidfd_open(session), selectors.EVENT_READ, "session")
    children: dict[int, socket.socket] = {}
    while True:
        for key, _ in selector.select():
            if key.data == "session":
                for child in children:
                    os.kill(child, signal.SIGKILL)
                shutil.rmtree(os.path.dirname(path), ignore_errors=True)
                os._exit(0)
            if key.data == "listener":
                asker, _ = listener.accept()
                request, files = receive(asker)
                is_alike = request and same_at_import(request["environment"])
                child = os.fork() if is_alike else 0
                if is_alike and not child:
                    selector.close()
                    for held in (listener, asker, *children.values()):
                        held.close()
                    return request, files
                for file in files:
                    os.close(file)
                with suppress(OSError):
                    asker.sendall(f"{child}\n".encode())
                if child:
                    children[child] = asker
                    selector.register(os.pidfd_open(child), selectors.EVENT_READ, child)
                    selector.register(asker, selectors.EVENT_READ, -child)
                else:
                    asker.close()
            elif isinstance(key.data, int) and key.data > 0:  # a child has ended
                code = os.waitstatus_to_exitcode(os.waitpid(key.data, 0)[1])
                selector.unregister(key.fileobj)
                os.close(key.fd)
                asker = children.pop(key.data)
                with suppress(KeyError):
                    selector.unregister(asker)
                with suppress(OSError):
                    asker.sendall(f"{code}\n".encode())
                asker.close()
            elif isinstance(key.data, int):  # its asker is gone
                selector.unregister(key.fileobj)
                if -key.data in children:
                    os.kill(-key.data, signal.SIGKILL)


def receive(asker: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """A request with its three files; nothing from an asker that was killed meanwhile."""
    head, files, _, _ = socket.recv_fds(asker, 16, 3)
    text = b""
    while len(head) == 16 and len(text) < int(head):
        part = asker.recv(1 << 20)
        if not part:
            break
        text += part
    is_whole = len(head) == 16 and len(text) == int(head)
    return (json.loads(text) if is_whole else {}), list(files)


def same_at_import(environment: dict[str, str]) -> bool:
    set_by_imports = set(os.environ) - set(STARTED_WITH)  # a child's children have these too
    ours, theirs = (
        {
            name: value
            for name, value in given.items()
            if name.startswith(READ_AT_IMPORT) and name not in READ_LATER | set_by_imports
        }
        for given in (STARTED_WITH, environment)
    )
    return ours == theirs


def become(request: dict[str, Any], files: list[int]) -> None:
    """Run what was asked for, as the main program of this process."""
    is_unbuffered = request["arguments"][0] == "-u"
    for target, file in enumerate(files):
        os.dup2(file, target)
        os.close(file)
    sys.stdin = sys.__stdin__ = os.fdopen(0, closefd=False)
    sys.stdout = sys.__stdout__ = os.fdopen(1, "w", 1 if is_unbuffered else -1, closefd=False)
    sys.stderr = sys.__stderr__ = os.fdopen(2, "w", 1, errors="backslashreplace", closefd=False)
    os.chdir(request["cwd"])
    for name in set(STARTED_WITH) - set(request["environment"]):
        os.environ.pop(name, None)
    os.environ.update(request["environment"])
    tempfile.tempdir = None  # of TMPDIR
    sys.path += [path for path in os.environ.get("PYTHONPATH", "").split(":") if path]
    if "BEINGVL_WARM_CHILDREN" in os.environ:
        multiprocessing.spawn.set_executable(sys.executable)  # its workers inherit open files
        sys.executable = WARM_PYTHON
    arguments = request["arguments"][is_unbuffered:]
    first, rest = arguments[0], arguments[1:]
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    if first == "-m":
        sys.path[0], sys.argv = request["cwd"], rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif first == "-c":
        sys.path[0], sys.argv = "", ["-c", *rest[1:]]
        exec(compile(rest[0], "<string>", "exec"), main.__dict__)
    else:
        sys.path[0], sys.argv = os.path.dirname(os.path.abspath(first)), arguments
        runpy.run_path(first, run_name="__main__")


def leave_with(error: BaseException | None) -> None:
    """End as Python does, without freeing every object: that would copy the parent's memory."""
    code = 0
    if isinstance(error, SystemExit):
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
        if error.code is not None and not isinstance(error.code, int):
            print(error.code, file=sys.stderr)
    elif error:
        traceback.print_exception(error)
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code % 256)


if __name__ == "__main__":
    import_all()
    gc.freeze()  # a collection in a child would touch, and so copy, all that the parent has
    request, files = serve(sys.argv[1], int(sys.argv[2]))
    try:
        become(request, files)
    except BaseException as error:
        leave_with(error)
    leave_with(None)
