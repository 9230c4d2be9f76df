"""A part is whole or absent, whatever other processes do meanwhile."""

import itertools
import os
import shutil
from pathlib import Path

import pytest

from beingvl.artefact.parts import OvertakenError, Parts, remove_parts, wait_until_complete
from beingvl.errors import InputError


def test_a_part_is_whole_or_absent(tmp_path) -> None:
    parts = Parts(tmp_path, {"a": 1})
    with pytest.raises(RuntimeError), parts.writing(0) as folder:
        (folder / "x").write_text("half")
        raise RuntimeError
    assert parts.missing(2) == [0, 1] and os.listdir(parts.folder) == ["request.json"]
    for text in ("one", "another process was first"):
        with parts.writing(1) as folder:
            (folder / "x").write_text(text)
    assert parts.missing(2) == [0] and (parts.path(1) / "x").read_text() == "one"
    with pytest.raises(InputError, match=r"different a \(found 1, asked for 2\)"):
        Parts(tmp_path, {"a": 2})
    assert Parts(tmp_path, {"a": 2}, cheap=True).missing(2) == [0, 1]


def test_waiting_for_ranks_that_do_nothing_ends(tmp_path) -> None:
    with pytest.raises(InputError, match="no rank has worked on a part"):
        wait_until_complete(tmp_path, patience_seconds=0.05, poll_seconds=0.01)


def test_a_rank_in_the_middle_of_a_long_part_is_waited_for(tmp_path, monkeypatch) -> None:
    parts, seconds = Parts(tmp_path, {}), itertools.count(step=20)
    monkeypatch.setattr("beingvl.artefact.parts.time.monotonic", lambda: next(seconds))

    def work(_: float) -> None:
        os.utime(parts.folder, (0, 0))
        parts.show_life()
        if next(seconds) > 2000:
            (tmp_path / "manifest.json").write_text("{}")

    monkeypatch.setattr("beingvl.artefact.parts.time.sleep", work)
    wait_until_complete(tmp_path, patience_seconds=100)
    assert next(seconds) > 2000


def test_a_late_part_does_not_get_into_the_parts_of_another_request(tmp_path) -> None:
    late = Parts(tmp_path, {"a": 1})
    with pytest.raises(OvertakenError), late.writing(0) as folder:
        (folder / "x").write_text("of the first request")
        (late.folder / "request.json").unlink()
        Parts(tmp_path, {"a": 2})
    assert Parts(tmp_path, {"a": 2}).finished() == set()


def test_a_part_written_while_others_remove_the_parts_ends_well(tmp_path, monkeypatch) -> None:
    def remove_what_comes_first(folder: Path, **_: object) -> None:
        for part in folder.glob(".0*"):
            remove_all(part)

    parts, remove_all = Parts(tmp_path, {"a": 1}), shutil.rmtree
    with pytest.raises(OvertakenError), parts.writing(0) as folder:
        monkeypatch.setattr(shutil, "rmtree", remove_what_comes_first)
        Parts(tmp_path, {"a": 1}).remove()
        (folder / "x").write_text("late")
    monkeypatch.undo()
    assert Parts(tmp_path, {"a": 2}).finished() == set()
    remove_parts(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_part_that_others_finish_and_remove_ends_well(tmp_path, monkeypatch) -> None:
    parts, rename = Parts(tmp_path, {"a": 1}), os.rename

    def rename_and_be_overtaken(source: Path, target: Path) -> None:
        monkeypatch.setattr(os, "rename", rename)
        shutil.copytree(source, target)
        try:
            rename(source, target)
        finally:
            parts.remove()

    with parts.writing(0) as folder:
        (folder / "x").write_text("the same bytes")
        monkeypatch.setattr(os, "rename", rename_and_be_overtaken)
    assert not list(tmp_path.iterdir())
