"""Ownership of an output folder while it is written: one owner at a time, also on network disks.

    OUTPUT/.owner.tmp/GROUP.MEMBER.json    one file per process of the owner: who, where, since
                                           when; its modification time is renewed every few seconds

    owned     take the folder, or say who has it; several processes can be one owner, a group
    wait_for_owner, shared    for the owner's other processes, before and after they know its group
    making    `owned`, unless the requested output is already finished
    making_alone  the same, for a folder that holds nothing else
    in_turn   be alone for a moment, while others wait

We use no file locks, because not every disk has them. Instead, a folder with a file in it is
renamed to `.owner.tmp`. The rename succeeds only if there is no such folder, or an empty one; so
exactly one process wins, and its folder never appears without its file. Whoever finds a dead owner
removes that owner's files, which have unique names, and renames its own folder over the empty one.
Files are removed only if their process was found dead:

    on the machine that it ran on      no process has its id and its start time
    elsewhere                          its modification time did not change for LEASE_SECONDS

An owner that was suspended that long finds its file gone when it wakes up, and ends.
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
from beingvl.artefact.manifest import already_made, is_complete, refuse_other_kind, start_folder
from beingvl.artefact.processes import Process, end_process, this_process
from beingvl.errors import InputError

OWNER, TURN = ".owner.tmp", ".turn.tmp"
UNFINISHED_FILE = ".unfinished.tmp"  # the suffix keeps it out of the manifest
BEAT_SECONDS = 5.0
LEASE_SECONDS = 90.0  # network disks may show stale content for up to 60 s
PATIENCE_SECONDS = 5.0  # a process that was just killed may still be ending
ENDING_SECONDS = 30.0  # the same, if some of the owner's processes have already ended
POLL_SECONDS = 0.05
IS_TAKEN = (errno.ENOTEMPTY, errno.EEXIST)
IS_GONE = (errno.ENOENT, errno.ESTALE)


class OwnedError(InputError):
    """Another process is writing to the folder."""


@contextmanager
def owned(
    output: Path, group: str | None = None, name: str = OWNER, waits: bool = False
) -> Iterator[str]:
    """Own `output` in this block; yields the group. Processes with the same `group` own it
    together; without a group, this process owns it alone.

    If the folder is new and stays empty, it is removed again. Raises OwnedError, naming the owner,
    if there is still a different one after a few seconds, unless this process `waits`.
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
    """Return when a group whose name starts with `run` owns `output`, or when nobody has owned it
    for `patience_seconds`: the disk may show it late, or may not be the owner's. Raises OwnedError
    for a different owner.
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
    """Own `output` together with the process that made `group`, as soon as its files are visible
    here.
    """
    with _Share(output / OWNER, group).kept():
        yield


@contextmanager
def making(output: Path, kind: str, request: Mapping[str, Any], overwrite: bool) -> Iterator[bool]:
    """Own `output` and yield True, or yield False if `request` is finished (see `already_made`)."""
    if already_made(output, kind, request, overwrite):
        yield False
        return
    with owned(output):
        # Another process may have finished it just now.
        yield not already_made(output, kind, request, overwrite)


@contextmanager
def making_alone(
    output: Path, kind: str, request: Mapping[str, Any], overwrite: bool
) -> Iterator[bool]:
    """`making`, for a folder that holds nothing else: when it yields True, the files of a previous
    manifest are gone, and a run that is killed in this block can start over.
    """
    with making(output, kind, request, overwrite) as is_new:
        if is_new:
            refuse_files_of_others(output)
            start_alone(output, kind)
        yield is_new
        if is_new:
            (output / UNFINISHED_FILE).unlink()


def start_alone(folder: Path, kind: str) -> None:
    """`start_folder`, and `UNFINISHED_FILE` before the first deletion: a run that is killed in
    between is recognised. Raises InputError, before anything is changed, for a different kind.
    """
    if is_complete(folder):
        refuse_other_kind(folder, kind)
    make_folder(folder)
    (folder / UNFINISHED_FILE).touch()
    start_folder(folder, kind)


def refuse_files_of_others(folder: Path) -> None:
    """Raises InputError if `folder` has files and is neither finished nor unfinished work of ours,
    which has `UNFINISHED_FILE`.
    """
    if not folder.is_dir() or is_complete(folder) or (folder / UNFINISHED_FILE).is_file():
        return
    if any(not path.name.endswith(".tmp") for path in folder.iterdir()):
        raise InputError(f"{folder} holds files that beingvl did not write; choose another folder")


@contextmanager
def in_turn(output: Path) -> Iterator[None]:
    """Own `output` alone for a moment; others wait for their turn."""
    with owned(output, name=TURN, waits=True):
        yield


class _Share:
    """This process's file in the owner's folder."""

    def __init__(self, folder: Path, group: str) -> None:
        self.folder, self.group = folder, group
        self._path = folder / f"{group}.{uuid.uuid4().hex}.json"
        self._text = to_json(asdict(this_process()))
        self._is_there = False
        self._done = threading.Event()

    def take(self, patience_seconds: float) -> None:
        """Raises OwnedError if a different owner is alive."""
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
        """Take a folder that nobody owns."""
        prepared = self.folder.with_name(f".{uuid.uuid4().hex}{self.folder.name}")
        prepared.mkdir(parents=True)
        try:
            (prepared / self._path.name).write_text(self._text)
            with suppress(OSError):  # not every disk can rename over an empty folder
                self.folder.rmdir()
            os.rename(prepared, self.folder)
        except OSError as error:
            # sshfs has EPERM for everything
            if error.errno not in (*IS_TAKEN, *IS_GONE) and not self._is_taken():
                raise
        finally:
            shutil.rmtree(prepared, ignore_errors=True)
        # NFS may rename, lose the answer, and then report that the second attempt failed.
        self._is_there = self._path.exists()

    def _is_taken(self) -> bool:
        with suppress(OSError):
            return any(self.folder.iterdir())
        return False

    def _join(self) -> None:
        """Add our file to the group's, unless there are none, or there is a different owner's."""
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
            for remove in (self._path.unlink, self.folder.rmdir):  # the last process removes it
                with suppress(OSError):
                    remove()

    def _beat(self) -> None:
        while True:
            try:
                if not self._is_there:
                    self._join()
                else:
                    os.utime(self._path)
            except OSError as error:  # other disk failures are left to the code that writes
                if error.errno in IS_GONE and not self._done.wait(1) and not self._path.exists():
                    found = f"{self._path} is gone: another process has taken {self.folder.parent}"
                    end_process(f"{found}; this one ends")
            if self._done.wait(BEAT_SECONDS):
                return


class _Others:
    """Other owners of a folder, as observed since this object was made."""

    def __init__(self, folder: Path, patience_seconds: float) -> None:
        self._folder = folder
        self._deadline = time.monotonic() + patience_seconds
        # File -> its modification time, and when we first saw that.
        self._seen: dict[str, tuple[int, float]] = {}
        self._ending: set[str] = set()  # groups that have a dead process
        self._is_told = False

    def look(self, ours: str) -> list[str]:
        """Remove the files of dead processes; returns the others. Raises OwnedError, after waiting,
        for a file of a living process if its name does not start with `ours`.
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
        """The process, and whether it is dead; None while that is unknown."""
        path, process = self._folder / name, None
        try:
            with open(path) as file:  # opening makes a network disk ask its server
                changed = os.fstat(file.fileno()).st_mtime_ns
                process = Process(**json.loads(file.read()))
        except FileNotFoundError:
            return None, True
        except (ValueError, TypeError):  # damaged, or being written right now
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
