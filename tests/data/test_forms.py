"""Rows in the forms that other people have them in: the same shards as LLaVA JSON and a folder."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from beingvl import InputError, tokenize
from beingvl.data.arrow_shards import ShardReader
from beingvl.model.convert_llama import convert
from tests.data.forms import (
    DIALECTS,
    Fact,
    every_form,
    llava,
    write_csv,
    write_json,
    write_jsonl_gz,
    write_parquet,
    write_pictures,
)
from tests.images.test_encode_images import save_vqgan
from tests.model.small_models import write_base_model


def png(number: int) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (8, 8, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


FACTS = [Fact(number, png(number), f"hi yes {'hi ' * (number % 3)}ok") for number in range(12)]


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """A base model with a VQ-GAN, a folder of images, and the shards of LLaVA JSON about them."""
    folder = tmp_path_factory.mktemp("forms")
    write_pictures(folder / "images", FACTS)
    save_vqgan(folder / "vqgan", seed=0)
    write_base_model(folder / "llama")
    convert(folder / "llama", folder / "base", being_vq_path=folder / "vqgan", num_merges=0)
    rows = write_json(folder / "rows", [llava(fact, fact.file) for fact in FACTS])
    to_shards(folder, rows, "reference", folder / "images")
    return folder


def to_shards(work: Path, rows: Path, name: str, images: Path | None = None, **more) -> Path:
    output = work / f"out-{name}"
    tokenize(rows, work / "base", output, image_path=images, format="arrow", **more)
    return output / "data_base"


def content(shards: Path) -> list[tuple]:
    samples = [ShardReader(shards)[index] for index in range(len(ShardReader(shards)))]
    return [(s.category, s.input_ids.tolist(), s.target_spans.tolist()) for s in samples]


def test_every_form_gives_the_same_shards(work: Path, tmp_path: Path) -> None:
    expected = content(work / "out-reference/data_base")
    for number, (name, path) in enumerate(every_form(tmp_path, FACTS)):
        has_pictures = path.suffix in (".parquet", ".tar", "") or path.is_dir()
        images = None if has_pictures else work / "images"
        assert content(to_shards(work, path, f"form-{number}", images)) == expected, name


def test_a_system_turn_is_context_and_several_images_stand_where_they_are_named(
    work: Path, tmp_path: Path
) -> None:
    told = [
        {"role": "system", "content": "hi hi"},
        {"role": "user", "content": [{"type": "image", "image": FACTS[0].file}, text("yes")]},
        {"role": "assistant", "content": "ok"},
        {"role": "user", "content": [text("or"), image_url(FACTS[1].file), text("no")]},
        {"role": "assistant", "content": [{"type": "text", "value": "hi"}]},
    ]
    rows = write_json(tmp_path / "chat", [{"messages": told}])
    (sample,) = content(to_shards(work, rows, "chat", work / "images"))
    turns = [
        {"from": "human", "value": "hi hi\n\n<image>yes"},
        {"from": "gpt", "value": "ok"},
        {"from": "human", "value": "or<image>no"},
        {"from": "gpt", "value": "hi"},
    ]
    plain = {"image": [FACTS[0].file, FACTS[1].file], "conversations": turns}
    rows = write_json(tmp_path / "plain", [plain])
    assert content(to_shards(work, rows, "plain", work / "images")) == [sample]
    assert len(sample[2]) == 2  # two answers are targets, and nothing else


def text(content: str) -> dict:
    return {"type": "text", "text": content}


def image_url(url: str) -> dict:
    return {"type": "image_url", "image_url": {"url": url}}


def test_alpaca_rows_of_several_texts(work: Path, tmp_path: Path) -> None:
    row = {"system": "or", "history": [["yes", "no"]], "instruction": "hi", "input": "no"}
    alpaca = write_json(tmp_path / "alpaca", [row | {"output": "ok"}])
    turns = [{"from": "human", "value": "or\n\nyes"}, {"from": "gpt", "value": "no"}]
    turns += [{"from": "human", "value": "hi\nno"}, {"from": "gpt", "value": "ok"}]
    plain = write_json(tmp_path / "plain", [{"conversations": turns}])
    (expected,) = content(to_shards(work, plain, "plain-texts"))
    assert content(to_shards(work, alpaca, "alpaca-texts")) == [expected]


ANSWERED = DIALECTS["sharegpt"](FACTS[0], FACTS[0].file)
MALFORMED = {
    "sharegpt": (
        {"images": ["a.png"], "conversations": [{"from": "tool", "value": "x"}]},
        "is from 'tool'",
    ),
    "llava of KTO": (
        {"conversations": ANSWERED["conversations"], "label": False},
        "label is false",
    ),
    "sharegpt of KTO": (ANSWERED | {"label": False}, "label is false"),
    "sharegpt of DPO": (ANSWERED | {"rejected": ANSWERED["conversations"][1]}, "'rejected', a pre"),
    "alpaca": ({"instruction": "hi", "output": ["ok"]}, "output has no text"),
    "messages": ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, "'audio'"),
    "texts": ({"texts": [{"user": "hi", "assistant": "ok"}], "videos": ["a.mp4"]}, "has videos"),
    "caption": ({"caption": "no picture"}, "expected image and caption"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_row_is_rejected_with_its_reason(work: Path, tmp_path: Path, name: str) -> None:
    bad, reason = MALFORMED[name]
    name = name.split()[0]
    rows = [DIALECTS[name](fact, fact.file) for fact in FACTS] + [bad]
    path, named = write_json(tmp_path / name, rows), tmp_path.name
    to_shards(work, path, named, work / "images", row_format=name, max_rejected=0.1)
    (line,) = (work / f"out-{named}/rejected.jsonl").read_text().splitlines()
    assert reason in json.loads(line)["reason"]
    assert "row 13" in line or json.loads(line)["index"] == 12


def parquet_without_pictures(folder: Path) -> Path:
    return write_parquet(folder / "numbers", [{"a": 1, "b": 2.5}])


def two_dialects(folder: Path) -> Path:
    forms = [DIALECTS["texts"](FACTS[0], "a.png"), DIALECTS["llava"](FACTS[1], "b.png")]
    return write_json(folder / "two", forms)


def a_cut_parquet(folder: Path) -> Path:
    path = write_parquet(folder / "cut", [DIALECTS["caption"](fact, "a.png") for fact in FACTS])
    path.write_bytes(path.read_bytes()[:-20])
    return path


def a_cut_gzip(folder: Path) -> Path:
    path = write_jsonl_gz(folder / "cut", [DIALECTS["caption"](fact, "a.png") for fact in FACTS])
    path.write_bytes(path.read_bytes()[:-20])
    return path


def csv_with_semicolons(folder: Path) -> Path:
    path = folder / "captions.csv"
    path.write_text("image;caption\na.png;hi\n")
    return path


def two_kinds(folder: Path) -> Path:
    write_csv(folder / "a", [{"image": "a.png", "caption": "hi"}])
    write_parquet(folder / "b", [{"image": "a.png", "caption": "hi"}])
    return folder


def one_object_over_lines(folder: Path) -> Path:
    path = folder / "one.json"
    path.write_text(json.dumps(DIALECTS["llava"](FACTS[0], FACTS[0].file), indent=2))
    return path


def addresses(folder: Path) -> Path:
    at = "https://example.org/a.png"
    return write_csv(folder / "at", [{"url": at, "caption": "hi"}, {"url": at, "caption": "ok"}])


def nothing(folder: Path) -> Path:
    return folder


WRONG = {
    parquet_without_pictures: "has rows with the keys .*'a', 'b'.* --row_format",
    two_dialects: "mixes rows of llava and texts",
    a_cut_parquet: "cut.parquet is not a whole parquet file",
    a_cut_gzip: "cut.jsonl.gz .*truncated",
    csv_with_semicolons: "separated by ','; it seems to be separated by ';'",
    one_object_over_lines: "line 1: an object spans several lines; expected a list of objects",
    two_kinds: "are files of two kinds",
    addresses: "'url' holds addresses of images, such as 'https://example.org/a.png', and none",
    nothing: r"holds no file that ends in \.json, \.jsonl, \.ndjson, \.csv, \.tsv, \.parquet, "
    r"\.arrow, \.tar$",
}


@pytest.mark.parametrize("make", WRONG, ids=lambda make: make.__name__)
def test_one_sentence_for(make, work: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=WRONG[make]):
        to_shards(work, make(tmp_path), make.__name__, work / "images")
    assert not (work / f"out-{make.__name__}").exists()
