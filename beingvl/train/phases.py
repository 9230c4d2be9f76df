"""What this rank is doing: seconds per phase for the metrics, and a heartbeat that shows the other
ranks who has stalled.

    loop              phases.enter(step, "forward")    two assignments and a clock
    engine, writer    phases.advance()                 one of many parts of a phase is done: a
                                                       parameter, a batch, a slice
    every rank        OUTPUT/ranks/rank-00001.json     a thread rewrites it every few seconds: a
                                                       counter, and the seconds since this rank
                                                       last advanced; a rank that ends cleanly
                                                       removes it

A rank that has not advanced for half the timeout starts reading all files. When the full timeout
has passed, it decides:

    a counter did not move for half of it    that rank is dead or stopped
    no rank has advanced for the timeout     the rank furthest behind has stalled
    otherwise some rank still works          keep waiting, however long

So the timeout must cover the longest part, not the longest phase. All ranks enter the same phases
in the same order, so the number of phases entered shows who is behind. Files work even when rank 0,
which hosts torch's store, is the one that died, or when a rank never started. What an earlier run
left in the folder does not count.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import socket
import sys
import threading
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from beingvl.artefact.processes import end_process
from beingvl.artefact.progress import LOG_SECONDS

RANKS, REPLAY_RANKS = "ranks", "replay-ranks"
STEP_PHASES = ("data", "communication", "forward", "backward", "optimizer", "check", "log")
BETWEEN_STEPS = ("start", "validation", "save")
LONGEST_BEAT_SECONDS = 5.0
NO_BEAT = {
    "step": 0,
    "phase": "start",
    "num_entered": -1,  # behind every rank that has started
    "beat": 0,
    "idle_seconds": math.inf,
    "run": "",
}


class Phases:
    """This rank's phase and times. As a context manager, it also runs the watching thread."""

    def __init__(
        self,
        output: Path,
        rank: int,
        num_ranks: int,
        stall_timeout_seconds: float,
        folder: str = RANKS,
        run: str = "",
    ) -> None:
        """`run`: a name that only this run's ranks have; other runs' heartbeats are ignored."""
        self._seconds: dict[str, float] = {}
        self.folder, self._rank, self._num_ranks = output / folder, rank, num_ranks
        self.stall_timeout_seconds, self._run = stall_timeout_seconds, run
        self._beat_seconds = min(LONGEST_BEAT_SECONDS, stall_timeout_seconds / 10)
        self._place: tuple[int, str] = (0, "start")
        self._since = self._advanced_at = time.perf_counter()
        self._step_began = self._said_at = self._since
        self._last_step_seconds = 0.0
        self._num_beats = self._num_entered = 0
        self._left_over: dict[int, str] = {}  # rank -> heartbeat left by an earlier run
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="phases", daemon=True)

    def enter(self, step: int, phase: str) -> None:
        """Enter a phase; the time until now counts for the previous one."""
        self._count_time()
        if step != self._place[0]:
            if self._place[0]:
                self._last_step_seconds = self._since - self._step_began
            self._step_began = self._said_at = self._since
        self._place, self._advanced_at = (step, phase), self._since
        self._num_entered += 1

    def advance(self) -> None:
        """A part of the phase is done, so this rank has not stalled. Any thread may call this."""
        self._advanced_at = time.perf_counter()

    def allow(self, seconds: float) -> None:
        """The next part may take `seconds` longer before it counts as a stall."""
        self._advanced_at = time.perf_counter() + seconds

    def take_seconds(self, phases: Collection[str]) -> dict[str, float]:
        """Seconds spent in each of `phases` since it was last taken."""
        self._count_time()
        return {phase: self._seconds.pop(phase) for phase in phases if phase in self._seconds}

    def _count_time(self) -> None:
        now, name = time.perf_counter(), self._place[1]
        self._seconds[name] = self._seconds.get(name, 0.0) + now - self._since
        self._since = now

    def __enter__(self) -> Phases:
        self.folder.mkdir(parents=True, exist_ok=True)
        if self._rank == 0:
            self._remove_ranks_from(self._num_ranks)
        for rank in range(self._num_ranks):
            with contextlib.suppress(OSError):
                self._left_over[rank] = self._path_of(rank).read_text()
        self._beat()
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        self._done.set()
        self._thread.join()
        if kind is None:  # after an error, others may need to know where this rank was
            with contextlib.suppress(OSError):
                self._path_of(self._rank).unlink()
                self.folder.rmdir()  # succeeds for the last rank, if all end cleanly

    def where(self) -> str:
        step, phase = self._place
        return f"rank {self._rank}, step {step}, phase {phase}"

    def find_lost_ranks(self) -> str:
        """Who has stalled, for a rank whose collective failed; takes a few heartbeats."""
        before = self._read()
        time.sleep(3 * self._beat_seconds)
        after = self._read()
        silent = [rank for rank, beat in after.items() if beat["beat"] == before[rank]["beat"]]
        return _describe({self._rank: self._heartbeat(), **after}, silent)

    def _watch(self) -> None:
        seen: dict[int, tuple[int, float]] = {}  # rank -> its counter, and when that was first seen
        timeout = self.stall_timeout_seconds
        while not self._done.wait(self._beat_seconds):
            own = self._beat()
            self._say_long_step()
            now = time.perf_counter()
            if self._num_ranks == 1 or own["idle_seconds"] < timeout / 2:
                seen.clear()
                continue
            others = self._read()
            for rank, beat in others.items():
                if rank not in seen or seen[rank][0] != beat["beat"]:
                    seen[rank] = beat["beat"], now
            silent = [rank for rank, (_, since) in seen.items() if now - since > timeout / 2]
            is_stall = all(beat["idle_seconds"] > timeout for beat in others.values())
            if own["idle_seconds"] > timeout and (silent or is_stall):
                lost = _describe({self._rank: own, **others}, silent)
                found = f"{self.where()}: no progress for {timeout:g} s: {lost}"
                # the main thread hangs in a collective that no exception reaches
                end_process(found)

    def _say_long_step(self) -> None:
        """Without a terminal, a line every half minute of a step that takes longer. Validation has
        its own.
        """
        now, (step, phase) = time.perf_counter(), self._place
        if self._rank or sys.stderr.isatty() or phase == "validation":
            return
        if now - self._said_at < LOG_SECONDS:
            return
        self._said_at = now
        line = f"step {step}: phase {phase}, {now - self._step_began:.0f} s so far"
        if self._last_step_seconds:
            line += f"; the step before took {self._last_step_seconds:.0f} s"
        print(line, file=sys.stderr, flush=True)

    def _heartbeat(self) -> dict[str, Any]:
        step, phase = self._place
        return {
            "step": step,
            "phase": phase,
            "num_entered": self._num_entered,
            "beat": self._num_beats,
            "idle_seconds": time.perf_counter() - self._advanced_at,
            "process": os.getpid(),
            "host": socket.gethostname(),
            "run": self._run,
        }

    def _beat(self) -> dict[str, Any]:
        """Write this rank's heartbeat and return it. Not flushed to disk: it only matters now."""
        self._num_beats += 1
        beat = self._heartbeat()
        path = self._path_of(self._rank)
        # a fixed name, so that killed ranks do not pile up files
        temporary = path.with_suffix(".tmp")
        try:
            temporary.write_text(json.dumps(beat))
            os.replace(temporary, path)
        except OSError as error:  # a full disk must not end the run here; a failing save does
            found = f"{self.where()}: the heartbeat could not be written ({error})"
            print(found, file=sys.stderr, flush=True)
        return beat

    def _read(self) -> dict[int, dict[str, Any]]:
        """Other ranks -> their last heartbeat since this rank started, or `NO_BEAT`."""
        beats: dict[int, dict[str, Any]] = {}
        for rank in range(self._num_ranks):
            if rank == self._rank:
                continue
            try:
                text = self._path_of(rank).read_text()
                beat = {**NO_BEAT, **json.loads(text)}
                is_ours = text != self._left_over.get(rank) and beat["run"] == self._run
                beats[rank] = beat if is_ours else NO_BEAT
            except (OSError, ValueError):  # a network disk may lose a file that is being replaced
                beats[rank] = NO_BEAT
        return beats

    def _remove_ranks_from(self, first: int) -> None:
        """Remove files of an earlier run with more ranks; no rank of this run writes them."""
        for path in self.folder.glob("rank-*"):
            number = path.stem.removeprefix("rank-")
            if number.isdigit() and int(number) >= first:
                path.unlink(missing_ok=True)

    def _path_of(self, rank: int) -> Path:
        return self.folder / f"rank-{rank:05d}.json"


def _describe(beats: Mapping[int, Mapping[str, Any]], silent: Sequence[int]) -> str:
    """Who has stalled: the silent ranks, or if there are none, those furthest behind."""
    last = min(beat["num_entered"] for beat in beats.values())
    behind = [rank for rank, beat in sorted(beats.items()) if beat["num_entered"] == last]
    what = "gives no sign of life; it was last seen in" if silent else "has stalled in"
    found = []
    for rank in silent or behind:
        beat = beats[rank]
        if beat["beat"]:
            place = f"rank {rank} (process {beat['process']} on {beat['host']})"
            found.append(f"{place} {what} step {beat['step']}, phase {beat['phase']}")
        else:
            found.append(f"rank {rank} has not started")
    return "; ".join(found)
