"""`beingvl verify` finds what changed since it was written, in folders, stages and single files."""

from pathlib import Path

import numpy as np
import pytest

from beingvl.artefact.manifest import write_manifest
from beingvl.artefact.verify import verify
from beingvl.commands import main as cli
from beingvl.errors import InputError
from beingvl.vbpe.visual_bpe import VisualBPE
from tests.damage import flip_bit


def write_artefact(folder: Path, kind: str = "model") -> Path:
    (folder / "inside").mkdir(parents=True)
    (folder / "a.bin").write_bytes(b"0123")
    (folder / "inside" / "b.bin").write_bytes(b"4567")
    write_manifest(folder, kind, {}, {})
    return folder


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda path: path.write_bytes(b"0124"), "does not have the hash that manifest.json says"),
        (lambda path: path.write_bytes(b"012"), "has 3 bytes, manifest.json says 4"),
        (lambda path: path.unlink(), "is missing although manifest.json lists it"),
    ],
)
@pytest.mark.parametrize("name", ["a.bin", "inside/b.bin"])
def test_a_file_that_changed_is_named(tmp_path, capsys, name, change, message) -> None:
    folder = write_artefact(tmp_path / "model")
    assert verify(folder)[folder].kind == "model"
    change(folder / name)
    assert cli.main(["verify", str(folder)]) == 2
    assert f"{folder / name} {message}" in capsys.readouterr().err


def test_of_a_stage_all_that_is_finished_is_taken(tmp_path, capsys) -> None:
    for step in (1, 2):
        write_artefact(tmp_path / "checkpoints" / f"step-0000000{step}", "checkpoint")
    write_artefact(tmp_path / "final")
    (tmp_path / "checkpoints" / "step-00000003").mkdir()
    assert cli.main(["verify", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert shown.count(": checkpoint, 8 bytes, 2 files re-hashed, every hash as written") == 2
    assert f"{tmp_path / 'final'}: model, " in shown and "step-00000003" not in shown
    (tmp_path / "checkpoints" / "step-00000002" / "a.bin").write_bytes(b"")
    with pytest.raises(InputError, match=r"step-00000002/a\.bin has 0 bytes"):
        verify(tmp_path)


def test_a_folder_without_a_manifest_is_incomplete_whatever_is_in_it(tmp_path) -> None:
    write_artefact(tmp_path / "vqgan", "vqgan")
    with pytest.raises(InputError, match="so it is incomplete"):
        verify(tmp_path)


def test_every_path_is_looked_at(tmp_path, capsys) -> None:
    good, bad = write_artefact(tmp_path / "good"), write_artefact(tmp_path / "bad")
    flip_bit(bad / "a.bin", 0)
    (tmp_path / "none").mkdir()
    paths = [tmp_path / "none", tmp_path / "gone", bad, good]
    assert cli.main(["verify", *map(str, paths)]) == 2
    shown = capsys.readouterr()
    assert shown.out.startswith(f"{good}: model, 8 bytes") and shown.out.count("\n") == 1
    first, second, third = shown.err.splitlines()
    assert "none has no manifest.json" in first and "gone does not exist" in second
    assert f"{bad / 'a.bin'} does not have the hash" in third
    assert cli.main(["verify", str(good)]) == 0


def test_one_file(tmp_path, capsys) -> None:
    assert cli.main(["verify", str(tmp_path / "nope.json")]) == 2
    assert "nope.json does not exist" in capsys.readouterr().err
    path = tmp_path / "vbpe.json"
    VisualBPE(16, np.array([[0, 1, 0, 1]], np.int32)).save(path)
    assert cli.main(["verify", str(path)]) == 0
    assert "every merge is possible; there is no hash to compare with" in capsys.readouterr().out
    text = path.read_text()
    path.write_text(text.replace("0,1,0,1", "0,99,0,1").replace("0, 1, 0, 1", "0, 99, 0, 1"))
    assert path.read_text() != text and cli.main(["verify", str(path)]) == 2
    assert "vbpe.json" in capsys.readouterr().err

    path.write_text(text)
    write_manifest(tmp_path, "vbpe", {}, {})
    assert cli.main(["verify", str(path), str(tmp_path / "manifest.json")]) == 0
    assert f"{path}: {len(text)} bytes, hash as in the manifest" in capsys.readouterr().out
    VisualBPE(16, np.array([[0, 2, 0, 1]], np.int32)).save(path)
    assert cli.main(["verify", str(path)]) == 2
    assert "vbpe.json does not have the hash that manifest.json says" in capsys.readouterr().err
    (tmp_path / "mine.txt").write_text("mine")
    assert cli.main(["verify", str(tmp_path / "mine.txt")]) == 2
    assert "mine.txt is not listed in the manifest.json" in capsys.readouterr().err
