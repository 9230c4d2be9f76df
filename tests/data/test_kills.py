"""Killed anywhere and started again with another number of ranks, a step writes the bytes of an
uninterrupted run.
"""

import contextlib
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass
from pathlib import Path

import pytest

from beingvl.artefact.manifest import is_complete, read_manifest, verify_folder
from beingvl.artefact.owner import TURN
from beingvl.artefact.parts import FOLDER, Parts
from beingvl.commands import main as cli
from beingvl.data import tokenize_dataset
from beingvl.data.llava_json import Survey, survey
from beingvl.data.tokenize_dataset import Tokenize
from tests.data.conftest import commands
from tests.programs import run_program

# ---- kills ----


JOINING = -1


@dataclass(frozen=True)
class Kill:
    """Where a kill hit: how many parts were finished, and what was being done."""

    parts: int
    doing: str


def kill_while_working(
    command: list[str], output: Path, new_parts: int, delay: float
) -> Kill | None:
    """Start the command and SIGKILL it `delay` seconds after it has finished `new_parts` parts
    or begun JOINING them.

    None when it had ended before: that is no kill.
    """
    turn = output / TURN
    before = len(finished_parts(output))
    process = subprocess.Popen(
        [sys.executable, "-m", "beingvl", *command],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    wait_for(process, turn.exists)  # taken first to begin, then to join
    if new_parts == JOINING:
        wait_for(process, lambda: not turn.exists())
        wait_for(process, turn.exists)
    else:
        wait_for(process, lambda: len(finished_parts(output)) >= before + new_parts)
    time.sleep(delay)
    process.kill()
    if process.wait() != -signal.SIGKILL:
        assert process.returncode == 0
        return None
    is_in_a_part = any(output.glob(f"*parts.tmp/.*.{process.pid}"))
    return Kill(
        len(finished_parts(output)),
        "writing a part" if is_in_a_part else "joining" if new_parts == JOINING else "between",
    )


def wait_for(process: subprocess.Popen, condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while process.poll() is None and not condition():
        assert time.monotonic() < deadline
        time.sleep(0.0005)


def finished_parts(output: Path) -> list[Path]:
    with contextlib.suppress(FileNotFoundError):  # it is being removed
        return list(output.glob("*parts.tmp/[0-9]*"))
    return []


def check_kills(inputs: Path, output: Path, step: str, num_kills: int, seed: int) -> None:
    """Kill a step `num_kills` times, each time with some other number of ranks, then finish it
    with three.

    When nothing is left to kill, the finished output is checked and the rest of the kills hit
    another one.
    """
    random_source = random.Random(seed)
    kills: list[Kill] = []
    for round_number in range(10 * num_kills):
        folder = output / str(round_number)
        command = commands(inputs, folder)[step]
        while len(kills) < num_kills and not is_complete(folder / step):
            num_ranks = random_source.choice([1, 2, 3])
            ranks = [f"--rank={random_source.randrange(num_ranks)}", f"--num_ranks={num_ranks}"]
            moment = random_source.choice([0, 1, 2, 5, JOINING]), random_source.uniform(0, 0.03)
            if kill := kill_while_working([*command, *ranks], folder / step, *moment):
                kills.append(kill)
        check_finished(inputs, folder, step)
        if len(kills) == num_kills:
            break
    print(
        f"{step}: {len(kills)} kills, finished parts and what was being done: "
        f"{[astuple(kill) for kill in kills]}"
    )
    assert len(kills) == num_kills


def check_finished(inputs: Path, output: Path, step: str) -> None:
    """Three ranks finish the step, and its output is that of an uninterrupted run."""
    for rank in range(3):
        assert cli.main([*commands(inputs, output)[step], f"--rank={rank}", "--num_ranks=3"]) == 0
    found, expected = verify_folder(output / step), verify_folder(inputs / step)
    assert found.content_hash == expected.content_hash
    assert (found.counts, found.lineage, found.details) == (
        expected.counts,
        expected.lineage,
        expected.details,
    )
    assert not list((output / step).glob("*parts.tmp"))


STEPS = ("encode-images", "tokenize", "build-shards")


@pytest.mark.parametrize("step", STEPS)
def test_one_kill(inputs, tmp_path, step) -> None:
    check_kills(inputs, tmp_path, step, num_kills=1, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("step", STEPS)
def test_twenty_kills(inputs, tmp_path, step) -> None:
    check_kills(inputs, tmp_path, step, num_kills=20, seed=1)


@pytest.mark.parametrize("step", STEPS)
def test_parts_that_a_kill_behind_the_manifest_left_are_removed_by_the_next_start(
    inputs, tmp_path, step, monkeypatch
) -> None:
    class Killed(BaseException):
        pass

    def kill(parts: Parts) -> None:
        raise Killed

    command = commands(inputs, tmp_path)[step]
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Parts, "remove", kill)
        cli.main(command)
    assert is_complete(tmp_path / step) and len(finished_parts(tmp_path / step)) > 1
    assert cli.main(command) == 0
    assert not list((tmp_path / step).glob("*parts.tmp"))


@pytest.mark.parametrize("step", STEPS)
def test_a_full_disk_loses_nothing_that_was_finished(inputs, tmp_path, step) -> None:
    command = commands(inputs, tmp_path)[step]
    done = run_program("on_full_disk", *command)
    assert done.returncode == 2 and "make room and start the same command again" in done.stderr, (
        done.stderr
    )
    assert f"({tmp_path}/{step}" in done.stderr, done.stderr
    assert cli.main(command) == 0
    assert verify_folder(tmp_path / step).content_hash == read_manifest(inputs / step).content_hash


def test_a_rank_that_another_has_overtaken_makes_nothing_again(
    inputs, tmp_path, monkeypatch, capsys
) -> None:
    """All parts are finished but one of rank 0, which joins them while rank 1 still reads its
    rows.
    """
    output = tmp_path / "tokenize"
    command = commands(inputs, tmp_path)["tokenize"]
    assert cli.main([*command, "--rank=1", "--num_ranks=2"]) == 0
    made: list[int] = []

    def overtaken(path: Path, rows_per_part: int) -> Survey:
        monkeypatch.undo()
        assert cli.main([*command, "--rank=0", "--num_ranks=2"]) == 0 and is_complete(output)
        monkeypatch.setattr(Tokenize, "write_part", lambda work, number, *more: made.append(number))
        return survey(path, rows_per_part)

    monkeypatch.setattr(tokenize_dataset, "survey", overtaken)
    assert cli.main([*command, "--rank=1", "--num_ranks=2"]) == 0
    assert not made and not list(output.glob("*parts.tmp")), capsys.readouterr().err


def when_it_writes(monkeypatch, number: int, event: Callable[[], object]) -> None:
    """Let `event` happen when a rank has begun to write its part `number`; the parts before it
    are untouched.
    """
    writing = Parts.writing

    @contextlib.contextmanager
    def interrupted(parts: Parts, at: int) -> Iterator[Path]:
        with writing(parts, at) as folder:
            if at == number:
                monkeypatch.undo()
                event()
            yield folder

    monkeypatch.setattr(Parts, "writing", interrupted)


@pytest.mark.parametrize("step", STEPS)
def test_a_rank_that_is_overtaken_in_the_middle_of_a_part_ends_well(
    inputs, tmp_path, step, monkeypatch, capsys
) -> None:
    """Another process makes all the rest, that part too, joins them and removes the parts."""
    command, output = commands(inputs, tmp_path)[step], tmp_path / step
    overtakers: list[int] = []

    def overtake() -> None:
        overtakers.append(cli.main(command))

    when_it_writes(monkeypatch, 2, overtake)
    assert cli.main(command) == 0, capsys.readouterr().err
    assert overtakers == [0] and not list(output.glob("*parts.tmp"))
    assert verify_folder(output).content_hash == read_manifest(inputs / step).content_hash


@pytest.mark.parametrize("step", STEPS)
def test_a_rank_whose_parts_somebody_removed_says_so(
    inputs, tmp_path, step, monkeypatch, capsys
) -> None:
    command, output = commands(inputs, tmp_path)[step], tmp_path / step
    when_it_writes(
        monkeypatch, 2, lambda: next(output.glob("*parts.tmp")).rename(tmp_path / "gone")
    )
    assert cli.main(command) == 2
    assert (
        "was removed while this process made parts of it; start the same command again"
        in capsys.readouterr().err
    )
    assert not is_complete(output) and cli.main(command) == 0
    assert verify_folder(output).content_hash == read_manifest(inputs / step).content_hash


def test_two_processes_that_make_the_same_parts_at_once_end_well(inputs, tmp_path) -> None:
    words = [sys.executable, "-m", "beingvl", *commands(inputs, tmp_path)["build-shards"]]
    started = [
        subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    shown = [process.communicate() for process in started]
    assert [process.returncode for process in started] == [0, 0], shown
    assert (
        verify_folder(tmp_path / "build-shards").content_hash
        == read_manifest(inputs / "build-shards").content_hash
    )
    assert not (tmp_path / "build-shards" / FOLDER).exists()


def test_processes_that_tokenize_write_the_same_bytes(inputs, tmp_path) -> None:
    assert cli.main([*commands(inputs, tmp_path)["tokenize"], "--num_workers=2"]) == 0
    assert (
        verify_folder(tmp_path / "tokenize").content_hash
        == read_manifest(inputs / "tokenize").content_hash
    )


def test_overwrite_is_for_one_rank(inputs, tmp_path, capsys) -> None:
    for command in commands(inputs, tmp_path).values():
        assert cli.main([*command, "--overwrite", "--rank=0", "--num_ranks=2"]) == 2
        assert "--overwrite is for one rank" in capsys.readouterr().err


def test_unfinished_work_of_an_input_that_was_mended_is_refused_in_words(
    inputs, tmp_path, capsys
) -> None:
    command = commands(inputs, tmp_path)["tokenize"]
    rows = tmp_path / "rows.json"
    rows.write_bytes((inputs / "rows.json").read_bytes())
    command[command.index(f"--json_path={inputs}/rows.json")] = f"--json_path={rows}"
    assert cli.main([*command, "--rank=0", "--num_ranks=2"]) == 0
    rows.write_text(rows.read_text().replace('"r7"', '"seven"'))
    assert cli.main(command) == 2
    error = capsys.readouterr().err
    assert "unfinished work with different json (its content differs)" in error, error
    assert "or add --overwrite to start again" in error and "blake3" not in error, error


def test_unfinished_work_of_other_options_is_refused(inputs, tmp_path, capsys) -> None:
    command = commands(inputs, tmp_path)["build-shards"]
    assert cli.main([*command, "--rank=0", "--num_ranks=2"]) == 0
    assert (
        "are still missing" in capsys.readouterr().out
        and (tmp_path / "build-shards" / FOLDER).is_dir()
    )
    assert cli.main([*command, "--part_bytes=5000"]) == 2
    assert "unfinished work with different part_bytes" in capsys.readouterr().err
    assert cli.main([*command, "--num_workers=2"]) == 0
    assert (
        verify_folder(tmp_path / "build-shards").content_hash
        == read_manifest(inputs / "build-shards").content_hash
    )
