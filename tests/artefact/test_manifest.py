import json
import os

import pytest

from beingvl.artefact import manifest
from beingvl.artefact.manifest import (
    MANIFEST_FILE,
    already_made,
    join_lineages,
    read_manifest,
    start_folder,
    verify_folder,
    write_manifest,
)
from beingvl.artefact.owner import owned
from beingvl.errors import InputError
from tests.damage import change_manifest


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.bin").write_bytes(b"12345")
    write_manifest(
        tmp_path, "shards", {"samples": 3}, {"vocab": "sha256:aa"}, {"request": {"n": 1}}
    )
    return tmp_path


def test_round_trip_and_verification(folder) -> None:
    read = verify_folder(folder)
    assert (read.kind, read.counts, read.lineage) == (
        "shards",
        {"samples": 3},
        {"vocab": "sha256:aa"},
    )
    assert read.files["sub/a.bin"]["bytes"] == 5


def test_content_hash_depends_on_content_only(folder) -> None:
    before = read_manifest(folder).content_hash
    write_manifest(folder, "shards", {"samples": 4}, {})
    assert read_manifest(folder).content_hash == before
    (folder / "sub" / "a.bin").write_bytes(b"12346")
    write_manifest(folder, "shards", {"samples": 4}, {})
    assert read_manifest(folder).content_hash != before


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.write_bytes(b"1234"), "4 bytes"),
        (lambda path: path.write_bytes(b"12346"), "changed after"),
        (lambda path: path.unlink(), "is missing"),
    ],
)
def test_verify_finds_damage(folder, damage, message) -> None:
    damage(folder / "sub" / "a.bin")
    with pytest.raises(InputError, match=message):
        verify_folder(folder)


def test_incomplete_wrong_kind_newer_and_damaged_manifests_are_refused(
    folder, tmp_path_factory
) -> None:
    with pytest.raises(InputError, match="incomplete; make it with `beingvl build-shards`"):
        read_manifest(tmp_path_factory.mktemp("empty"), "shards")
    with pytest.raises(InputError, match="is not a folder"):
        read_manifest(folder / "nothing", "shards")
    with pytest.raises(InputError, match="holds 'shards', expected 'model'"):
        read_manifest(folder, "model")
    change_manifest(folder, format_version=99)
    with pytest.raises(InputError, match="update beingvl"):
        read_manifest(folder)
    for text, message in [
        ("{", "is not valid JSON"),
        ("[]", "is not a beingvl manifest"),
        ('{"format_version": "1"}', "is not a beingvl manifest"),
    ]:
        (folder / MANIFEST_FILE).write_text(text)
        with pytest.raises(InputError, match=message):
            read_manifest(folder)


def test_a_manifest_that_changed_or_has_no_hash_of_itself_is_refused(folder) -> None:
    path, text = folder / MANIFEST_FILE, (folder / MANIFEST_FILE).read_text()
    path.write_text(json.dumps(json.loads(text)))  # other spaces are the same content
    assert read_manifest(folder).counts == {"samples": 3}
    without = {name: value for name, value in json.loads(text).items() if name != "manifest_hash"}
    for changed in (text.replace('"samples": 3', '"samples": 4'), json.dumps(without)):
        path.write_text(changed)
        with pytest.raises(InputError, match="changed after it was written, or has no manifest_h"):
            read_manifest(folder)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"files": {"a.bin": {"bytes": 5}}}, "manifest.json has no 'hash' where one is expected"),
        ({"files": {"a.bin": 5}}, "has files .*, which no step writes"),
        ({"counts": {"samples": "3"}}, "has counts .*, which no step writes"),
        ({"lineage": []}, r"has lineage '\[\]', which no step writes"),
    ],
)
def test_a_manifest_that_lacks_something_is_named(folder, fields, message) -> None:
    change_manifest(folder, **fields)
    with pytest.raises(InputError, match=message):
        read_manifest(folder)
    change_manifest(folder, files={}, counts={}, lineage={})
    with pytest.raises(InputError, match=r"manifest\.json has no 'rows' where one is expected"):
        print(read_manifest(folder).details["rows"])


def test_a_started_folder_is_incomplete_and_empty(folder) -> None:
    with pytest.raises(
        InputError, match="holds 'shards', which a step that writes 'vq_codes' does not replace"
    ):
        start_folder(folder, "vq_codes")
    start_folder(folder, "shards")
    assert not manifest.is_complete(folder)
    assert not (folder / "sub" / "a.bin").exists()


def test_a_file_in_the_way_of_a_folder_is_named(tmp_path) -> None:
    (tmp_path / "file").write_text("mine")
    for path in (tmp_path / "file", tmp_path / "file" / "inside"):
        for make in (
            lambda path: start_folder(path, "shards"),
            lambda path: owned(path).__enter__(),
        ):
            with pytest.raises(InputError, match=f"{path} cannot be made, a file is in the way"):
                make(path)


def test_already_made(folder) -> None:
    assert already_made(folder, "shards", {"n": 1})
    assert not already_made(folder, "shards", {"n": 1}, overwrite=True)
    assert not already_made(folder / "other", "shards", {"n": 1})
    with pytest.raises(InputError, match="different n"):
        already_made(folder, "shards", {"n": 2})


def test_join_lineages_names_the_two_that_contradict_each_other() -> None:
    assert join_lineages({"a": {"vq": "1"}, "b": {"vq": "1", "vbpe": "2"}}) == {
        "vq": "1",
        "vbpe": "2",
    }
    with pytest.raises(InputError, match="a and c do not match: they were made with different vq"):
        join_lineages({"a": {"vq": "1"}, "b": {"vbpe": "2"}, "c": {"vq": "3"}})


def test_unfinished_folders_are_not_entered(folder, monkeypatch) -> None:
    (folder / "parts.tmp" / "00000").mkdir(parents=True)
    entered, scandir = [], os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: entered.append(str(path)) or scandir(path))
    files = write_manifest(folder, "shards", {}, {}).files
    assert "sub/a.bin" in files and entered == [str(folder), str(folder / "sub")]
