"""Rows in the forms that other people have them in: the same shards as LLaVA JSON and a folder."""

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from beingvl import InputError, tokenize
from beingvl.artefact.ranks import RankOf
from beingvl.data.arrow_shards import ShardReader
from beingvl.data.collect_rows import SUFFIXES, open_rows, records_of
from beingvl.images.encode_images import encode_images
from beingvl.images.image_source import open_images
from beingvl.images.vq_codes import REJECTED_FILE
from beingvl.model.convert_llama import convert
from beingvl.sources import tars
from beingvl.sources.places import expand, opened
from beingvl.sources.tables import Table
from tests.data.forms import (
    DIALECTS,
    Fact,
    every_form,
    llava,
    write_arrow,
    write_csv,
    write_json,
    write_jsonl,
    write_jsonl_gz,
    write_parquet,
    write_pictures,
    write_tar,
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


def to_shards(
    work: Path, rows: Path | list[Path], name: str, images: Path | None = None, **more
) -> Path:
    output = work / f"out-{name}"
    tokenize(rows, work / "base", output, image_path=images, format="arrow", **more)
    return output / "data_base"


def content(shards: Path) -> list[tuple]:
    samples = [ShardReader(shards)[index] for index in range(len(ShardReader(shards)))]
    return [(s.category, s.input_ids.tolist(), s.target_spans.tolist()) for s in samples]


def test_every_form_gives_the_same_shards(work: Path, tmp_path: Path) -> None:
    expected = content(work / "out-reference/data_base")
    for number, (name, path, has_pictures) in enumerate(every_form(tmp_path, FACTS)):
        images = None if has_pictures else work / "images"
        assert content(to_shards(work, path, f"form-{number}", images)) == expected, name


def test_each_dialect_is_told_in_a_line(work: Path, tmp_path: Path, capsys) -> None:
    """Of the first file, then what others differ in."""
    rows = write_json(tmp_path / "rows", [llava(FACTS[0], FACTS[0].file)])
    to_shards(work, rows, "told", work / "images")
    assert f"{rows}: 1 file, rows in the format 'llava'\n" in capsys.readouterr().out
    (tmp_path / "mixed").mkdir()
    for number, name in enumerate(("messages", "caption", "messages", "caption")):
        write_jsonl(tmp_path / "mixed" / str(number), [DIALECTS[name](FACTS[0], FACTS[0].file)])
    to_shards(work, tmp_path / "mixed", "mixed", work / "images", duplicate_ids="keep")
    told = [line for line in capsys.readouterr().out.splitlines() if "rows in the format" in line]
    assert told == [
        f"{tmp_path}/mixed: 4 files, rows in the format 'messages'",
        f"{tmp_path}/mixed/1.jsonl: rows in the format 'caption'",
    ]


def inside(facts=FACTS) -> list[dict]:
    return [DIALECTS["caption"](fact, {"bytes": fact.png}) for fact in facts]


def test_a_damaged_file_of_several_is_repaired(work: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "files").mkdir()
    for number in range(3):
        path = write_parquet(tmp_path / "files" / str(number), inside(FACTS[number::3]))
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    with pytest.raises(InputError, match=r"2\.parquet is not a whole parquet file"):
        to_shards(work, tmp_path / "files", "repaired")
    path.write_bytes(whole)
    capsys.readouterr()
    assert len(content(to_shards(work, tmp_path / "files", "repaired"))) == len(FACTS)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "starts again" in line]
    assert "different files (found ['" in line and "2.parquet" in line


def test_a_folder_of_img2dataset(work: Path, tmp_path: Path, capsys) -> None:
    """The counts and the table beside a tar say again what is in it."""
    tar = write_tar(tmp_path / "00000", FACTS, DIALECTS["caption"])
    write_parquet(tmp_path / "00000", [{"url": "https://example.org/a.png", "caption": "hi"}])
    (tmp_path / "00000_stats.json").write_text('{"count": 12}')
    assert content(to_shards(work, tmp_path, "img2dataset")) == content(
        to_shards(work, tar, "tar-of-img2dataset")
    )
    said = f"{tmp_path}: left out 2 of img2dataset's files, such as 00000.parquet; "
    assert capsys.readouterr().out.count(said) == 1
    assert open_images([tmp_path]).keys() == [fact.file for fact in FACTS]
    assert capsys.readouterr().out.count(said) == 1
    assert expand([tmp_path / "00000.parquet"], SUFFIXES) == [f"{tmp_path}/00000.parquet"]
    assert expand([f"{tmp_path}/0*"], SUFFIXES) == [str(tar)]


def test_a_table_of_a_tars_name_is_not_left_out_silently(work: Path, tmp_path: Path) -> None:
    """Without counts they are not img2dataset's; what is named is always taken."""
    tar = write_tar(tmp_path / "train", FACTS[:1], DIALECTS["caption"])
    table = write_parquet(tmp_path / "train", inside(FACTS[1:3]))
    for rows in (tmp_path, [tar, table]):
        with pytest.raises(InputError, match="are files of two kinds"):
            to_shards(work, rows, "beside")
    with pytest.raises(InputError, match=r"train\.parquet is a table and .*train\.tar is not"):
        open_images([tmp_path])
    counts = tmp_path / "train_stats.json"
    counts.write_text("{}")
    assert expand([tar, table, counts], SUFFIXES) == [str(tar), str(table), str(counts)]


def test_how_often_files_are_opened(tmp_path: Path, monkeypatch) -> None:
    """Each once, and before that, or when all is finished, the first: to tell its dialect."""
    (tmp_path / "tars").mkdir()
    for number in range(5):
        write_tar(tmp_path / "tars" / str(number), FACTS[number::5], DIALECTS["caption"])
    places: list[str] = []
    monkeypatch.setattr(tars, "opened", lambda place: places.append(place) or opened(place))
    for expected in (6, 1):
        places.clear()
        open_rows(tmp_path / "tars", tmp_path / "rows", rank=RankOf(0, 1))
        assert len(places) == expected


def test_naming_the_recognised_dialect_changes_nothing(tmp_path: Path, capsys) -> None:
    def collect(row_format: str | None) -> None:
        open_rows(files, tmp_path / "rows", row_format=row_format, rank=RankOf(0, 1))

    (files := tmp_path / "files").mkdir()
    for number, name in enumerate(("caption", "caption", "messages")):
        write_jsonl(files / str(number), [DIALECTS[name](FACTS[number], FACTS[number].file)])
    collect(None)
    with pytest.raises(InputError, match="found None, asked for 'caption'"):
        collect("caption")  # the last file has another
    (files / "2.jsonl").unlink()
    shutil.rmtree(tmp_path / "rows")
    collect(None)
    for name in ("caption", None):
        collect(name)
        assert "is finished already, with the same inputs" in capsys.readouterr().out
    with pytest.raises(InputError, match="found None, asked for 'texts'"):
        collect("texts")


@pytest.mark.parametrize("make", [write_tar, write_arrow])
def test_no_cut_loses_rows_silently(make, tmp_path: Path) -> None:
    if make is write_tar:
        path = write_tar(tmp_path / "pairs", FACTS, DIALECTS["caption"])
        end = len(path.read_bytes().rstrip(b"\0"))
        cuts = range(0, end, 701)  # in headers, pictures and texts
    else:
        path = write_arrow(tmp_path / "saved", inside(FACTS * 10)) / "data-00000-of-00001.arrow"
        data = path.read_bytes()
        end = len(data)
        cuts = [at for at in range(0, end, 8) if data[at : at + 4] == b"\xff" * 4]
        assert len(cuts) == 5  # its schema, three batches, its end
    whole = path.read_bytes()
    assert len(list(records_of(str(path)))) > 10
    for cut in [*cuts, end - 1]:
        path.write_bytes(whole[:cut])
        with pytest.raises(InputError, match="copy it again"):
            list(records_of(str(path)))


def test_pictures_of_every_type_of_bytes(tmp_path: Path) -> None:
    one, two = FACTS[0].png, FACTS[1].png
    lists = pa.list_(pa.binary(), 2)
    columns = {"a": pa.array([one]).cast(pa.binary_view()), "b": pa.array([[two, one]], lists)}
    columns |= {"c": pa.array([two], pa.large_binary()), "d": pa.array([[one]])}
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    table = Table(str(tmp_path / "a.parquet"))
    assert [table.picture(0, number) for number in range(5)] == [one, two, one, two, one]
    assert list(table.picture_keys()) == [f"a.parquet#000000000/{number}" for number in range(5)]


def test_a_row_that_python_cannot_hold_is_unreadable(tmp_path: Path) -> None:
    texts = pa.array([b"hi", b"\xff\xfe", b"ok"]).view(pa.string())
    dates = pa.array([0, 0, 10**14], pa.timestamp("s"))
    pq.write_table(pa.table({"caption": texts, "at": dates}), tmp_path / "a.parquet")
    first, second, third = Table(str(tmp_path / "a.parquet")).records()
    assert first["caption"] == "hi" and "utf-8" in second["unreadable"] and third["unreadable"]


def test_a_picture_beside_a_path_that_is_not_text_is_rejected(work: Path, tmp_path: Path) -> None:
    paths = pa.array([b"a.png", b"\xff\xfe"]).view(pa.string())
    pictures = pa.array([fact.png for fact in FACTS[:2]])
    cells = pa.StructArray.from_arrays([pictures, paths], ["bytes", "path"])
    pq.write_table(pa.table({"image": cells}), tmp_path / "a.parquet")
    encode_images(tmp_path / "a.parquet", work / "vqgan", tmp_path / "codes", max_rejected=0.5)
    (line,) = (tmp_path / "codes" / REJECTED_FILE).read_text().splitlines()
    assert "a.parquet#000000001/0: the row cannot be read ('utf-8'" in line


def test_a_row_that_a_table_does_not_have(tmp_path: Path) -> None:
    table = Table(str(write_parquet(tmp_path / "a", inside(FACTS[:1]))))
    for _ in range(2):
        with pytest.raises(InputError, match=r"a\.parquet has no row 5"):
            table.picture(5, 0)
        assert table.picture(0, 0) == FACTS[0].png


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
    "messages of one picture less": (
        {"messages": [{"role": "user", "content": [{"type": "image"}] * 2}], "images": ["a.png"]},
        "messages[0] has an image part without a picture, in it or left in `images`",
    ),
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
    at = "https://example.org/a.png?signature=SECRET"
    return write_csv(folder / "at", [{"url": at, "caption": "hi"}, {"url": at, "caption": "ok"}])


def two_columns_of_one_name(folder: Path) -> Path:
    columns = [pa.array(["a.png"]), pa.array(["b.png"]), pa.array(["hi"])]
    pq.write_table(
        pa.Table.from_arrays(columns, ["image", "image", "caption"]), folder / "a.parquet"
    )
    return folder / "a.parquet"


def arrow_of_the_file_format(folder: Path) -> Path:
    table = pa.Table.from_pylist([DIALECTS["caption"](fact, fact.file) for fact in FACTS])
    with pa.ipc.new_file(str(folder / "a.arrow"), table.schema) as out:
        out.write_table(table)
    return folder / "a.arrow"


def two_splits(folder: Path) -> Path:
    for name in ("train", "test"):
        write_arrow(folder / name, [DIALECTS["caption"](FACTS[0], {"bytes": FACTS[0].png})])
    return folder


def two_tars_of_one_name_inside(folder: Path) -> Path:
    for name in "ab":
        write_tar(folder / name, FACTS, None)
    return folder


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
    two_columns_of_one_name: r"has two columns of one name: \['image', 'image', 'caption'\]",
    arrow_of_the_file_format: "Arrow file format, expected Arrow's stream format, as save_to_disk",
    two_splits: "2 tables are called data-00000-of-00001.arrow, .* keys begin: rename one$",
    two_tars_of_one_name_inside: "a.tar and .*b.tar both hold 000000.png: rename it in one of them",
    nothing: r"holds no file that ends in \.json, \.jsonl, \.ndjson, \.csv, \.tsv, \.parquet, "
    r"\.arrow, \.tar$",
}


@pytest.mark.parametrize("make", WRONG, ids=lambda make: make.__name__)
def test_one_sentence_for(make, work: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=WRONG[make]) as error:
        to_shards(work, make(tmp_path), make.__name__, work / "images")
    assert "SECRET" not in str(error.value)
    assert not list(work.glob(f"out-{make.__name__}*/*.jsonl"))
