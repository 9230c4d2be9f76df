"""Heartbeats decide who is lost: in processes of their own, because a stall ends the process."""

import json
import re
import subprocess
import time
from pathlib import Path

import pytest

from beingvl.report.train import PHASES
from beingvl.train import phases as phases_module
from beingvl.train.phases import BETWEEN_STEPS, NO_BEAT, STEP_PHASES, Phases, _describe
from tests.train.programs import run_program

TIMEOUT_SECONDS = 2
BUSY_SECONDS = 60  # that a busy machine may take besides


def run_alone(name: str, folder: Path) -> tuple[subprocess.CompletedProcess, float]:
    started = time.monotonic()
    done = run_program(name, folder, TIMEOUT_SECONDS)
    return done, time.monotonic() - started


def test_a_rank_that_works_is_waited_for_and_one_that_stands_still_is_named(tmp_path) -> None:
    done, seconds = run_alone("two_ranks", tmp_path)
    assert done.returncode == 1 and done.stdout == "still waiting\n", done.stderr
    assert f"no progress for {TIMEOUT_SECONDS} s: rank 1 (process " in done.stderr
    assert (
        "has stalled in step 7, phase check" in done.stderr and "rank 0 (process" not in done.stderr
    )
    assert 3 * TIMEOUT_SECONDS < seconds < 3 * TIMEOUT_SECONDS + BUSY_SECONDS


@pytest.mark.parametrize("earlier_run", [False, True])
def test_a_rank_that_never_came_is_named_alone(tmp_path, earlier_run: bool) -> None:
    """Also when a heartbeat of an earlier run lies there, which says that the rank is at work in
    step 500.
    """
    (tmp_path / "ranks").mkdir()
    beat = {
        "step": 500,
        "phase": "forward",
        "num_entered": 9000,
        "beat": 321,
        "idle_seconds": 0.1,
        "process": 1,
        "host": "a",
    }
    if earlier_run:
        (tmp_path / "ranks" / "rank-00001.json").write_text(json.dumps(beat))
    done, seconds = run_alone("one_of_two_ranks", tmp_path)
    assert (
        done.returncode == 1 and "no progress for 2 s: rank 1 has not started\n" in done.stderr
    ), done.stderr
    assert seconds < TIMEOUT_SECONDS + BUSY_SECONDS


def test_ranks_that_have_not_started_are_behind_those_that_wait_for_them() -> None:
    waiting = {**NO_BEAT, "num_entered": 0, "beat": 9, "process": 1, "host": "a"}
    assert _describe({0: waiting, 1: NO_BEAT}, []) == "rank 1 has not started"


def test_what_killed_ranks_left_does_not_pile_up_and_ranks_that_end_in_order_leave_nothing(
    tmp_path,
) -> None:
    folder = tmp_path / "ranks"
    folder.mkdir()
    (folder / "rank-00000.tmp").write_text("truncated")
    with Phases(tmp_path, 0, 2, 60):
        assert [path.name for path in folder.iterdir()] == ["rank-00000.json"]
        with pytest.raises(KeyError), Phases(tmp_path, 1, 2, 60):
            raise KeyError
        assert sorted(path.name for path in folder.iterdir()) == [
            "rank-00000.json",
            "rank-00001.json",
        ]
    assert [path.name for path in folder.iterdir()] == [
        "rank-00001.json"
    ]  # where the one that failed was
    with Phases(tmp_path, 1, 2, 60):
        pass
    assert not folder.exists()


def test_ranks_of_an_earlier_larger_world_are_forgotten(tmp_path) -> None:
    folder = tmp_path / "ranks"
    folder.mkdir()
    for name in ("rank-00001.json", "rank-00002.json", "rank-00003.tmp", "notes.txt"):
        (folder / name).write_text("{}")
    with Phases(tmp_path, 1, 2, 60):
        assert (folder / "rank-00002.json").exists()  # rank 0 alone removes
    (folder / "rank-00001.json").write_text("{}")
    with Phases(tmp_path, 0, 2, 60):
        assert sorted(path.name for path in folder.iterdir()) == [
            "notes.txt",
            "rank-00000.json",
            "rank-00001.json",
        ]


def test_every_phase_is_one_of_a_step_or_between_steps_and_its_seconds_stay_until_they_are_taken(
    tmp_path,
) -> None:
    assert sorted(("start", *PHASES)) == sorted((*STEP_PHASES, *BETWEEN_STEPS))
    phases = Phases(tmp_path, 0, 1, 60)
    for phase in ("data", "save"):
        phases.enter(1, phase)
        time.sleep(0.02)
    assert list(phases.take_seconds(STEP_PHASES)) == ["data"]
    first = phases.take_seconds(BETWEEN_STEPS)
    assert list(first) == ["start", "save"] and first["save"] >= 0.02
    assert list(phases.take_seconds(STEP_PHASES)) == []


def test_a_long_step_says_where_it_is_now_and_then(tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(phases_module, "LOG_SECONDS", 0.3)
    with Phases(tmp_path, 0, 1, stall_timeout_seconds=1) as phases:
        for step in (7, 8):
            for phase in ("data", "forward", "backward", "optimizer", "validation"):
                phases.enter(step, phase)
                time.sleep(0.2)
    said = capsys.readouterr().err
    assert re.search(r"^step 7: phase \w+, [01] s so far$", said, re.M)
    assert re.search(r"^step 8: phase \w+, [01] s so far; the step before took 1 s$", said, re.M)
    assert "validation" not in said  # which has lines of its own
