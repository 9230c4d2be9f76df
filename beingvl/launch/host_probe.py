"""One host's answers before a run, as one line of JSON. `beingvl preflight` runs this on every
host, so it needs only the standard library.

python -m beingvl.launch.host_probe '{"port": 29500, "folders": {"base": "model"}, …}'
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from beingvl.artefact.manifest import read_manifest
from beingvl.artefact.processes import listener_on
from beingvl.errors import InputError
from beingvl.version import __version__

MARK = "beingvl-probe "
READING = "beingvl-all-reduce "
ENDING_SECONDS = 3.0  # ranks check twice a second whether their launcher is gone
PACKAGES = ("torch", "deepspeed", "transformers", "numpy")


def probe(
    port: int | None,
    folders: Mapping[str, str],
    output: str | None,
    stage: str | None = None,
    nvme: Sequence[str] = (),
) -> dict[str, Any]:
    """`port`: who uses it here; `folders` (folder -> kind): their content hashes; `output`: free
    bytes on its disk; `stage`: hash of its JSON file; `nvme`: free bytes of these folders, None for
    one that is not writable.
    """
    connection = os.environ.get("SSH_CONNECTION", "").split()  # client, port, server, port
    return {
        "seconds": time.time(),
        "client_address": connection[0] if connection else None,
        "server_address": connection[2] if connection else None,
        "python": platform.python_version(),
        "beingvl": __version__,
        **{name: _version_of(name) for name in PACKAGES},
        "code": code_hash(),
        **count_devices(),
        "port_user": None if port is None else port_user(port),
        "folders": {folder: _content_hash(folder, kind) for folder, kind in folders.items()},
        "free_bytes": _free_bytes(Path(output)) if output else None,
        "stage": _file_hash(Path(stage)) if stage else None,
        "nvme": {path: _free_bytes(Path(path)) if _is_writable(path) else None for path in nvme},
    }


def _version_of(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "missing"


def code_hash() -> str:
    """Hash of all source files of this package: two checkouts of one version may differ."""
    digest = hashlib.sha256()
    root = Path(__file__).parents[1]
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def count_devices() -> dict[str, Any]:
    """GPUs (those in CUDA_VISIBLE_DEVICES if it is set), or CPU cores if there are none or
    DS_ACCELERATOR says so.
    """
    if os.environ.get("DS_ACCELERATOR") != "cpu" and shutil.which("nvidia-smi"):
        listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True)
        gpus = [line for line in listed.stdout.splitlines() if line.startswith("GPU ")]
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        if visible is not None:
            gpus = [name for name in visible.split(",") if name.strip()]
        if listed.returncode == 0 and gpus:
            return {"device": "GPU", "num_devices": len(gpus)}
    return {"device": "CPU core", "num_devices": len(os.sched_getaffinity(0))}


def port_user(port: int, patience_seconds: float = ENDING_SECONDS) -> str:
    """Who uses the port on this host, "" if it is free. Waits a little, because a run that was just
    killed may still be ending.
    """
    deadline = time.monotonic() + patience_seconds
    while not _is_port_free(port):
        if time.monotonic() > deadline:
            return listener_on(port)
        time.sleep(0.1)
    return ""


def _is_port_free(port: int) -> bool:
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind(("", port))
        except OSError:
            return False
    return True


def _content_hash(folder: str, kind: str) -> str:
    try:
        return read_manifest(folder, kind).content_hash
    except (InputError, OSError) as error:
        return f"error: {error}"


def _file_hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:12] if path.is_file() else "missing"


def _is_writable(path: str) -> bool:
    return os.path.isdir(path) and os.access(path, os.W_OK)


def _free_bytes(path: Path) -> int:
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


if __name__ == "__main__":
    print(MARK + json.dumps(probe(**json.loads(sys.argv[1]))), flush=True)
