"""The console script `beingvl`: a table of commands, each a module that is imported only when it
is called.

A command module has a docstring (its first line is the command's description),
`add_arguments(parser)` and `run(args) -> int | None`; it imports heavy libraries inside `run`, so
`--help` is instant. Option names accept `--like_this` and `--like-this`. A wrong input ends in one
sentence and exit code 2; `--debug` shows the traceback.
"""

from __future__ import annotations

import argparse
import errno
import importlib
import io
import itertools
import os
import sys
import tempfile
import traceback
from collections.abc import Sequence
from pathlib import Path

from beingvl.errors import InputError
from beingvl.version import __version__

COMMANDS = {
    "train-vq": ("beingvl.commands.train_vq", "train a small VQ-GAN on a folder of images"),
    "encode-images": ("beingvl.commands.encode_images", "[1] images -> vq_codes/"),
    "train-vbpe": ("beingvl.commands.train_vbpe", "[2] vq_codes/ -> vbpe.json"),
    "convert": ("beingvl.commands.convert", "[3] any LLaMA + vocabulary -> Being-VL base/"),
    "tokenize": (
        "beingvl.commands.tokenize",
        "[4] LLaVA JSON + images or vq_codes/ + vbpe.json -> *.jsonl",
    ),
    "build-shards": ("beingvl.commands.build_shards", "[5] *.jsonl -> memory-mapped Arrow shards/"),
    "train": (
        "beingvl.commands.train",
        "[6] base/ + shards/ + stage JSON -> checkpoints and final/",
    ),
    "export": (
        "beingvl.commands.export",
        "[7] start model + training checkpoint -> stock Hugging Face folder",
    ),
    "generate": ("beingvl.commands.generate", "answer a prompt about images"),
    "evaluate": (
        "beingvl.commands.evaluate",
        "score a model: answers, held-out loss, text against its base",
    ),
    "serve": ("beingvl.commands.serve", "a page on this machine to try a model in the browser"),
    "report": ("beingvl.commands.report", "pictures and summary of a run"),
    "launch": (
        "beingvl.commands.launch",
        "start a training stage on the hosts of a hostfile, through deepspeed",
    ),
    "preflight": (
        "beingvl.commands.preflight",
        "ask every host of a hostfile whether a run can start there",
    ),
    "plan": ("beingvl.commands.plan", "predict memory and time of a stage before it runs"),
    "verify": ("beingvl.commands.verify", "re-hash an artefact of any step against its manifest"),
}
NO_DEFAULT = (None, False, argparse.SUPPRESS)
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
)


class _Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults, keeps the description's line breaks, and adds no default where there is
    none.
    """

    def _get_help_string(self, action: argparse.Action) -> str | None:
        has_none = action.default == [] or any(action.default is none for none in NO_DEFAULT)
        return action.help if has_none else super()._get_help_string(action)


def main(argv: Sequence[str] | None = None) -> int:
    """Run `beingvl ARGV…`; returns the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv and argv[0].startswith(
        "--local_rank="
    ):  # put there by the deepspeed launcher, which also sets LOCAL_RANK
        argv = argv[1:]
    if not argv or argv[0] in ("-h", "--help"):
        print(_overview())
        return 0
    if argv[0] == "--version":
        print(f"beingvl {__version__}")
        return 0
    if argv[0] not in COMMANDS:
        import difflib

        near = difflib.get_close_matches(argv[0], COMMANDS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        print(
            f"beingvl: error: no command {argv[0]!r}{hint} (`beingvl --help` lists them)",
            file=sys.stderr,
        )
        return 2
    return _run_command(argv[0], argv[1:])


def _overview() -> str:
    rows = "\n".join(f"  {name:<14} {description}" for name, (_, description) in COMMANDS.items())
    return f"usage: beingvl COMMAND [options]   (each has --help)\n\n{rows}\n\n  --version, --help"


def _run_command(name: str, argv: Sequence[str]) -> int:
    module = importlib.import_module(COMMANDS[name][0])
    parser = argparse.ArgumentParser(
        prog=f"beingvl {name}", description=module.__doc__, formatter_class=_Formatter
    )
    module.add_arguments(parser)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_args([_underscored(word) for word in argv])
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(
                errors="backslashreplace"
            )  # a path may be any bytes, and a terminal may know few letters
    try:
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
        if not isinstance(error, OSError) or error.errno not in (*DISK_IS_FULL, *DISK_FAILS):
            return _report_defect(name, error)
        outputs = (
            getattr(args, option, None) for option in ("output_path", "output_dir", "output")
        )
        path = error.filename or next(
            filter(None, outputs), None
        )  # a failing write does not say which file it was
        where = f" ({path})" if path else ""
        remedy = (
            f"{'make room' if error.errno in DISK_IS_FULL else 'see to the disk'} and "
            "start the same command again"
        )
        print(
            f"beingvl {name}: error: {error.strerror}{where}; nothing finished is lost: {remedy}",
            file=sys.stderr,
            flush=True,
        )
        return 2


def _sentence(error: Exception, argv: Sequence[str]) -> str:
    """The message; of a wrong path with the option that it came from."""
    if not isinstance(error, OSError) or not error.filename:
        return str(error)
    path = str(error.filename2 or error.filename)  # of a file that could not get its name, the name
    for before, word in itertools.pairwise(["", *argv]):
        option, equals, value = word.partition("=")
        if (word == path and before.startswith("--")) or (equals and value == path):
            return f"{option if equals else before} {path}: {error.strerror}"
    return f"{path}: {error.strerror}"


def _report_defect(name: str, error: Exception) -> int:
    saved = _save_traceback(name)
    print(
        f"beingvl {name}: unexpected {type(error).__name__}: {error}\n"
        f"This looks like a defect, not like wrong input; the traceback is in {saved} "
        "(or run with --debug).",
        file=sys.stderr,
        flush=True,
    )
    return 1


def _underscored(word: str) -> str:
    """`--like-this=a-b` -> `--like_this=a-b`; everything that is not an option stays."""
    if not word.startswith("--") or word == "--":
        return word
    option, equals, value = word.partition("=")
    return "--" + option[2:].replace("-", "_") + equals + value


def _save_traceback(name: str) -> Path:
    path = Path(tempfile.gettempdir()) / f"beingvl-{name}-{os.getpid()}.traceback.txt"
    path.write_text(traceback.format_exc())
    return path
