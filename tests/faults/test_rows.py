"""Rows whose pictures would have been lost without a word."""

import base64
import json
import tarfile
import unicodedata

import numpy as np
import pytest

from beingvl.artefact.manifest import read_manifest, write_manifest
from beingvl.data.build_shards import build_shards
from beingvl.data.llava_json import image_keys, named_images
from beingvl.data.tokenize_dataset import tokenize
from beingvl.errors import InputError
from beingvl.images.image_source import NO_STAMP, open_images
from tests.code_folder import write_codes
from tests.tiny import LAYOUT, write_model

VQGAN = {"vqgan": "blake3:" + "1" * 64}
NAMES = [unicodedata.normalize("NFD", "café.png"), "a.png", "b.png"]


@pytest.fixture
def work(tmp_path):
    """A model folder and the codes of three images, one of them named as macOS does."""
    lineage = {"vocab": LAYOUT.fingerprint(), **VQGAN}
    write_manifest(write_model(tmp_path / "base"), "model", {}, lineage)
    codes = np.zeros((3, 4, 4), np.uint16)
    write_codes(tmp_path / "vq_codes", codes, 16, VQGAN, sorted(NAMES))
    return tmp_path


def row(question: str = "hi", **fields: object) -> dict:
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": "yes"}]
    return {**fields, "conversations": turns}


def tokenized(work, rows: list[dict], **options: object):
    path = work / "rows.json"
    path.write_text(json.dumps(rows))
    codes = work / "vq_codes"
    return tokenize(path, work / "base", work / "out", vq_codes=codes, **options)


@pytest.mark.parametrize("key", ["video", "videos", "image_path", "img", "Image"])
def test_pictures_under_another_key_are_named(work, key) -> None:
    rows = [row(**{key: ["a.png"]}), *[row(image="a.png")] * 9]
    with pytest.raises(InputError, match=f"the row has no `image`, but '{key}'"):
        tokenized(work, rows)
    manifest = tokenized(work, rows, max_rejected=0.1)
    assert manifest is not None and manifest.counts["rejected"] == 1
    with pytest.raises(InputError, match=f"'{key}', which is not read"):
        named_images_of(work, rows[:1])


def named_images_of(work, rows: list[dict]) -> list[str]:
    (work / "rows.json").write_text(json.dumps(rows))
    return named_images(work / "rows.json")


def test_other_keys_are_no_pictures() -> None:
    for key in ("image_id", "image_size", "image_sizes", "source", "videos_per_row", "frame_rate"):
        assert image_keys(row(**{key: "x"})) == []
    assert image_keys(row(images=[], image_path="")) == []
    assert image_keys(row(image="a.png", video="b.mp4")) == ["a.png"]


def test_every_run_ends_with_how_many_rows_have_how_many_images(work, capsys) -> None:
    rows = [row(), row(image=[]), row(image="a.png")]
    rows += [row("<image> <image>", image=["a.png", "b.png"])] * 4
    for _ in range(2):  # the second one is reused
        tokenized(work, rows, rows_per_part=2)
        shown = capsys.readouterr().out.splitlines()[-1]
        assert "(2 with 0 images, 1 with 1, 4 with 2)" in shown
    counts = read_manifest(work / "out").counts
    assert [counts[f"rows_with_{number}_images"] for number in range(3)] == [2, 1, 4]


def test_a_picture_in_base64_is_refused_in_a_line(work) -> None:
    data = base64.b64encode(bytes(range(256)) * 400).decode()
    for name, image in (("raw", data), ("url", f"data:image/png;base64,{data}")):
        with pytest.raises(InputError, match=r"characters that begin with .*expected a path") as no:
            tokenized(work, [row(image=image)], dataset_name=name)
        assert len(str(no.value)) < 1000
        listed = (work / f"out/{name}.parts.tmp/rejected.jsonl").read_text()
        assert len(listed) < 300 and "expected a path" in listed


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_names_in_another_unicode_form_are_found(work, form) -> None:
    manifest = tokenized(work, [row(image=unicodedata.normalize(form, "café.png"))])
    assert manifest is not None and manifest.counts["rows_with_1_images"] == 1


def test_images_are_read_under_names_of_another_unicode_form(tmp_path) -> None:
    composed, decomposed = (unicodedata.normalize(form, "é/ü.png") for form in ("NFC", "NFD"))
    (tmp_path / "folder" / decomposed).parent.mkdir(parents=True)
    (tmp_path / "folder" / decomposed).write_bytes(b"picture")
    with tarfile.open(tmp_path / "images.tar", "w") as tar:
        tar.add(tmp_path / "folder" / decomposed, arcname=composed)
    for name in ("folder", "images.tar"):
        images = open_images([tmp_path / name])
        for key in (composed, decomposed):
            assert images.read(key) == b"picture" and images.stamp(key) != NO_STAMP
        with pytest.raises(InputError, match="ö"):
            images.read("ö.png")
        assert images.stamp("ö.png") == NO_STAMP


def test_rows_without_ids_keep_their_names_whatever_the_parts(work) -> None:
    rows = [row(image="a.png") for _ in range(20)]
    named = []
    for size, name in ((3, "small"), (4096, "whole")):
        tokenized(work, rows, rows_per_part=size, dataset_name=name)
        lines = (work / f"out/{name}_base.jsonl").read_text().splitlines()
        named.append([json.loads(line)["id"] for line in lines])
    assert named[0] == named[1] == [f"rows.json-{number}" for number in range(1, 21)]
    manifest = build_shards(work / "out/small_base.jsonl", work / "shards")
    assert manifest is not None and not manifest.details["names_categories"]
