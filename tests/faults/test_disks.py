"""Disks that are mounted read-only, or that fail."""

import subprocess
import sys
from pathlib import Path

import pytest

from beingvl.artefact.files import write_atomically
from beingvl.artefact.manifest import verify_folder, write_manifest
from tests.tiny import write_model
from tests.train.storm import Disk


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


@pytest.mark.needs_root
def test_a_finished_folder_is_whole_when_the_disk_fails_the_moment_after(tmp_path) -> None:
    """As after a power cut: what was not flushed is lost, but the manifest promises all files."""
    with Disk(tmp_path / "disk") as disk:
        folder = disk.folder / "model"
        for name in ("config.json", "more/model.safetensors"):
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("{" + " " * 100_000 + "}")
        write_manifest(folder, "model", {}, {})
        write_atomically(disk.folder / "later", "")  # flushes names, but not what is in files
        disk.fail()
        disk.repair()
        verify_folder(folder)
