"""What the fuzz tests trust: the harness sees what must not happen."""

import os
import subprocess
import time
from pathlib import Path

import pytest

from beingvl.errors import InputError
from tests.fuzz import harness
from tests.fuzz.harness import REFUSED, RETURNED, judged, mutated, mutated_values


def _refuse() -> None:
    raise InputError("one sentence")


def test_what_may_happen(tmp_path) -> None:
    assert judged("a", lambda: (tmp_path / "file").write_text("mine"), tmp_path) == RETURNED
    assert judged("b", _refuse, tmp_path) == REFUSED
    assert judged("c", lambda: (tmp_path / "none").read_text(), tmp_path) == REFUSED


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda folder: [][1], "IndexError"),
        (lambda folder: subprocess.run(["true"]), "a process was started"),
        (lambda folder: (folder / "x").write_text("mine"), "a file outside was changed"),
        (lambda folder: (folder / "kept").unlink(), "a file outside was changed"),
        (lambda folder: os.rename(folder / "kept", folder / "x"), "a file outside"),
        (lambda folder: time.sleep(5), "more than 0.2 s"),
    ],
)
def test_what_must_not_happen(tmp_path, monkeypatch, call, message) -> None:
    monkeypatch.setattr(harness, "LIMIT_SECONDS", 0.2)
    (tmp_path / "inside").mkdir()
    (tmp_path / "kept").write_text("mine")
    with pytest.raises(AssertionError, match=f"case 7: .*{message}"):
        judged("case 7", lambda: call(tmp_path), tmp_path / "inside")
    assert [path.name for path in sorted(Path(tmp_path).iterdir())] == ["inside", "kept"]


def test_a_seed_makes_the_same_inputs_again() -> None:
    seeds = [b"0123456789" * 50, b""]
    assert [*mutated(seeds, 50, 1)] == [*mutated(seeds, 50, 1)] != [*mutated(seeds, 50, 2)]
    rows = [{"id": 1, "conversations": [{"from": "human", "value": "hi"}]}]
    made = [repr(row) for row in mutated_values(rows, 50, 1)]
    assert made == [repr(row) for row in mutated_values(rows, 50, 1)] and len(set(made)) > 30
    assert rows == [{"id": 1, "conversations": [{"from": "human", "value": "hi"}]}]
