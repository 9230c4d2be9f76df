"""Too many open files: one sentence that says so, and nothing is taken for damaged."""

import os
import resource
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from PIL import Image

from beingvl.artefact.work import worker_processes
from beingvl.data.arrow_shards import OTHER_FILES, ShardReader
from beingvl.data.shard_columns import map_batch
from beingvl.images.vq_codes import CodeFolder, load_mapped
from tests.command import beingvl
from tests.images.test_encode_images import save_vqgan
from tests.launcher import ENVIRONMENT, stage_words
from tests.tiny import stage_fields, write_inputs, write_shards


@contextmanager
def room_for_files(count: int) -> Iterator[None]:
    """This process may open so many more files, and what it forks."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    os.close(lowest := os.dup(0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest + count, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_no_image_is_rejected_where_too_many_files_are_open(tmp_path, capfd) -> None:
    (tmp_path / "images").mkdir()
    for name in ("a.png", "a.tif"):
        Image.new("RGB", (24, 20)).save(tmp_path / "images" / name)
    vq_path = save_vqgan(tmp_path / "vqgan", seed=0)
    paths = {"image_path": tmp_path / "images", "vq_path": vq_path}
    capfd.readouterr()
    codes = []
    for room in (2, 8, 14, 20, 24, 400):
        output = tmp_path / f"{room}"
        with room_for_files(room):
            codes.append(beingvl("encode-images", **paths, output_path=output, num_workers=2))
        error = capfd.readouterr().err
        if codes[-1]:
            assert error.startswith("beingvl encode-images: error: Too many open files")
            assert error.endswith("(`ulimit -n 65536`) and start the same command again\n")
            assert error.count("\n") == 1
        else:
            assert CodeFolder(output).manifest.counts == {"images": 2, "rejected": 0}
    assert codes == sorted(codes, reverse=True) and set(codes) == {0, 2}


def test_torchs_words_for_it_are_understood(capfd, monkeypatch, tmp_path) -> None:
    # By chance: it depends on what a process has open already whether torch is the one to fail.
    def load_file(path: object) -> None:
        raise RuntimeError(
            f"unable to open file <{path}> in read-only mode: Too many open files (24)"
        )

    monkeypatch.setattr("beingvl.images.vqgan.load_file", load_file)
    paths = {"image_path": tmp_path, "vq_path": save_vqgan(tmp_path / "vqgan", seed=0)}
    Image.new("RGB", (24, 20)).save(tmp_path / "a.png")
    assert beingvl("encode-images", **paths, output_path=tmp_path / "codes") == 2
    assert "error: Too many open files" in capfd.readouterr().err


def test_workers_that_cannot_be_started_end_a_step() -> None:
    for room in (2, 6, 9):
        refused = pytest.raises(OSError, match="Too many open files")
        with room_for_files(room), refused, worker_processes(2, os.getpid) as pool:
            pool.submit(os.getpid).result()


def test_shards_that_cannot_be_opened_are_not_called_damaged(tmp_path) -> None:
    shards = write_shards(tmp_path / "shards")
    for read in (
        lambda: load_mapped(shards / "members.npy", "build it again"),
        lambda: map_batch(next(shards.glob("*.arrow"))),
    ):
        for room in (0, 1):
            with room_for_files(room), pytest.raises(OSError, match="Too many open files"):
                read()


def test_a_reader_of_shards_may_open_them_all(tmp_path) -> None:
    """As far as the system lets it."""
    shards = write_shards(tmp_path / "shards")
    with room_for_files(20):
        reader = ShardReader(shards)
        limit, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        assert limit == min(most, OTHER_FILES + len(list(shards.glob("*.arrow"))))
        assert len(reader) == 60


def test_a_training_is_refused_where_torch_would_abort(tmp_path) -> None:
    """Its store ends the process, without an exception, when no socket can be opened."""
    write_inputs(tmp_path, all=stage_fields(max_steps=1) | {"train_batch_size": 2})
    words = stage_words(*(tmp_path / name for name in ("all.json", "base", "shards", "stage")))
    done = subprocess.run(
        ["bash", "-c", 'ulimit -n 24 && exec "$@"', "bash", "beingvl", "train", *words],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "a process may open 24 files here, and training needs 64" in done.stderr
    assert not (tmp_path / "stage").exists()
