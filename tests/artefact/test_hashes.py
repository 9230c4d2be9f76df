import io
import multiprocessing

import pytest

from beingvl.artefact.hashes import HashedFile, hash_bytes, hash_file, hash_files

OF_ABC = "blake3:6437b3ac38465133ffb63b75273a8db548c558465d79db03fd359c6cd5bd9d85"


def test_files_have_the_published_hash(tmp_path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"abc")  # BLAKE3's own test vector
    assert hash_file(path) == hash_bytes(b"abc") == OF_ABC
    path.write_bytes(b"")
    assert hash_file(path) == hash_bytes(b"")
    with pytest.raises(FileNotFoundError, match="none"):
        hash_file(tmp_path / "none")


def test_a_large_file_hashed_by_threads_has_the_hash_of_its_bytes(tmp_path) -> None:
    data = bytes(range(256)) * 40_000
    (tmp_path / "x").write_bytes(data)
    assert hash_file(tmp_path / "x") == hash_bytes(data)


def test_a_forked_worker_hashes_after_its_parent_did(tmp_path) -> None:
    """The threads of a hash do not survive a fork."""
    (tmp_path / "x").write_bytes(bytes(4 << 20))
    hash_file(tmp_path / "x")
    fork = multiprocessing.get_context("fork")
    worker = fork.Process(target=hash_file, args=(tmp_path / "x",), daemon=True)
    worker.start()
    worker.join(60)
    assert worker.exitcode == 0


def test_what_is_written_is_hashed_on_the_way(tmp_path) -> None:
    file = HashedFile(out := io.BytesIO())
    for piece in (b"a", memoryview(b"bc")):
        file.write(piece)
    assert out.getvalue() == b"abc" and file.hash == OF_ABC


def test_a_hash_of_files_depends_on_names_and_bytes(tmp_path) -> None:
    for name in "ab":
        (tmp_path / name).write_bytes(b"1")
    assert len({hash_files(tmp_path, names) for names in ("a", "b", "ab", "")}) == 4
    before = hash_files(tmp_path, "ab")
    (tmp_path / "b").write_bytes(b"2")
    assert hash_files(tmp_path, "ba") != before
