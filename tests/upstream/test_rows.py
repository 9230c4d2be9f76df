"""Published JSONL as it is: no id, no category, no target_spans, no eos."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from beingvl.data.arrow_shards import ShardReader
from beingvl.data.build_shards import build_shards
from beingvl.data.conversation import TextEncoder, build_sequence
from beingvl.data.llava_json import stream_rows
from beingvl.errors import InputError
from tests.damage import list_anew
from tests.tiny import LAYOUT, write_model
from tests.upstream.artefacts import TINY, tokenizer_text, turns_of, write_rows

TURNS = [
    {"from": "human", "value": "<image>\n What is it? "},
    {"from": "gpt", "value": " Seven. "},
    {"from": "human", "value": " And <image>\nthat? "},
    {"from": "gpt", "value": "Six."},
]


def rows(count: int, **more: str) -> list[dict]:
    return [
        {"id": "twice", "image": f"{number}.png", "conversations": TURNS, **more}
        for number in range(count)
    ]


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """A base model with the published vocabulary at tiny size, and rows in both variants."""
    folder = tmp_path_factory.mktemp("published")
    write_model(folder / "base", TINY)
    (folder / "base/tokenizer.json").write_text(tokenizer_text(TINY), encoding="utf-8")
    list_anew(folder / "base")
    grids = [np.random.default_rng(number).integers(0, 16, (4, 4)) for number in range(40)]
    write_rows(folder, "data", rows(40), grids)
    return folder


def test_published_rows_become_shards_and_are_named_after_their_lines(work, tmp_path) -> None:
    path = work / "data_vbpe.jsonl"
    for part_bytes, workers in ((64 << 20, 0), (1000, 2), (77, 0)):
        shards = tmp_path / f"shards-{part_bytes}"
        manifest = build_shards(
            path, shards, model_path=work / "base", part_bytes=part_bytes, num_workers=workers
        )
        assert manifest is not None
        assert manifest.details["template"] == "being-vl-0.5"
        assert not manifest.details["names_categories"]
        reader = ShardReader(shards)
        assert [reader[at].id for at in range(40)] == [f"{path.name}-{n}" for n in range(1, 41)]
    row = json.loads(path.read_text().splitlines()[3])
    ids = [*row["token_0"], *row["token_image_new"], *row["token_1"]]
    assert reader[3].input_ids.tolist() == ids and reader[3].image == "3.png"
    assert reader[3].target_spans.tolist() == [[len(ids) - len(row["token_1"]), len(ids)]]


def test_blank_lines_count_and_own_ids_and_categories_stay(work, tmp_path) -> None:
    first, second, third = (work / "data_base.jsonl").read_text().splitlines()[:3]
    named = json.dumps({"id": "mine", **json.loads(second)})
    original = json.loads(third)
    original["original"]["category"] = "reasoning"
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join([first, "", named, " ", json.dumps(original)]))
    manifest = build_shards(path, tmp_path / "shards", model_path=work / "base", part_bytes=50)
    assert manifest is not None and manifest.details["names_categories"]
    samples = [ShardReader(tmp_path / "shards")[at] for at in range(3)]
    assert [sample.id for sample in samples] == ["rows.jsonl-1", "mine", "rows.jsonl-5"]
    assert [sample.category for sample in samples] == ["default", "default", "reasoning"]


def test_the_template_gives_exactly_the_published_ids(work) -> None:
    encoder = TextEncoder(work / "base", TINY)
    for line in (work / "data_base.jsonl").read_text().splitlines()[:2]:
        row = json.loads(line)
        image = np.array(row["token_image"])
        sample = build_sequence(turns_of(row["original"]), [image], encoder, TINY, "being-vl-0.5")
        assert sample.token_0.tolist() == row["token_0"]
        assert sample.token_1.tolist() == row["token_1"]
        assert row["token_1"].count(TINY.sep_id) == 1
        assert row["token_1"].count(TINY.image_placeholder_id) == 1


def test_their_originals_are_read_as_llava_rows(work) -> None:
    found = list(stream_rows(work / "data_vbpe.jsonl"))
    assert [row["conversations"] for row in found] == [TURNS] * 40
    assert found[7]["image"] == "7.png" and "token_0" not in found[7]


def test_rows_of_two_templates_are_one_sentence(work, tmp_path) -> None:
    published = (work / "data_base.jsonl").read_text()
    row = json.loads(published.splitlines()[0])
    ours = json.dumps({**row, "id": "ours", "target_spans": [[20, 22]]}) + "\n"
    for name, text, found in (
        ("ours_last", published + ours, "line 41 has target_spans, the first row none"),
        ("ours_first", ours + published, "line 2 has no target_spans, the first row has them"),
    ):
        path = tmp_path / f"{name}.jsonl"
        path.write_text(text)
        with pytest.raises(InputError, match=found + ": rows of two templates"):
            build_shards(path, tmp_path / name, model_path=work / "base", num_workers=0)
    (tmp_path / "ours.jsonl").write_text(ours)
    both = [tmp_path / "ours.jsonl", work / "data_base.jsonl"]
    with pytest.raises(InputError, match=r"has the template 'default', .* has 'being-vl-0\.5'"):
        build_shards(both, tmp_path / "both", model_path=work / "base")
    options = {"model_path": work / "base", "template": "default", "num_workers": 0}
    manifest = build_shards(both, tmp_path / "both", **options)
    assert manifest is not None and manifest.details["template"] == "default"


def test_our_rows_of_the_published_template_away_from_their_manifest(work, tmp_path) -> None:
    row = json.loads((work / "data_base.jsonl").read_text().splitlines()[0])
    start = len(row["token_0"]) + len(row["token_image"])
    for template, first in (("being-vl-0.5", start), ("default", start + 3)):
        path = tmp_path / f"{template}.jsonl"
        spans = [[first, start + len(row["token_1"])]]
        path.write_text(json.dumps({**row, "id": "ours", "target_spans": spans}))
        manifest = build_shards(path, tmp_path / template, model_path=work / "base", num_workers=0)
        assert manifest is not None and manifest.details["template"] == template


def test_ids_of_another_layout_are_one_sentence(work, tmp_path) -> None:
    write_model(tmp_path / "other", LAYOUT)  # 258 text ids, not 300
    write_model(tmp_path / "larger", replace(TINY, num_text=400))
    write_model(tmp_path / "fewer", replace(TINY, num_merges=1))
    write_model(tmp_path / "shifted", replace(TINY, num_text=299, num_merges=9, eos_id=297))
    for name, found in (
        ("other", "line 1: the row begins with 298, but in this vocabulary 256 begins a row"),
        ("larger", "line 1: the row has an image of other ids than the vocabulary's"),
        ("fewer", "line 13: the row has an image of other ids than the vocabulary's"),
        ("shifted", "line 1: the row has 304 before its image, .* 303 an image"),
    ):
        shards, options = tmp_path / f"shards-{name}", {"model_path": tmp_path / name}
        with pytest.raises(InputError, match=found):
            build_shards(work / "data_vbpe.jsonl", shards, **options, num_workers=0)
        assert not (shards / "manifest.json").exists()
