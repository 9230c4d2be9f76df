"""Whose an output folder is while it is written: one owner at a time, also on a network disk.

    OUTPUT/.owner.tmp/GROUP.MEMBER.json    one file per process of the owner: who, where, since
                                           when; its time is renewed every few seconds

    owned     take the folder, or say who has it; several processes may be one owner, a group
    wait_for_owner, shared    the other processes of an owner, before and after it told its group
    making    `owned`, unless what is asked for is finished already
    in_turn   a moment alone, for which others wait

No file locks: not every disk has them. A folder with a file in it is renamed to `.owner.tmp`. That
works where there is none, or an empty one, so one of many wins, and is there with its file or not
at all. Whoever finds a dead owner removes that owner's files, by names that no other has, and
renames its own folder to the empty one. Nobody removes what it has not found dead:

    on the machine that it ran on      no process has its id and its start time
    elsewhere                          its time stood still for LEASE_SECONDS

An owner that was stopped for so long and wakes finds its file gone, and ends.
"""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from beingvl.artefact.files import make_folder, to_json
from beingvl.artefact.manifest import already_made
from beingvl.artefact.processes import Process, end_process, this_process
from beingvl.errors import InputError

OWNER, TURN = ".owner.tmp", ".turn.tmp"
BEAT_SECONDS = 5.0
LEASE_SECONDS = 90.0  # network disks show for up to 60 s what was there before
PATIENCE_SECONDS = 5.0  # what was killed a moment ago may still be ending
ENDING_SECONDS = 30.0  # the same, where some processes of the owner have ended already
POLL_SECONDS = 0.05
IS_TAKEN = (errno.ENOTEMPTY, errno.EEXIST)
IS_GONE = (errno.ENOENT, errno.ESTALE)


class OwnedError(InputError):
    """Another process writes into the folder."""


@contextmanager
def owned(
    output: Path, group: str | None = None, name: str = OWNER, waits: bool = False
) -> Iterator[str]:
    """Own `output` in this block; gives the group. Processes with the same `group` own it together,
    without one this process does alone.

    A folder that was made for this and stays empty is removed again. Raises OwnedError, which names
    the owner, when there still is another one after a few seconds, unless this one `waits`.
    """
    is_new = not output.exists()
    make_folder(output)
    share = _Share(output / name, group or uuid.uuid4().hex)
    try:
        share.take(math.inf if waits else PATIENCE_SECONDS)
        with share.kept():
            yield share.group
    finally:
        if is_new:
            with suppress(OSError):
                output.rmdir()


def wait_for_owner(output: Path, run: str, patience_seconds: float) -> None:
    """Return when a group whose name begins with `run` owns `output`, or when nobody has for so
    long: a disk may show it late, or not be the owner's. Raises OwnedError for another owner.
    """
    others, deadline = (
        _Others(output / OWNER, PATIENCE_SECONDS),
        time.monotonic() + patience_seconds,
    )
    while True:
        names = others.look(run)
        if any(name.startswith(run) for name in names):
            return
        if not names and time.monotonic() > deadline:
            return
        time.sleep(POLL_SECONDS)


@contextmanager
def shared(output: Path, group: str) -> Iterator[None]:
    """Own `output` together with the process that gave `group`, as soon as it is seen here."""
    with _Share(output / OWNER, group).kept():
        yield


@contextmanager
def making(output: Path, kind: str, request: Mapping[str, Any], overwrite: bool) -> Iterator[bool]:
    """Own `output` and give True, or give False when `request` is finished (see `already_made`)."""
    if already_made(output, kind, request, overwrite):
        yield False
        return
    with owned(output):
        # another process may have finished it just now
        yield not already_made(output, kind, request, overwrite)


@contextmanager
def in_turn(output: Path) -> Iterator[None]:
    """Alone in `output` for a moment; others wait for their turn."""
    with owned(output, name=TURN, waits=True):
        yield


class _Share:
    """This process's file in the folder of an owner."""

    def __init__(self, folder: Path, group: str) -> None:
        self.folder, self.group = folder, group
        self._path = folder / f"{group}.{uuid.uuid4().hex}.json"
        self._text = to_json(asdict(this_process()))
        self._is_there = False
        self._done = threading.Event()

    def take(self, patience_seconds: float) -> None:
        """Raises OwnedError for another owner that lives."""
        others = _Others(self.folder, patience_seconds)
        while not self._is_there:
            names = others.look(f"{self.group}.")
            if not names:
                self._begin()
            elif all(map(self._is_ours, names)):
                self._join()
            else:
                time.sleep(POLL_SECONDS)

    def _begin(self) -> None:
        """Take a folder that nobody has."""
        prepared = self.folder.with_name(f".{uuid.uuid4().hex}{self.folder.name}")
        prepared.mkdir(parents=True)
        try:
            (prepared / self._path.name).write_text(self._text)
            with suppress(OSError):  # not every disk renames to an empty folder
                self.folder.rmdir()
            os.rename(prepared, self.folder)
        except OSError as error:
            if error.errno not in (*IS_TAKEN, *IS_GONE):
                raise
        finally:
            shutil.rmtree(prepared, ignore_errors=True)
        # NFS may rename, lose the answer, and say of the second try that it cannot
        self._is_there = self._path.exists()

    def _join(self) -> None:
        """Beside the group's other files, unless there is none, or another owner's."""
        try:
            with open(self._path, "x") as file:
                file.write(self._text)
            names = set(os.listdir(self.folder)) - {self._path.name}
            self._is_there = bool(names) and all(self._is_ours(name) for name in names)
            if not self._is_there:
                self._path.unlink()
        except OSError as error:
            if error.errno not in IS_GONE:
                raise

    def _is_ours(self, name: str) -> bool:
        return _group_of(name) == self.group

    @contextmanager
    def kept(self) -> Iterator[None]:
        thread = threading.Thread(target=self._beat, name="owner", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._done.set()
            thread.join()
            for remove in (self._path.unlink, self.folder.rmdir):  # the second by the last one
                with suppress(OSError):
                    remove()

    def _beat(self) -> None:
        while True:
            try:
                if not self._is_there:
                    self._join()
                else:
                    os.utime(self._path)
            except OSError as error:  # a disk that fails ends the writing that it breaks
                if error.errno in IS_GONE and not self._done.wait(1) and not self._path.exists():
                    found = f"{self._path} is gone: another process has taken {self.folder.parent}"
                    end_process(f"{found}; this one ends")
            if self._done.wait(BEAT_SECONDS):
                return


class _Others:
    """Who is in the way, as seen since this began to look."""

    def __init__(self, folder: Path, patience_seconds: float) -> None:
        self._folder = folder
        self._deadline = time.monotonic() + patience_seconds
        self._seen: dict[str, tuple[int, float]] = {}  # file -> its time, and when that was seen
        self._ending: set[str] = set()  # groups of which a process is dead
        self._is_told = False

    def look(self, ours: str) -> list[str]:
        """Remove what is dead; returns the files that are left. Raises OwnedError for one that
        lives and whose name does not begin with `ours`, when it has been waited for.
        """
        left: list[str] = []
        living: list[tuple[str, Process | None]] = []
        unknown: list[tuple[str, Process | None]] = []
        for name in self._names():
            process, is_dead = self._look_at(name)
            if is_dead:
                (self._folder / name).unlink(missing_ok=True)
                self._ending.add(_group_of(name))
                continue
            left.append(name)
            if not name.startswith(ours):
                (unknown if is_dead is None else living).append((name, process))
        for name, process in living:
            grace = ENDING_SECONDS if _group_of(name) in self._ending else 0
            if time.monotonic() > self._deadline + grace:
                raise OwnedError(self._in_use_by(process))
        if unknown and not living and not self._is_told:
            self._is_told = True
            what = f"{self._folder.parent} was in use by {unknown[0][1] or 'another process'}"
            print(f"{what}; is it still alive? (up to {LEASE_SECONDS:.0f} s)", flush=True)
        return left

    def _names(self) -> list[str]:
        try:
            return sorted(os.listdir(self._folder))
        except OSError as error:
            if error.errno not in IS_GONE:
                raise
            return []

    def _look_at(self, name: str) -> tuple[Process | None, bool | None]:
        """Who it is, and whether it is dead; None while that is unknown."""
        path, process = self._folder / name, None
        try:
            with open(path) as file:  # opened, so that a network disk asks its server
                changed = os.fstat(file.fileno()).st_mtime_ns
                process = Process(**json.loads(file.read()))
        except FileNotFoundError:
            return None, True
        except (ValueError, TypeError):  # damaged, or just being written
            pass
        is_dead = process.is_dead() if process else None
        if is_dead is None:
            last, since = self._seen.setdefault(name, (changed, time.monotonic()))
            if last != changed:
                is_dead = False
            elif time.monotonic() - since > LEASE_SECONDS:
                is_dead = True
        return process, is_dead

    def _in_use_by(self, process: Process | None) -> str:
        who = process or "another process"
        how = f"`kill {process.pid}` on {process.host}" if process else "end it"
        return (
            f"{self._folder.parent} is in use by {who}; wait for it, or end it: {how}. When you "
            f"are sure that it is gone, remove {self._folder} and start again"
        )


def _group_of(name: str) -> str:
    return name.partition(".")[0]
