import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from beingvl.artefact.manifest import read_manifest, verify_folder, write_manifest
from beingvl.artefact.parts import Parts
from beingvl.artefact.ranks import RankOf
from beingvl.artefact.request import Request
from beingvl.artefact.work import Work, run_in_parts
from beingvl.errors import InputError

ALONE = RankOf(0, 1)


class Squares(Work):
    """Three numbers a part, squared; `made` is the parts that this object made."""

    kind, unit = "shards", "number"

    def __init__(self, output: Path, count: int = 8) -> None:
        self.output, self.count = output, count
        self.made: list[int] = []

    @property
    def num_parts(self) -> int:
        return -(-self.count // 3)

    def numbers(self, number: int) -> range:
        return range(3 * number, min(3 * number + 3, self.count))

    def size_of_part(self, number: int) -> int:
        return len(self.numbers(number))

    def request(self) -> Request:
        return self.request_of_parts()

    def request_of_parts(self) -> Request:
        return Request(count=self.count)

    def write_part(self, number: int, folder: Path, advance: Callable[[int], object]) -> None:
        self.made.append(number)
        (folder / "squares").write_text("".join(f"{n * n} " for n in self.numbers(number)))
        advance(self.size_of_part(number))

    def join(self, parts: Parts) -> None:
        hashed = parts.join(self.num_parts, "squares", self.output / "squares")
        details = {"request": self.request()}
        write_manifest(self.output, self.kind, {}, {}, details, {"squares": hashed})


def squares(folder: Path) -> str:
    verify_folder(folder)
    assert {path.name for path in folder.iterdir()} <= {"squares", "manifest.json"}
    return (folder / "squares").read_text()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_parts_are_made_joined_and_reused(tmp_path, capsys, num_workers: int) -> None:
    run_in_parts(Squares(tmp_path), ALONE, num_workers)
    assert squares(tmp_path) == "0 1 4 9 16 25 36 49 "
    written = read_manifest(tmp_path)
    run_in_parts(again := Squares(tmp_path), ALONE)
    assert not again.made and "reused" in capsys.readouterr().out
    with pytest.raises(InputError, match=r"different count \(found 8, asked for 7\)"):
        run_in_parts(Squares(tmp_path, 7), ALONE)
    assert read_manifest(tmp_path) == written
    run_in_parts(Squares(tmp_path, 7), ALONE, overwrite=True)
    assert squares(tmp_path) == "0 1 4 9 16 25 36 "


class Named(Squares):
    """The same parts, joined under a name. With `rival`, that one is done before the first part."""

    def __init__(self, output: Path, name: str, rival: str | None = None) -> None:
        super().__init__(output)
        self.name, self.rival = name, rival

    def request(self) -> Request:
        return Request(name=self.name)

    def write_part(self, number: int, folder: Path, advance: Callable[[int], object]) -> None:
        if self.rival and number == 0:
            run_in_parts(Named(self.output, self.rival), ALONE)
        super().write_part(number, folder, advance)


def test_a_start_that_is_overtaken_is_told_when_the_other_made_something_else(tmp_path) -> None:
    run_in_parts(Named(tmp_path / "same", "a", rival="a"), ALONE)
    with pytest.raises(InputError, match=r"different name \(found 'b', asked for 'a'\)"):
        run_in_parts(Named(tmp_path / "other", "a", rival="b"), ALONE)
    for name in ("same", "other"):
        assert squares(tmp_path / name) == "0 1 4 9 16 25 36 49 "


def test_the_last_rank_joins_and_ranks_may_change(tmp_path, capsys) -> None:
    for rank in (1, 2):
        run_in_parts(work := Squares(tmp_path), RankOf(rank, 3))
        assert work.made == [rank]
    assert "1 of 3 are still missing" in capsys.readouterr().out
    with pytest.raises(InputError, match="unfinished work with different count"):
        run_in_parts(Squares(tmp_path, 9), ALONE)
    run_in_parts(work := Squares(tmp_path), ALONE)
    assert work.made == [0] and squares(tmp_path) == "0 1 4 9 16 25 36 49 "


def test_nothing_to_do_is_a_finished_output(tmp_path) -> None:
    run_in_parts(Squares(tmp_path, 0), ALONE)
    assert squares(tmp_path) == ""


def test_overwrite_is_for_one_rank(tmp_path) -> None:
    with pytest.raises(InputError, match="--overwrite is for one rank, found 2"):
        run_in_parts(Squares(tmp_path), RankOf(0, 2), overwrite=True)


class Failing(Squares):
    def write_part(self, number: int, folder: Path, advance: Callable[[int], object]) -> None:
        if number == 1:
            raise InputError("part 1 is damaged")
        super().write_part(number, folder, advance)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_error_in_a_part_is_the_callers_and_loses_no_other_part(tmp_path, num_workers) -> None:
    with pytest.raises(InputError, match="part 1 is damaged"):
        run_in_parts(Failing(tmp_path), ALONE, num_workers)
    run_in_parts(work := Squares(tmp_path), ALONE)
    assert 0 not in work.made and squares(tmp_path) == "0 1 4 9 16 25 36 49 "


def test_worker_processes_end_with_a_parent_that_is_killed(tmp_path) -> None:
    program = Path(__file__).with_name("killed_parent.py")
    started = subprocess.Popen(
        [sys.executable, program, tmp_path], stdout=subprocess.PIPE, text=True
    )
    assert started.stdout is not None
    assert started.stdout.readline() == "sleeping\n"
    started.kill()
    started.wait()
    assert started.stdout.read() == ""  # the worker, which has the pipe too, has ended
