"""Passes the variables that remote ranks need from this shell's environment, in the file that
DeepSpeed's launcher reads.

DeepSpeed itself passes PYTHON*, on GPUs NCCL*, and everything in a `.deepspeed_env`. Its reader
accepts only `KEY=VALUE` lines (a comment or an empty line makes it fail) and wraps values in double
quotes without escaping any inside. DS_ENV_FILE names a different file; we set it to one of our own,
so that two runs started from the same folder do not share one. DeepSpeed then ignores the user's
own files, so we read them here and pass their lines on.

Anything that looks like a secret stays on this machine, unless the user's own file passes it to the
ranks; even then it is not shown.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from beingvl.artefact.files import write_atomically
from beingvl.errors import InputError

USERS_FILE = ".deepspeed_env"
PASSED_PREFIXES = ("NCCL_", "GLOO_", "UCX_", "TORCH_NCCL_", "BEINGVL_", "WANDB_")
PASSED_NAMES = [
    "PYTHONPATH",
    "LD_LIBRARY_PATH",
    "DS_ACCELERATOR",
    "OMP_NUM_THREADS",
    "HF_HOME",
    "HF_HUB_OFFLINE",
    "TOKENIZERS_PARALLELISM",
    "TORCH_EXTENSIONS_DIR",
    "TRITON_CACHE_DIR",
]
# Variables that DeepSpeed passes from the launcher's own environment.
DEEPSPEEDS_PREFIXES = ("MLFLOW", "PYTHON", "MV2", "UCX", "NCCL")
NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
SECRET_NAME = re.compile(r"KEY|TOKEN(?!IZER)|SECRET|PASSW|CREDENTIAL", re.IGNORECASE)
SECRET_VALUE = re.compile(r"://[^/?#\s]*@")  # a URL with a user name or password


def users_files() -> list[Path]:
    """The user's own files in DeepSpeed's order (home folder, working folder, DS_ENV_FILE); later
    ones win.
    """
    named = os.environ.get("DS_ENV_FILE")
    paths = [Path.home() / USERS_FILE, Path.cwd() / USERS_FILE, *([Path(named)] if named else [])]
    return [path for path in paths if path.is_file()]


def without_passed_secrets(environment: Mapping[str, str]) -> dict[str, str]:
    """A launcher environment without the secrets that DeepSpeed would pass to other hosts."""
    return {
        name: value
        for name, value in environment.items()
        if not (name.startswith(DEEPSPEEDS_PREFIXES) and is_secret(name, value))
    }


def is_secret(name: str, value: str) -> bool:
    """Whether a variable looks like a key, a token or a password."""
    return bool(SECRET_NAME.search(name) or SECRET_VALUE.search(value))


def remote_environment(
    environment: Mapping[str, str], users_files: Sequence[Path]
) -> dict[str, str]:
    """The variables for every rank: this shell's, then those of the user's files, which win.

    Of this shell's variables, only those listed above are passed, and no secrets. Raises InputError
    for one that cannot be passed.
    """
    passed = {
        name: value
        for name, value in environment.items()
        if value
        and not is_secret(name, value)
        and (name in PASSED_NAMES or name.startswith(PASSED_PREFIXES))
    }
    for path in users_files:
        passed.update(_read_users_file(path))
    for name, value in passed.items():
        if "\n" in value:
            raise InputError(
                f"the variable {name} has several lines, which DeepSpeed cannot pass to other "
                "hosts; unset it"
            )
    return dict(sorted(passed.items()))


def _read_users_file(path: Path) -> dict[str, str]:
    found = {}
    for number, text in enumerate(path.read_text().splitlines(), start=1):
        if not text.strip() or text.lstrip().startswith("#"):
            continue
        name, equals, value = text.partition("=")
        if not equals or not NAME.fullmatch(name.strip()):
            raise InputError(
                f"{path}, line {number}: {name!r} is not a variable's name; expected NAME=VALUE"
            )
        found[name.strip()] = value.strip()
    return found


def format_environment(variables: Mapping[str, str]) -> str:
    """The file's text, without comments or empty lines, escaped for a shell's double quotes."""
    escaped = {name: re.sub(r'([\\"$`])', r"\\\1", value) for name, value in variables.items()}
    return "".join(f"{name}={value}\n" for name, value in escaped.items())


def shown(variables: Mapping[str, str]) -> str:
    """The file's text for display, with the values of secrets hidden."""
    hidden = {
        name: "(not shown)" if is_secret(name, value) else value
        for name, value in variables.items()
    }
    return format_environment(hidden)


@contextmanager
def environment_file(folder: Path, environment: Mapping[str, str]) -> Iterator[dict[str, str]]:
    """While the launcher runs, keep a file in `folder`, readable only by this user, with the
    variables that remote ranks need. Yields the launcher's environment, which names the file.
    """
    path = folder.absolute() / f"{USERS_FILE}.{socket.gethostname()}.{os.getpid()}"
    _remove_stale(path)
    text = format_environment(remote_environment(environment, users_files()))
    write_atomically(path, text, mode=0o600)
    try:
        yield {**environment, "DS_ENV_FILE": str(path)}
    finally:
        path.unlink(missing_ok=True)


def _remove_stale(path: Path) -> None:
    """Remove files that killed launchers of this machine left next to `path`."""
    for other in path.parent.glob(f"{path.stem}.*"):
        number = other.suffix[1:]
        if number.isdecimal() and not Path("/proc", number).exists():
            other.unlink(missing_ok=True)
