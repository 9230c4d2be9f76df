"""A training run that is interrupted at random moments, start-up and saves included, and ends with
the bytes of one that was not.
"""

from __future__ import annotations

import contextlib
import errno
import random
import re
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil

from beingvl.artefact.manifest import verify_folder
from beingvl.train.metrics import read_metrics
from tests.launcher import log_of, rank_processes, run, start

LONGEST_SECONDS = 120


def assert_same_weights(found: Path, expected: Path) -> None:
    ours, theirs = (
        {path.name: path.read_bytes() for path in (folder / "final").glob("*.safetensors")}
        for folder in (found, expected)
    )
    assert ours and ours == theirs


class Disk:
    """A folder on a disk of its own, 64 MB of ext4 in a file. Needs root."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._image = folder, folder.with_suffix(".ext4")
        self._filler = folder / "filler"

    def __enter__(self) -> Disk:
        self.folder.mkdir()
        with open(self._image, "wb") as file:
            file.truncate(64 << 20)
        subprocess.run(["mkfs.ext4", "-q", "-F", self._image], check=True)
        self._mount()
        return self

    def __exit__(self, *error: object) -> None:
        subprocess.run(["umount", self.folder], check=True)
        self._image.unlink()

    def _mount(self) -> None:
        options = "loop,errors=remount-ro"
        subprocess.run(["mount", "-o", options, self._image, self.folder], check=True)

    def fill(self) -> None:
        try:
            with open(self._filler, "wb", buffering=0) as file:
                while True:
                    file.write(bytes(1 << 16))
        except OSError as error:
            assert error.errno == errno.ENOSPC

    def make_room(self) -> None:
        self._filler.unlink()

    def fail(self) -> None:
        """As after a bad block: what is not flushed is lost, and nothing can be written."""
        shown = subprocess.run(["losetup", "-j", self._image], capture_output=True, text=True)
        loop = Path(shown.stdout.partition(":")[0]).name
        Path(f"/sys/fs/ext4/{loop}/trigger_fs_error").write_text("1")

    def repair(self) -> None:
        subprocess.run(["umount", self.folder], check=True)
        self._mount()


class Storm:
    """One run with two ranks; each start goes on where the last one was, and every step saves."""

    def __init__(
        self, work: Path, whole_run: Path, output: Path, seed: int, disk: Disk | None = None
    ) -> None:
        self.work, self.whole_run, self.output, self.disk = work, whole_run, output, disk
        self.moments, self.num_interrupted = random.Random(seed), 0
        self.loses_rows = False

    def run(self, faults: Sequence[Callable[[Storm, subprocess.Popen], None]]) -> None:
        for fault in faults:
            launcher = self.start()
            self._wait_for_a_moment(launcher)
            fault(self, launcher)
            self.num_interrupted += launcher.wait(timeout=LONGEST_SECONDS) != 0
        assert run(2, *self._arguments()) == 0, log_of(self.output)[-6000:]
        assert_same_weights(self.output, self.whole_run)
        verify_folder(self.output / "final")
        losses, expected = (
            {row["step"]: row["loss"] for row in read_metrics(output)}
            for output in (self.output, self.whole_run)
        )
        assert losses.items() <= expected.items()
        assert self.loses_rows or losses == expected

    def start(self) -> subprocess.Popen:
        in_background = str(self.moments.random() < 0.5).lower()
        return start(2, *self._arguments(), f"beingvl.background_save={in_background}")

    def signal(self, launcher: subprocess.Popen, number: signal.Signals) -> None:
        if launcher.poll() is None:
            for process in rank_processes(launcher).values():
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.send_signal(number)

    def _arguments(self) -> tuple[Path | str, ...]:
        inputs = (self.work / name for name in ("all.json", "base", "shards"))
        return (*inputs, self.output, "beingvl.checkpoint_every_steps=1")

    def _wait_for_a_moment(self, launcher: subprocess.Popen) -> None:
        while launcher.poll() is None and not rank_processes(launcher):
            time.sleep(0.05)
        if self.moments.random() < 0.8:  # most moments lie in the loop
            done = self._num_rows()
            while launcher.poll() is None and self._num_rows() <= done:
                time.sleep(0.005)
            time.sleep(self.moments.random() * 0.5)
        else:
            time.sleep(self.moments.random() * 8)

    def _num_rows(self) -> int:
        path = self.output / "metrics.jsonl"
        return path.read_text().count("\n") if path.is_file() else 0


# ---- faults ----


def kill(storm: Storm, launcher: subprocess.Popen) -> None:
    storm.signal(launcher, signal.SIGKILL)


def stop(storm: Storm, launcher: subprocess.Popen) -> None:
    storm.signal(launcher, signal.SIGTERM)


def kill_one_rank(storm: Storm, launcher: subprocess.Popen) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):  # the run may have ended
        if ranks := list(rank_processes(launcher).values()):
            storm.moments.choice(ranks).kill()


def start_twice(storm: Storm, launcher: subprocess.Popen) -> None:
    """Exactly one goes on, and the other says who has the folder."""
    second = storm.start()
    both = [launcher, second]
    deadline = time.monotonic() + LONGEST_SECONDS
    while all(process.poll() is None for process in both):
        assert time.monotonic() < deadline, log_of(storm.output)[-6000:]
        time.sleep(0.05)
    codes = [process.poll() for process in both]
    if 0 not in codes:  # the other may end, too, while this one looks
        assert 2 in codes, (codes, log_of(storm.output)[-6000:])
        assert re.search(r"is in use by process \d+ on ", log_of(storm.output))
    for process in both:
        storm.signal(process, signal.SIGTERM)
        process.wait(timeout=LONGEST_SECONDS)


def fill_the_disk(storm: Storm, launcher: subprocess.Popen) -> None:
    assert storm.disk
    storm.disk.fill()
    code = launcher.wait(timeout=LONGEST_SECONDS)
    storm.disk.make_room()
    assert code in (0, 1, 2), (code, log_of(storm.output)[-6000:])


def make_the_disk_read_only(storm: Storm, launcher: subprocess.Popen) -> None:
    assert storm.disk
    storm.loses_rows = True
    storm.disk.fail()
    code = launcher.wait(timeout=LONGEST_SECONDS)
    storm.disk.repair()
    assert code in (0, 1, 2), (code, log_of(storm.output)[-6000:])


FAULTS = (kill, stop, kill_one_rank, start_twice, fill_the_disk, make_the_disk_read_only)
