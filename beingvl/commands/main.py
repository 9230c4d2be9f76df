"""The console script `beingvl`: each command is a module, imported only when it is called.

A command module has a docstring (the text of its --help), `add_arguments(parser)` and
`run(args) -> int | None`; it imports its step inside `run`, so that `--help` is instant. Options
can be written `--like_this` or `--like-this`. Wrong input gives a one-sentence error and exit code
2; `--debug` shows the traceback.
"""

from __future__ import annotations

import difflib
import errno
import importlib
import io
import itertools
import os
import re
import sys
import tempfile
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from beingvl.commands.parser import Parser
from beingvl.errors import TOO_MANY_FILES, InputError
from beingvl.version import __version__

COMMANDS = {
    "train-vq": "train a small VQ-GAN on a folder of images",
    "encode-images": "[1] images -> vq_codes/",
    "train-vbpe": "[2] vq_codes/ -> vbpe/",
    "convert": "[3] text model + vqgan/ + vbpe/ -> Being-VL base/",
    "tokenize": "[4] LLaVA JSON + images or vq_codes/ + vbpe/ -> token rows",
    "build-shards": "[5] token rows -> memory-mapped Arrow shards/",
    "train": "[6] base/ + shards/ + stage JSON -> checkpoints and final/",
    "generate": "[7] answer a prompt about images",
    "serve": "[7] a page on this machine to try a model in the browser, or an API",
    "evaluate": "[7] score a model: answers, held-out loss, text against its base",
    "report": "[7] pages about a run's data, training and answers",
    "export": "[7] start model + training checkpoint -> stock Hugging Face folder",
    "launch": "start a training stage on the hosts of a hostfile, through deepspeed",
    "preflight": "check on every host of a hostfile that a run can start there",
    "plan": "predict a stage's memory and time before it runs",
    "verify": "re-hash an artefact of any step against its manifest",
}
WRONG_PATH = (
    FileNotFoundError,
    FileExistsError,
    NotADirectoryError,
    IsADirectoryError,
    PermissionError,
)
DISK_IS_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
DISK_FAILS = (
    errno.EIO,
    errno.ESTALE,
    errno.ETIMEDOUT,
    errno.ENOTCONN,
    errno.EHOSTDOWN,
    errno.EREMOTEIO,
    errno.ENODEV,
    errno.EROFS,
    errno.ENOLCK,
    errno.ENOSYS,
    errno.EOPNOTSUPP,
)
REMEDIES = {
    errno.ECONNABORTED: "check the network",  # raised by sources/places.py
    **dict.fromkeys(DISK_IS_FULL, "make room"),
    **dict.fromkeys(DISK_FAILS, "check the disk"),
    **dict.fromkeys(TOO_MANY_FILES, "allow more open files (`ulimit -n 65536`)"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run `beingvl ARGV…`; returns the exit code."""
    if "_ARGCOMPLETE" in os.environ:
        _complete(os.environ["COMP_LINE"].split()[1:2])
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv and argv[0].startswith("--local_rank="):
        argv = argv[1:]  # added by the deepspeed launcher, which also sets LOCAL_RANK
    if argv and argv[0] == "help":  # `beingvl help train` is `beingvl train --help`
        argv = [*argv[1:], "--help"]
    if not argv or argv[0] in ("-h", "--help"):
        print(_overview())
        return 0
    if argv[0] in ("-V", "--version"):
        print(f"beingvl {__version__}")
        return 0
    if argv[0] not in COMMANDS:
        near = difflib.get_close_matches(argv[0], COMMANDS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        print(
            f"beingvl: error: no command {argv[0]!r}{hint} (`beingvl --help` lists them)",
            file=sys.stderr,
        )
        return 2
    return _run_command(argv[0], argv[1:])


def _complete(command: Sequence[str]) -> None:
    """Answer a completion request of the shell (`register-python-argcomplete`), and exit."""
    import argcomplete  # an optional extra

    parser = Parser(prog="beingvl")
    commands = parser.add_subparsers()
    for name in COMMANDS:
        options = commands.add_parser(name)
        if name in command:
            _module_of(name).add_arguments(options)
    argcomplete.autocomplete(parser)


def _module_of(command: str) -> ModuleType:
    return importlib.import_module(f"beingvl.commands.{command.replace('-', '_')}")


def _overview() -> str:
    rows = "\n".join(f"  {name:<14} {description}" for name, description in COMMANDS.items())
    usage = "usage: beingvl COMMAND [options]   (`beingvl help COMMAND` lists them)"
    return f"{usage}\n\n{rows}\n\n  -V, --version; -h, --help"


def _run_command(name: str, argv: Sequence[str]) -> int:
    module = _module_of(name)
    parser = Parser(prog=f"beingvl {name}", description=module.__doc__)
    module.add_arguments(parser)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_args([_underscored(word) for word in argv])
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # Paths may hold any bytes, and a terminal's encoding may lack characters.
            stream.reconfigure(errors="backslashreplace")
    try:
        parser.look_at_inputs(args)
        return module.run(args) or 0
    except (InputError, *WRONG_PATH) as error:
        if args.debug:
            raise
        print(f"beingvl {name}: error: {_sentence(error, argv)}", file=sys.stderr, flush=True)
        return 2
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if args.debug:
            raise
        error = _of_the_system(error)
        if not isinstance(error, OSError) or error.errno not in REMEDIES:
            return _report_bug(name, error)
        # A failed write does not name its file.
        output = getattr(args, "output_path", None) or getattr(args, "output", None)
        path = error.filename or output
        where = f" ({path})" if path else ""
        remedy = f"{REMEDIES[error.errno]} and start the same command again"
        print(
            f"beingvl {name}: error: {error.strerror}{where}; nothing finished is lost: {remedy}",
            file=sys.stderr,
            flush=True,
        )
        return 2


def _of_the_system(error: Exception) -> Exception:
    """The OSError behind a RuntimeError of torch such as "…: Too many open files (24)"."""
    number = re.search(r" \((\d+)\)$", str(error))
    if isinstance(error, RuntimeError) and number and int(number[1]) in REMEDIES:
        return OSError(int(number[1]), os.strerror(int(number[1])))
    return error


def _sentence(error: Exception, argv: Sequence[str]) -> str:
    """The message; for a wrong path, with the option that it came from."""
    if not isinstance(error, OSError) or not error.filename:
        return str(error)
    path = str(error.filename2 or error.filename)  # for a failed rename, the new name
    for before, word in itertools.pairwise(["", *argv]):
        option, equals, value = word.partition("=")
        if (word == path and before.startswith("--")) or (equals and value == path):
            return f"{option if equals else before} {path}: {error.strerror}"
    return f"{path}: {error.strerror}"


def _report_bug(name: str, error: Exception) -> int:
    saved = _save_traceback(name)
    print(
        f"beingvl {name}: unexpected {type(error).__name__}: {error}\n"
        f"This looks like a bug, not wrong input; the traceback is in {saved} "
        "(or run with --debug).",
        file=sys.stderr,
        flush=True,
    )
    return 1


def _underscored(word: str) -> str:
    """`--like-this=a-b` -> `--like_this=a-b`; anything but an option stays unchanged."""
    if not word.startswith("--") or word == "--":
        return word
    option, equals, value = word.partition("=")
    return "--" + option[2:].replace("-", "_") + equals + value


def _save_traceback(name: str) -> Path:
    # a random name: in a shared folder, somebody could place a link at a predictable one
    number, path = tempfile.mkstemp(".traceback.txt", f"beingvl-{name}-")
    with open(number, "w", encoding="utf-8", errors="backslashreplace") as file:
        file.write(traceback.format_exc())
    return Path(path)
