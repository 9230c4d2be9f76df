"""Heartbeats decide who is lost: in processes of their own, because a stall ends the process."""

import subprocess
import sys
import time
from pathlib import Path

from beingvl.train.phases import BETWEEN_STEPS, PHASES, STEP_PHASES, Phases

TIMEOUT_SECONDS = 2
TWO_RANKS = """
import sys, time
from pathlib import Path
from beingvl.train.phases import Phases
folder, timeout = Path(sys.argv[1]), float(sys.argv[2])
with Phases(folder, 0, 2, timeout) as waiting, Phases(folder, 1, 2, timeout) as working:
    waiting.enter(7, "save")
    working.enter(7, "validation")
    for batch in range(8):  # twice the timeout, no batch of it longer than a quarter
        time.sleep(timeout / 4)
        working.advance()
    print("still waiting", flush=True)
    time.sleep(60)
"""
ONE_OF_TWO = """
import sys, time
from pathlib import Path
from beingvl.train.phases import Phases
with Phases(Path(sys.argv[1]), 0, 2, float(sys.argv[2])):
    time.sleep(60)
"""


def run_code(code: str, folder: Path) -> tuple[subprocess.CompletedProcess, float]:
    started = time.monotonic()
    command = [sys.executable, "-c", code, str(folder), str(TIMEOUT_SECONDS)]
    return subprocess.run(command, capture_output=True, text=True, timeout=50), time.monotonic() - started


def test_a_rank_that_works_is_waited_for_and_one_that_stands_still_is_named(tmp_path) -> None:
    done, seconds = run_code(TWO_RANKS, tmp_path)
    assert done.returncode == 1 and done.stdout == "still waiting\n", done.stderr
    assert f"no progress for {TIMEOUT_SECONDS} s: rank 1 (process " in done.stderr
    assert "stands still in step 7, phase validation" in done.stderr and "rank 0 (process" not in done.stderr
    assert 3 * TIMEOUT_SECONDS < seconds < 3 * TIMEOUT_SECONDS + 8


def test_a_rank_that_never_came_is_named(tmp_path) -> None:
    done, seconds = run_code(ONE_OF_TWO, tmp_path)
    assert done.returncode == 1 and "no progress for 2 s: rank 1 has not started" in done.stderr, done.stderr
    assert seconds < TIMEOUT_SECONDS + 8


def test_every_phase_is_one_of_a_step_or_between_steps_and_its_seconds_stay_until_they_are_taken(tmp_path) -> None:
    assert sorted(PHASES) == sorted((*STEP_PHASES, *BETWEEN_STEPS))
    phases = Phases(tmp_path, 0, 1, 60)
    for phase in ("data", "save"):
        phases.enter(1, phase)
        time.sleep(0.02)
    assert list(phases.take_seconds(STEP_PHASES)) == ["data"]
    first = phases.take_seconds(BETWEEN_STEPS)
    assert list(first) == ["start", "save"] and first["save"] >= 0.02
    assert list(phases.take_seconds(STEP_PHASES)) == []
