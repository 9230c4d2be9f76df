"""What this rank is doing: seconds per phase for the metrics, and a heartbeat by which the others find out who stands still.

    loop              phases.enter(step, "forward")            two assignments and a clock
    every rank        OUTPUT/ranks/rank-00001.json             rewritten every few seconds by a thread, with a counter
    a rank in a collective that fails or takes too long
                      reads all files twice                    no new heartbeat: that rank is dead or stopped
                                                               all alive:        the one furthest behind stands still

A file system tells this even when rank 0, which hosts torch's store, is the one that died.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

from beingvl.manifest import write_atomically

RANKS = "ranks"
# In the order of a step; a rank in an earlier phase of the same step is further behind.
PHASES = ("start", "data", "communication", "forward", "backward", "optimizer", "check", "log", "validation", "save")
LONGEST_BEAT_SECONDS = 5.0


class Phases:
    """This rank's position and times. With `stall_timeout_seconds` a thread watches, as a context manager."""

    def __init__(self, output: Path, rank: int, num_ranks: int, stall_timeout_seconds: float) -> None:
        self.seconds: dict[str, float] = {}
        self._folder, self._rank, self._num_ranks = output / RANKS, rank, num_ranks
        self._timeout = stall_timeout_seconds
        self._beat_seconds = min(LONGEST_BEAT_SECONDS, stall_timeout_seconds / 10)
        self._place: tuple[int, str] = (0, "start")
        self._since = time.perf_counter()
        self._num_beats = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="phases", daemon=True)

    def enter(self, step: int, phase: str) -> None:
        """From now on this rank is in `phase` of `step`; the time until now belongs to the phase before."""
        now = time.perf_counter()
        name = self._place[1]
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._since
        self._place, self._since = (step, phase), now

    def take_seconds(self) -> dict[str, float]:
        """Seconds per phase since the last call."""
        self.enter(*self._place)
        taken, self.seconds = self.seconds, {}
        return taken

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
        """One sentence about who stands still; takes a few heartbeats."""
        self._beat()
        before = self._read()
        time.sleep(3 * self._beat_seconds)
        after = self._read()
        silent = [rank for rank in after if rank != self._rank and after[rank]["beat"] == before.get(rank, {}).get("beat")]
        behind = [rank for rank in after if _position(after[rank]) == min(map(_position, after.values()))]
        what = "gives no sign of life any more; it was last seen in" if silent else "stands still in"
        return "; ".join(
            f"rank {rank} (process {after[rank]['process']} on {after[rank]['host']}) {what} step {after[rank]['step']}, "
            f"phase {after[rank]['phase']}"
            for rank in silent or behind
        )

    def _watch(self) -> None:
        while not self._done.wait(self._beat_seconds):
            self._beat()
            if self._num_ranks > 1 and time.perf_counter() - self._since > self._timeout:
                print(
                    f"{self.where()}: no progress for {self._timeout:g} s: {self.find_lost_ranks()}", file=sys.stderr, flush=True
                )
                os._exit(1)  # the main thread hangs in a collective that no exception reaches

    def _beat(self) -> None:
        self._num_beats += 1
        step, phase = self._place
        beat = {"step": step, "phase": phase, "beat": self._num_beats, "process": os.getpid(), "host": socket.gethostname()}
        try:
            write_atomically(self._folder / f"rank-{self._rank:05d}.json", json.dumps(beat))
        except OSError as error:  # a full disk is reported by the save that it breaks, not by a heartbeat
            print(f"{self.where()}: the heartbeat could not be written ({error})", file=sys.stderr, flush=True)

    def _read(self) -> dict[int, dict[str, Any]]:
        paths = [self._folder / f"rank-{rank:05d}.json" for rank in range(self._num_ranks)]
        return {rank: json.loads(path.read_text()) for rank, path in enumerate(paths) if path.is_file()}


def _position(beat: dict[str, Any]) -> tuple[int, int]:
    return beat["step"], PHASES.index(beat["phase"])
