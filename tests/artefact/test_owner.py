"""Whose a folder is: one owner at a time, whatever dies, and on disks of other machines."""

import errno
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from beingvl.artefact import owner as owners
from beingvl.artefact.owner import OWNER, OwnedError, in_turn, owned, shared
from beingvl.artefact.processes import Process, this_process


@pytest.fixture(autouse=True)
def _impatient(monkeypatch) -> None:
    monkeypatch.setattr(owners, "PATIENCE_SECONDS", 0.5)


HOLD = str(Path(__file__).with_name("hold_folder.py"))
ELSEWHERE = replace(this_process(), host="worker-2", machine="worker-2/boot/1")


def hold(output: Path, *group: str) -> subprocess.Popen:
    """Another process that owns `output` until it is killed, or says why not."""
    process = subprocess.Popen(
        [sys.executable, HOLD, str(output), *group],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    return process


def first_line(process: subprocess.Popen) -> str:
    assert process.stdout
    return process.stdout.readline()


def leave(output: Path, process: Process, group: str = "other") -> Path:
    """The file of an owner that is not here."""
    (output / OWNER).mkdir(parents=True)
    path = output / OWNER / f"{group}.1.json"
    path.write_text(json.dumps(asdict(process)))
    return path


def test_of_many_starts_one_wins_and_the_others_name_it(tmp_path) -> None:
    started = [hold(tmp_path / "out") for _ in range(4)]
    lines = {process: first_line(process) for process in started}
    (winner,) = [process for process, line in lines.items() if line == "owned\n"]
    for process, line in lines.items():
        if process is not winner:
            assert f"is in use by process {winner.pid} on " in line, line
            assert "hold_folder.py" in line and "since 20" in line and "`kill " in line, line
            assert f"remove {tmp_path / 'out' / OWNER}" in line, line
            assert process.wait() == 2
    winner.kill()


def test_a_killed_owner_is_replaced_at_once(tmp_path) -> None:
    first = hold(tmp_path)
    assert first_line(first) == "owned\n"
    first.kill()  # a zombie until it is waited for
    started = time.monotonic()
    with owned(tmp_path):
        assert time.monotonic() - started < owners.LEASE_SECONDS / 2
        assert len(os.listdir(tmp_path / OWNER)) == 1
    first.wait()
    assert not os.listdir(tmp_path)


def test_a_process_id_that_was_given_out_again_is_not_the_owner(tmp_path) -> None:
    leave(tmp_path, replace(this_process(), started=this_process().started - 1))
    with owned(tmp_path):
        pass


def test_one_owner_may_be_several_processes_and_the_last_ends_it(tmp_path) -> None:
    first = hold(tmp_path, "group")
    assert first_line(first) == "owned\n"
    with owned(tmp_path, "group"):
        other = hold(tmp_path, "another")
        assert "in use by process" in first_line(other) and other.wait() == 2
        first.kill()
        first.wait()
        assert (tmp_path / OWNER).exists()
        with owned(tmp_path, "group"):  # which removes what is dead
            assert len(os.listdir(tmp_path / OWNER)) == 2
    assert not os.listdir(tmp_path)


def test_an_owner_elsewhere_is_alive_while_its_time_changes(tmp_path, monkeypatch) -> None:
    path, seconds = leave(tmp_path, ELSEWHERE), iter(range(10**9))
    sleep = time.sleep

    def pass_time(_: float) -> None:
        os.utime(path, (next(seconds), 0))
        sleep(0.001)

    monkeypatch.setattr(owners.time, "sleep", pass_time)
    with pytest.raises(OwnedError, match="on worker-2"), owned(tmp_path):
        pass
    assert path.exists()


def test_an_owner_elsewhere_is_dead_when_its_time_stands_still(
    tmp_path, monkeypatch, capsys
) -> None:
    path = leave(tmp_path, ELSEWHERE)
    monkeypatch.setattr(owners, "LEASE_SECONDS", 0.5)
    started = time.monotonic()
    with owned(tmp_path):
        assert time.monotonic() - started >= 0.5 and not path.exists()
    assert "was in use by process" in capsys.readouterr().out


def test_a_damaged_file_of_an_owner_counts_as_one_that_may_live(tmp_path, monkeypatch) -> None:
    leave(tmp_path, ELSEWHERE).write_text("{")
    monkeypatch.setattr(owners, "LEASE_SECONDS", 0.3)
    started = time.monotonic()
    with owned(tmp_path):
        assert time.monotonic() - started >= 0.3


def test_an_owner_that_slept_too_long_ends_when_it_wakes(tmp_path) -> None:
    first = hold(tmp_path)
    assert first_line(first) == "owned\n"
    (path,) = (tmp_path / OWNER).iterdir()
    path.unlink()  # as who finds it dead does
    with owned(tmp_path):
        assert first.wait(timeout=60) == 1
        assert "another process has taken" in first_line(first)


def test_others_of_an_owner_join_it_as_soon_as_they_see_it(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(owners, "BEAT_SECONDS", 0.01)
    with shared(tmp_path, "group"):
        time.sleep(0.1)
        assert not os.listdir(tmp_path)
        with owned(tmp_path, "group"):
            while len(os.listdir(tmp_path / OWNER)) < 2:
                time.sleep(0.01)
        assert len(os.listdir(tmp_path / OWNER)) == 1
    assert not os.listdir(tmp_path)


def test_turns_are_waited_for(tmp_path) -> None:
    order = []
    with in_turn(tmp_path):
        waiting = subprocess.Popen([sys.executable, HOLD, str(tmp_path), "--turn"])
        time.sleep(0.5)
        order.append(waiting.poll())
    assert order == [None] and waiting.wait(timeout=60) == 0


def test_a_disk_that_renames_to_no_folder_that_is_there_will_do(tmp_path, monkeypatch) -> None:
    """As sshfs; and one that does the rename and then loses the answer, as NFS may."""
    (tmp_path / OWNER).mkdir()
    rename = os.rename

    def strict(source: Path, target: Path) -> None:
        if Path(target).exists():
            raise OSError(errno.EEXIST, "File exists")
        rename(source, target)
        raise OSError(errno.ENOENT, "No such file or directory")

    monkeypatch.setattr(os, "rename", strict)
    with owned(tmp_path):
        assert len(os.listdir(tmp_path / OWNER)) == 1


def test_a_folder_that_was_made_for_nothing_goes_again(tmp_path) -> None:
    with owned(tmp_path / "new"):
        pass
    assert not (tmp_path / "new").exists()
