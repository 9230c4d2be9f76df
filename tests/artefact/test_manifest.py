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
from beingvl.artefact.parts import locked
from beingvl.errors import InputError


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


def test_a_sampled_hash_finds_other_content_and_another_size(folder, tmp_path) -> None:
    big = tmp_path / "big.bin"
    big.write_bytes(bytes(range(256)) * 100_000)
    write_manifest(folder, "shards", {}, {}, known_hashes={"big.bin": manifest.hash_sample(big)})
    assert str(read_manifest(folder).files["big.bin"]["hash"]).startswith("sampled-sha256:")
    verify_folder(folder)
    big.write_bytes(
        bytes(range(1, 256)) + bytes(1) + bytes(range(256)) * 99_999
    )  # the first piece differs
    with pytest.raises(InputError, match="does not have the hash"):
        verify_folder(folder)
    with pytest.raises(InputError, match="bytes"):
        big.write_bytes(b"short")
        verify_folder(folder)


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
    fields = json.loads((folder / MANIFEST_FILE).read_text())
    (folder / MANIFEST_FILE).write_text(json.dumps({**fields, "format_version": 99}))
    with pytest.raises(InputError, match="update beingvl"):
        read_manifest(folder)
    (folder / MANIFEST_FILE).write_text("{")
    with pytest.raises(InputError, match="not a beingvl manifest"):
        read_manifest(folder)


@pytest.mark.parametrize("name", ["rows", "hash"])
def test_a_manifest_that_lacks_something_is_named(folder, name) -> None:
    path = folder / MANIFEST_FILE
    path.write_text(path.read_text().replace(f'"{name}"', f'"{name[1:]}"'))
    with pytest.raises(InputError, match=rf"{MANIFEST_FILE} .*{name[1:]}"):
        manifest.verify_folder(folder).counts["rows"]
    path.write_text(path.read_text().replace('"format_version": 1', '"format_version": "1"'))
    with pytest.raises(InputError, match=r"not a beingvl manifest"):
        read_manifest(folder)


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
            lambda path: locked(path).__enter__(),
        ):
            with pytest.raises(InputError, match=f"{path} cannot be made, a file is in the way"):
                make(path)


def test_already_made(folder) -> None:
    assert already_made(folder, "shards", {"n": 1})
    assert not already_made(folder, "shards", {"n": 1}, overwrite=True)
    assert not already_made(folder / "other", "shards", {"n": 1})
    with pytest.raises(InputError, match="another n"):
        already_made(folder, "shards", {"n": 2})


def test_join_lineages_names_the_two_that_contradict_each_other() -> None:
    assert join_lineages({"a": {"vq": "1"}, "b": {"vq": "1", "vbpe": "2"}}) == {
        "vq": "1",
        "vbpe": "2",
    }
    with pytest.raises(InputError, match="a and c do not match: they were made with different vq"):
        join_lineages({"a": {"vq": "1"}, "b": {"vbpe": "2"}, "c": {"vq": "3"}})


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch) -> None:
    path = tmp_path / "x.json"
    manifest.write_atomically(path, "old")
    monkeypatch.setattr(
        manifest.os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError("disk full"))
    )
    with pytest.raises(OSError, match="disk full"):
        manifest.write_atomically(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_files_have_the_published_hash_and_the_one_of_earlier_versions(tmp_path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"abc")  # the first vector of both
    blake3 = "blake3:6437b3ac38465133ffb63b75273a8db548c558465d79db03fd359c6cd5bd9d85"
    sha256 = "sha256:ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert manifest.hash_file(path) == manifest.hash_bytes(b"abc") == blake3
    assert manifest.has_hash(path, blake3) and manifest.has_hash(path, sha256)
    path.write_bytes(b"abd")
    assert not manifest.has_hash(path, blake3) and not manifest.has_hash(path, sha256)


def test_a_hash_of_pieces_depends_on_every_byte(tmp_path) -> None:
    path = tmp_path / "x"
    path.write_bytes(bytes(range(100)))
    whole = manifest.hash_pieces(path, piece_bytes=30)
    for at in (0, 29, 30, 99):
        path.write_bytes(bytes(byte ^ (number == at) for number, byte in enumerate(range(100))))
        assert manifest.hash_pieces(path, piece_bytes=30) != whole
    path.write_bytes(bytes(range(100)))
    assert (
        manifest.hash_pieces(path, piece_bytes=30)
        == whole
        != manifest.hash_pieces(path, piece_bytes=50)
    )


def test_unfinished_folders_are_not_entered(folder, monkeypatch) -> None:
    (folder / "parts.tmp" / "00000").mkdir(parents=True)
    entered, scandir = [], os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: entered.append(str(path)) or scandir(path))
    files = write_manifest(folder, "shards", {}, {}).files
    assert "sub/a.bin" in files and entered == [str(folder), str(folder / "sub")]
