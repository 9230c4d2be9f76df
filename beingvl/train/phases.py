"""What this rank is doing: seconds per phase for the metrics, and a heartbeat by which the others find out who stands still.

    loop              phases.enter(step, "forward")            two assignments and a clock
    engine, writer    phases.advance()                         one of many parts of a phase is done: a parameter, a batch, a slice
    every rank        OUTPUT/ranks/rank-00001.json             rewritten every few seconds by a thread: a counter, and how long
                                                               this rank has not advanced
    a rank that has not advanced for half the timeout reads all files from then on, and after the whole of it
                      a counter stood still for half of it:    that rank is dead or stopped
                      nobody has advanced for the timeout:     the one furthest behind stands still
                      else somebody works, however long:       go on waiting

So the timeout covers the longest part, not the longest phase. A file system tells this even when rank 0, which hosts torch's
store, is the one that died, or when a rank never came.
"""

from __future__ import annotations

import json
import math
import os
import socket
import sys
import threading
import time
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from beingvl.manifest import write_atomically

RANKS = "ranks"
# In the order of a step; a rank in an earlier phase of the same step is further behind.
PHASES = ("start", "data", "communication", "forward", "backward", "optimizer", "check", "log", "validation", "save")
STEP_PHASES = ("data", "communication", "forward", "backward", "optimizer", "check", "log")
BETWEEN_STEPS = ("start", "validation", "save")
LONGEST_BEAT_SECONDS = 5.0
NO_BEAT = {"step": 0, "phase": "start", "beat": 0, "idle_seconds": math.inf}


class Phases:
    """This rank's position and times. With `stall_timeout_seconds` a thread watches, as a context manager."""

    def __init__(self, output: Path, rank: int, num_ranks: int, stall_timeout_seconds: float) -> None:
        self._seconds: dict[str, float] = {}
        self._folder, self._rank, self._num_ranks = output / RANKS, rank, num_ranks
        self._timeout = stall_timeout_seconds
        self._beat_seconds = min(LONGEST_BEAT_SECONDS, stall_timeout_seconds / 10)
        self._place: tuple[int, str] = (0, "start")
        self._since = self._advanced_at = time.perf_counter()
        self._num_beats = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="phases", daemon=True)

    def enter(self, step: int, phase: str) -> None:
        """From now on this rank is in `phase` of `step`; the time until now belongs to the phase before."""
        now = time.perf_counter()
        name = self._place[1]
        self._seconds[name] = self._seconds.get(name, 0.0) + now - self._since
        self._place, self._since, self._advanced_at = (step, phase), now, now

    def advance(self) -> None:
        """One of the parts that make up the phase is done: this rank is not stalled. Any thread may call."""
        self._advanced_at = time.perf_counter()

    def take_seconds(self, phases: Collection[str]) -> dict[str, float]:
        """Seconds of each of `phases` since it was last taken."""
        self.enter(*self._place)
        return {phase: self._seconds.pop(phase) for phase in phases if phase in self._seconds}

    def __enter__(self) -> Phases:
        self._folder.mkdir(parents=True, exist_ok=True)
        self._beat()
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self._thread.join()

    def where(self) -> str:
        step, phase = self._place
        return f"rank {self._rank}, step {step}, phase {phase}"

    def find_lost_ranks(self) -> str:
        """One sentence about who stands still, for a rank whose collective failed; takes a few heartbeats."""
        before = self._read()
        time.sleep(3 * self._beat_seconds)
        after = self._read()
        silent = [rank for rank, beat in enumerate(after) if rank != self._rank and beat["beat"] == before[rank]["beat"]]
        return _describe(after, silent)

    def _watch(self) -> None:
        seen: dict[int, tuple[int, float]] = {}  # rank -> its counter, and when that was first seen
        while not self._done.wait(self._beat_seconds):
            self._beat()
            now = time.perf_counter()
            idle_seconds = now - self._advanced_at
            if self._num_ranks == 1 or idle_seconds < self._timeout / 2:
                seen.clear()
                continue
            beats = self._read()
            for rank, beat in enumerate(beats):
                if rank not in seen or seen[rank][0] != beat["beat"]:
                    seen[rank] = beat["beat"], now
            silent = [rank for rank, (_, since) in seen.items() if now - since > self._timeout / 2]
            is_stall = all(beat["idle_seconds"] > self._timeout for beat in beats)
            if idle_seconds > self._timeout and (silent or is_stall):
                lost = _describe(beats, silent)
                print(f"{self.where()}: no progress for {self._timeout:g} s: {lost}", file=sys.stderr, flush=True)
                os._exit(1)  # the main thread hangs in a collective that no exception reaches

    def _beat(self) -> None:
        self._num_beats += 1
        step, phase = self._place
        idle_seconds = time.perf_counter() - self._advanced_at
        beat = {"step": step, "phase": phase, "beat": self._num_beats, "idle_seconds": idle_seconds}
        try:
            place = {"process": os.getpid(), "host": socket.gethostname()}
            write_atomically(self._folder / f"rank-{self._rank:05d}.json", json.dumps({**beat, **place}))
        except OSError as error:  # a full disk is reported by the save that it breaks, not by a heartbeat
            print(f"{self.where()}: the heartbeat could not be written ({error})", file=sys.stderr, flush=True)

    def _read(self) -> list[dict[str, Any]]:
        """The last heartbeat of every rank; `NO_BEAT` for one that has written none."""
        beats: list[dict[str, Any]] = []
        for rank in range(self._num_ranks):
            try:
                beats.append({**NO_BEAT, **json.loads((self._folder / f"rank-{rank:05d}.json").read_text())})
            except (OSError, ValueError):  # a network disk may lose a file that is being replaced
                beats.append(NO_BEAT)
        return beats


def _describe(beats: Sequence[dict[str, Any]], silent: Sequence[int]) -> str:
    """Who stands still: the silent ranks, or without any those furthest behind."""
    furthest_behind = min(map(_position, beats))
    behind = [rank for rank, beat in enumerate(beats) if _position(beat) == furthest_behind]
    what = "gives no sign of life any more; it was last seen in" if silent else "stands still in"
    return "; ".join(
        f"rank {rank} (process {beats[rank]['process']} on {beats[rank]['host']}) {what} step {beats[rank]['step']}, "
        f"phase {beats[rank]['phase']}"
        if beats[rank]["beat"]
        else f"rank {rank} has not started"
        for rank in silent or behind
    )


def _position(beat: dict[str, Any]) -> tuple[int, int]:
    return beat["step"], PHASES.index(beat["phase"])
