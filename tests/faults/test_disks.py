"""A disk that is mounted read-only: one sentence, exit code 2."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny import write_model


def refused(words: list[str], message: str) -> None:
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    lines = [line for line in done.stderr.splitlines() if "error:" in line]
    assert len(lines) == 1 and message in lines[0] and "Traceback" not in done.stderr, done.stderr


def export(model: Path, output: Path) -> list[str]:
    words = ["export", f"--model={model}", "--format=being-vl-0.5", f"--output_path={output}"]
    return words


@pytest.mark.needs_root
def test_a_read_only_disk_is_named(tmp_path) -> None:
    """Mounted in a namespace of its own."""
    disk = tmp_path / "disk"
    disk.mkdir()
    model = write_model(tmp_path / "base")
    words = [sys.executable, "-m", "beingvl", *export(model, disk / "out")]
    mounted = 'mount -t tmpfs -o ro none "$1" && shift && exec "$@"'
    refused(
        ["unshare", "--mount", "sh", "-c", mounted, "sh", str(disk), *words],
        f"Read-only file system ({disk / 'out'}); nothing finished is lost: check the disk",
    )
