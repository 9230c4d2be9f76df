"""LLaVA JSON + image codes -> JSONL rows, through the command line."""

import json
from pathlib import Path

import numpy as np
import pytest

from beingvl.artefact.files import to_json
from beingvl.artefact.hashes import hash_file
from beingvl.artefact.manifest import read_manifest, write_manifest
from beingvl.data.arrow_shards import ShardReader
from beingvl.data.dataset_folder import DatasetFolder
from beingvl.data.llava_json import stream_rows
from beingvl.data.made_with import UNMERGED
from beingvl.errors import InputError
from beingvl.images.pictures import to_png
from beingvl.images.vq_codes import CodeFolder
from beingvl.vbpe.visual_bpe import VisualBPE
from beingvl.vocab import LAYOUT_FILE, VocabLayout
from tests.code_folder import write_codes
from tests.command import beingvl
from tests.images.test_encode_images import save_vqgan
from tests.tiny import LAYOUT, write_model, write_tokenizer

VQGAN = {"vqgan": "sha256:" + "1" * 64}


def row(number: int, **fields: object) -> dict:
    turns = [{"from": "human", "value": "<image>\nhi"}, {"from": "gpt", "value": "yes"}]
    return {
        "id": f"r{number}",
        "image": f"{number % 4}.png",
        "category": "perception",
        "conversations": turns,
        **fields,
    }


@pytest.fixture
def inputs(tmp_path):
    """A model folder, codes of four images and a vBPE, all of one VQ-GAN."""
    write_model(tmp_path / "base")
    write_manifest(tmp_path / "base", "model", {}, {"vocab": LAYOUT.fingerprint(), **VQGAN})
    codes = np.random.default_rng(0).integers(0, 4, (4, 4, 4)).astype(np.uint16)
    folder = write_codes(tmp_path / "vq_codes", codes, LAYOUT.num_vq, VQGAN)
    assert (
        beingvl("train-vbpe", data_path=folder, output_path=tmp_path / "vbpe.json", num_merges=5)
        == 0
    )
    return tmp_path


def tokenize(inputs, rows: list, **more: object) -> int:
    (inputs / "data.json").write_text(json.dumps(rows))
    options = {
        "json_path": inputs / "data.json",
        "model_path": inputs / "base",
        "vq_codes": inputs / "vq_codes",
        "vbpe_path": inputs / "vbpe.json",
        "output_dir": inputs / "out",
        "dataset_name": "d",
    }
    return beingvl("tokenize", **{**options, **more})


def build(inputs, **more: object) -> int:
    where = {"jsonl_path": inputs / "out" / "d_vbpe.jsonl", "output_path": inputs / "shards"}
    return beingvl("build-shards", **{**where, **more})


def read(inputs, variant: str) -> list[dict]:
    return [
        json.loads(line)
        for line in (inputs / "out" / f"d_{variant}.jsonl").read_text().splitlines()
    ]


def test_both_files_hold_the_published_fields_and_decode_to_the_codes(inputs) -> None:
    assert tokenize(inputs, [row(n) for n in range(6)]) == 0
    base, merged = read(inputs, "base"), read(inputs, "vbpe")
    codes, vbpe = np.load(inputs / "vq_codes" / "codes.npy"), VisualBPE.load(inputs / "vbpe.json")
    for number, (raw, new) in enumerate(zip(base, merged, strict=True)):
        assert list(raw) == [
            "id",
            "image",
            "category",
            "conversations",
            "token_0",
            "token_image",
            "token_1",
            "target_spans",
        ]
        assert (
            LAYOUT.token_to_image_ids(np.array(raw["token_image"])).tolist()
            == codes[number % 4].ravel().tolist()
        )
        grid = vbpe.decode(LAYOUT.token_to_image_ids(np.array(new["token_image_new"])), 4, 4)
        assert grid.tolist() == codes[number % 4].tolist()
        for out, image in ((raw, raw["token_image"]), (new, new["token_image_new"])):
            start, end = out["target_spans"][0]
            assert [*out["token_0"], *image, *out["token_1"]][start:end] == out["token_1"][
                -4:
            ]  # y e s eos
    lineage = read_manifest(inputs / "out", "jsonl").lineage
    assert lineage == {"vocab": LAYOUT.fingerprint(), **VQGAN, "vbpe": vbpe.fingerprint()}


def test_rows_of_a_vocabulary_as_large_as_llama_3(tmp_path) -> None:
    layout = VocabLayout(
        num_text=128256, num_vq=8192, num_merges=8192, bos_id=128000, eos_id=128001
    )
    model, folder = tmp_path / "base", tmp_path / "vq_codes"
    for path in (model, folder):
        path.mkdir()
    write_tokenizer(model, LAYOUT)
    (model / LAYOUT_FILE).write_text(to_json(layout.to_dict()))
    write_manifest(model, "model", {}, {"vocab": layout.fingerprint(), **VQGAN})
    codes = np.random.default_rng(0).integers(0, 8192, (2, 8, 8)).astype(np.uint16)
    write_codes(folder, codes, 8192, VQGAN)
    (tmp_path / "data.json").write_text(json.dumps([row(0), row(1)]))
    where = {"json_path": tmp_path / "data.json", "output_dir": tmp_path / "out"}
    assert beingvl("tokenize", **where, vq_codes=folder, model_path=model, format="arrow") == 0
    ids = ShardReader(tmp_path / "out" / "data_base")[1].input_ids
    assert (
        ids[:2].tolist() == [128000, 128260]
        and (ids[2:66] == codes[1].ravel().astype(int) + 128261).all()
    )


def test_the_way_to_shards_and_reuse(inputs, capsys) -> None:
    text_row = row(1, image=None, category=None, conversations=row(0)["conversations"])
    for _ in range(2):
        assert tokenize(inputs, [row(0), text_row], max_rejected=1) == 0
    assert "reused" in capsys.readouterr().out
    assert build(inputs) == 0
    assert ShardReader(inputs / "shards").manifest.lineage == read_manifest(inputs / "out").lineage


def test_malformed_rows_are_listed_and_too_many_fail(inputs, capsys) -> None:
    bad = [row(1, image="none.png"), row(2, conversations=[]), row(3, image=["0.png", "1.png"])]
    assert tokenize(inputs, [row(0), *bad], max_rejected=0.8) == 0
    rejected = [
        json.loads(line) for line in (inputs / "out" / "rejected.jsonl").read_text().splitlines()
    ]
    assert [entry["index"] for entry in rejected] == [1, 2, 3]
    assert (
        "none.png" in rejected[0]["reason"]
        and "empty" in rejected[1]["reason"]
        and "placeholders" in rejected[2]["reason"]
    )
    assert tokenize(inputs, [row(0), *bad], overwrite=True) == 2
    assert "3 of 4 rows" in capsys.readouterr().err
    assert not (inputs / "out" / "manifest.json").exists()


def test_broken_lines_are_rejected_with_their_index(inputs, capsys) -> None:
    """On the way that reads the images, too; a limit that is too low for them stops the run and
    names the first.
    """
    folder = write_model_with_vqgan(inputs / "model")
    lines = [
        json.dumps(row(0, image="0.png")),
        '{"id": "cut',
        "",
        "7",
        json.dumps(row(1, image="0.png")),
    ]
    (inputs / "rows.jsonl").write_text("\n".join(lines) + "\n")
    (inputs / "0.png").write_bytes(png(0))
    command = {"json_path": inputs / "rows.jsonl", "image_path": inputs, "model_path": folder}
    command |= {"output_dir": inputs / "out", "dataset_name": "d"}
    assert beingvl("tokenize", **command) == 2
    assert (
        "2 of 4 rows" in (message := capsys.readouterr().err)
        and "line 2 is not valid JSON" in message
    )
    command |= {"max_rejected": 0.5, "rows_per_part": 2, "overwrite": True}
    assert beingvl("tokenize", **command) == 0
    assert [line["id"] for line in read(inputs, "base")] == ["r0", "r1"]
    rejected = [
        json.loads(line) for line in (inputs / "out" / "rejected.jsonl").read_text().splitlines()
    ]
    assert [(entry["index"], entry["id"]) for entry in rejected] == [(1, None), (2, None)]
    assert (
        "line 2 is not valid JSON" in rejected[0]["reason"]
        and "expected an object, found int" in rejected[1]["reason"]
    )
    assert (
        tokenize(inputs, [row(0), None, row(1)], max_rejected=0.5, output_dir=inputs / "array") == 0
    )
    assert read_manifest(inputs / "array").counts["rejected"] == 1


def test_max_length(inputs) -> None:
    assert tokenize(inputs, [row(0)], max_length=5, max_rejected=1) == 0
    assert read(inputs, "base") == []


TURNS = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yes"}]
WITH_NAN, WITH_BIG_INTEGER = (
    [{**TURNS[0], "score": score}, TURNS[1]] for score in (float("nan"), 10**30)
)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"category": 5}, "category is 5, expected a text"),
        ({"id": "cut \ud83d"}, "half of a surrogate pair"),
        ({"id": ["\ud83d"]}, "id is ['\\\\ud83d'], expected text or a whole number"),
        ({"id": True}, "id is True"),
        ({"category": "\ud83d"}, "half of a surrogate pair"),
        (
            {"image": None, "conversations": WITH_NAN},
            "Out of range float values are not JSON compliant",
        ),
        ({"conversations": WITH_BIG_INTEGER}, "BIGINT_ERROR"),
        ({"image": False}, "image is neither a path nor a list of paths"),
        ({"image": 0}, "image is neither a path nor a list of paths"),
        ({"image": {}}, "image is neither a path nor a list of paths"),
        (
            {
                "conversations": [
                    {"from": "human", "value": "a"},
                    {"from": "gpt", "value": "\ud83d"},
                ]
            },
            "half of a surrogate pair",
        ),
    ],
)
def test_a_row_that_no_file_could_hold_is_rejected_alone(inputs, change, reason) -> None:
    rows = [row(0), {**row(1), "conversations": TURNS, "image": None, **change}, row(2)]
    assert tokenize(inputs, rows, max_rejected=1) == 0
    assert [line["id"] for line in read(inputs, "base")] == ["r0", "r2"]
    assert reason in next((inputs / "out").rglob("rejected.jsonl")).read_text()
    assert beingvl("verify", inputs / "out") == 0


def test_an_image_that_cannot_be_encoded_rejects_its_own_rows_alone(inputs) -> None:
    """Though all images of a part are encoded at once."""
    codes = np.load(inputs / "vq_codes" / "codes.npy")
    assert tokenize(inputs, [row(n) for n in (0, 1, 3, 5)], output_dir=inputs / "good") == 0
    codes[2, 0, 0] = LAYOUT.num_vq
    write_codes(inputs / "vq_codes", codes, LAYOUT.num_vq, VQGAN)
    assert tokenize(inputs, [row(n) for n in (0, 1, 2, 3, 5, 6)], max_rejected=0.5) == 0
    for variant in ("base", "vbpe"):
        made, expected = (inputs / name / f"d_{variant}.jsonl" for name in ("out", "good"))
        assert made.read_bytes() == expected.read_bytes()


def test_rows_without_an_id_are_named_after_their_file_and_row(inputs) -> None:
    nameless = row(1)
    del nameless["id"]
    assert tokenize(inputs, [row(0, id=7), nameless, row(2, id=None)]) == 0
    assert [line["id"] for line in read(inputs, "base")] == ["7", "data.json-2", "data.json-3"]


def test_a_run_over_the_limit_goes_on_with_a_higher_one(inputs, capsys) -> None:
    rows = [row(0), row(1, conversations=[])]
    assert tokenize(inputs, rows, dataset_name="e") == 2
    listing = inputs / "out" / "e.parts.tmp" / "rejected.jsonl"
    assert str(listing) in capsys.readouterr().err and json.loads(listing.read_text())["index"] == 1
    assert tokenize(inputs, rows[:1]) == 0
    assert set(read_manifest(inputs / "out").files) == {
        "d_base.jsonl",
        "d_vbpe.jsonl",
        "rejected.jsonl",
    }
    assert tokenize(inputs, rows, dataset_name="e", max_rejected=0.5) == 0
    assert not list((inputs / "out").glob("e_rejected*")) and beingvl("verify", inputs / "out") == 0


@pytest.mark.parametrize("kind", ["jsonl", "arrow"])
def test_files_of_an_unfinished_run_get_into_no_manifest(inputs, monkeypatch, kind) -> None:
    class Killed(BaseException):
        pass

    def kill(*args: object) -> None:
        raise Killed

    options = {"dataset_name": "e", "format": kind}
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(DatasetFolder, "finish", kill)
        tokenize(inputs, [row(n) for n in range(4)], **options, rows_per_part=1)
    assert len(list((inputs / "out").glob("e_*"))) == 2
    assert tokenize(inputs, [row(0)]) == 0
    assert set(read_manifest(inputs / "out").files) == {
        "d_base.jsonl",
        "d_vbpe.jsonl",
        "rejected.jsonl",
    }
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr("beingvl.data.tokenize_dataset.Tokenize.write_part", kill)
        tokenize(inputs, [row(5)], **options, overwrite=True)
    assert not list((inputs / "out").glob("e_*"))
    assert tokenize(inputs, [row(5)], **options) == 0
    assert beingvl("verify", inputs / "out") == 0


def test_a_dataset_is_replaced_without_a_moment_at_which_the_others_are_incomplete(
    inputs, monkeypatch
) -> None:
    assert tokenize(inputs, [row(0)]) == 0
    assert tokenize(inputs, [row(1)], dataset_name="e", format="arrow") == 0
    removed = []

    def delete(folder: DatasetFolder) -> None:
        manifest = read_manifest(inputs / "out")
        assert list(manifest.details["datasets"]) == ["d"] and manifest.counts["rows"] == 1
        assert set(manifest.files) == {"d_base.jsonl", "d_vbpe.jsonl", "rejected.jsonl"}
        assert beingvl("verify", inputs / "out") == 0
        removed.append(folder.name)
        monkeypatch.undo()
        folder.delete_files()

    monkeypatch.setattr(DatasetFolder, "delete_files", delete)
    assert tokenize(inputs, [row(2)], dataset_name="e", format="arrow", overwrite=True) == 0
    assert removed == ["e"] and beingvl("verify", inputs / "out") == 0
    assert ShardReader(inputs / "out" / "e_base")[0].id == "r2"


def test_the_join_hashes_no_shard_again(inputs, monkeypatch) -> None:
    hashed = []
    with monkeypatch.context() as patch:
        patch.setattr(
            "beingvl.artefact.manifest.hash_file",
            lambda path, *watch: hashed.append(path.name) or hash_file(path, *watch),
        )
        assert tokenize(inputs, [row(0)], format="arrow") == 0
    assert hashed and not [name for name in hashed if name.endswith((".arrow", ".npy"))]
    assert beingvl("verify", inputs / "out") == 0


def test_shards_hold_no_id_twice_unasked(inputs, capsys) -> None:
    assert tokenize(inputs, [row(0), row(1), row(0)], format="arrow") == 2
    assert "1 rows repeat the id of another row" in capsys.readouterr().err
    assert tokenize(inputs, [row(0), row(1), row(0)], format="arrow", duplicate_ids="keep") == 0


@pytest.mark.parametrize(
    "options", [{"max_rejected": "nan"}, {"dataset_name": "../x"}, {"dataset_name": ""}]
)
def test_impossible_options_are_refused(inputs, capsys, options) -> None:
    assert tokenize(inputs, [row(0)], **options) == 2
    assert f"--{next(iter(options))} is" in capsys.readouterr().err


def test_inputs_that_contradict_each_other_are_refused(inputs, capsys) -> None:
    write_manifest(
        inputs / "vq_codes",
        "vq_codes",
        {},
        {"vqgan": "sha256:" + "2" * 64},
        {"num_codes": 16, "grid": [4, 4]},
    )
    assert tokenize(inputs, [row(0)]) == 2
    assert "do not match: they were made with different vqgan" in capsys.readouterr().err


def test_a_vbpe_too_large_for_the_vocabulary(inputs, capsys) -> None:
    options = {"output_path": inputs / "vbpe.json", "num_merges": 9, "overwrite": True}
    assert beingvl("train-vbpe", data_path=inputs / "vq_codes", **options) == 0
    assert tokenize(inputs, [row(0)]) == 2
    assert "9 merges, the model's vocabulary has room for 16 and 8" in capsys.readouterr().err


def test_reading_rows(tmp_path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"id": 1}\n{"id": 2}\n')
    assert list(stream_rows(path)) == [{"id": 1}, {"id": 2}]
    for text, message in (
        ('{"id": 1}\n{', "line 2"),
        ("[{]", "not valid JSON"),
        ("[]", "non-empty list"),
        ("[1]", "list of objects"),
    ):
        path.write_text(text)
        with pytest.raises(InputError, match=message):
            list(stream_rows(path))


def test_images_without_codes_or_folder(inputs, capsys) -> None:
    (inputs / "data.json").write_text(json.dumps([row(0)]))
    where = {"json_path": inputs / "data.json", "output_dir": inputs / "out"}
    assert beingvl("tokenize", **where, model_path=inputs / "base") == 2
    assert "--image_path" in capsys.readouterr().err


def test_several_datasets_are_made_of_images(tmp_path) -> None:
    """Every dataset has codes of its own; a repaired image is read again with --overwrite."""
    folder = write_model_with_vqgan(tmp_path / "model")
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(png(number))
    (tmp_path / "3.png").write_bytes(b"damaged")

    def of_images(name: str, *numbers: int, **options: object) -> int:
        (tmp_path / f"{name}.json").write_text(json.dumps([row(number) for number in numbers]))
        where = {"json_path": tmp_path / f"{name}.json", "output_dir": tmp_path / "pt"}
        where |= {"dataset_name": name, "model_path": folder, "image_path": tmp_path}
        return beingvl("tokenize", **{**where, **options})

    published = {"template": "being-vl-0.5", "output_dir": tmp_path / "published"}
    assert of_images("one", 0, **published) == 0
    assert read_manifest(tmp_path / "published").lineage["exif"] == "ignore"
    assert of_images("one", 0, 1) == 0 and read_manifest(tmp_path / "pt").lineage["exif"] == "apply"
    assert of_images("one", 0, 1) == 0 and of_images("two", 2) == 0 and of_images("one", 0, 1) == 0
    assert [list(CodeFolder(tmp_path / f"pt_{name}_vq_codes").keys) for name in ("one", "two")] == [
        ["0.png", "1.png"],
        ["2.png"],
    ]
    assert of_images("three", 3) == 2
    (tmp_path / "3.png").write_bytes(png(3))
    assert of_images("three", 3, overwrite=True) == 0
    (tmp_path / "2.png").write_bytes(png(4))
    assert of_images("two", 2) == 2 and of_images("two", 2, overwrite=True) == 0
    assert (
        read_manifest(tmp_path / "pt").counts["rows"] == 4
        and beingvl("verify", tmp_path / "pt") == 0
    )


def write_model_with_vqgan(folder: Path) -> Path:
    layout = VocabLayout(num_text=258, num_vq=32, num_merges=8, bos_id=256, eos_id=257)
    write_model(folder, layout)
    save_vqgan(folder / "vqgan", seed=0)
    write_manifest(
        folder,
        "model",
        {},
        {"vocab": layout.fingerprint(), **read_manifest(folder / "vqgan").lineage},
    )
    return folder


def png(number: int) -> bytes:
    return to_png(np.random.default_rng(number).integers(0, 256, (16, 16, 3), dtype=np.uint8))


def test_several_datasets_share_a_folder(inputs, capsys) -> None:
    bad = row(9, conversations=[])
    assert tokenize(inputs, [row(0), bad], max_rejected=1) == 0
    first = read(inputs, "base")
    assert tokenize(inputs, [bad, row(1), row(2)], max_rejected=1, dataset_name="e") == 0
    manifest = read_manifest(inputs / "out")
    assert manifest.counts["rows"] == 3 and set(manifest.details["datasets"]) == {"d", "e"}
    lines = [
        json.loads(line) for line in (inputs / "out" / "rejected.jsonl").read_text().splitlines()
    ]
    assert [(entry["dataset"], entry["index"]) for entry in lines] == [("d", 1), ("e", 0)]
    assert tokenize(inputs, [row(0)], dataset_name="e") == 2
    assert "e has different json" in capsys.readouterr().err
    assert tokenize(inputs, [row(3)], dataset_name="e", overwrite=True) == 0
    assert read(inputs, "base") == first and beingvl("verify", inputs / "out") == 0
    assert read_manifest(inputs / "out").counts["rows"] == 2


def test_shards_at_once_are_the_shards_of_the_jsonl(inputs) -> None:
    rows = [row(n) for n in range(6)]
    assert tokenize(inputs, rows) == 0
    assert tokenize(inputs, rows, dataset_name="a", format="arrow") == 0
    assert build(inputs, vbpe_path=inputs / "vbpe.json") == 0
    at_once, built = (
        read_manifest(inputs / "out" / "a_vbpe", "shards"),
        read_manifest(inputs / "shards", "shards"),
    )
    assert at_once.content_hash == built.content_hash and at_once.lineage == built.lineage
    parts = ("token_0", "token_image", "token_1")
    longest = max(sum(len(row[part]) for part in parts) for row in read(inputs, "base"))
    assert at_once.details[UNMERGED] == built.details[UNMERGED] == longest
    assert built.counts["longest_sample_tokens"] < longest
    assert beingvl("verify", inputs / "out" / "a_vbpe", inputs / "out") == 0


def test_long_samples_are_cut_by_choice(inputs, capsys) -> None:
    two_turns = [
        *row(0)["conversations"],
        {"from": "human", "value": "more"},
        {"from": "gpt", "value": "a long answer"},
    ]
    assert (
        tokenize(inputs, [row(0, conversations=two_turns)], max_length=35, too_long="truncate") == 0
    )
    assert "1 truncated" in capsys.readouterr().out
    (found,) = read(inputs, "base")
    assert len(found["token_0"] + found["token_image"] + found["token_1"]) == 35
    assert found["target_spans"][-1][1] <= 35
    options = {"max_length": 8, "too_long": "truncate", "max_rejected": 1, "overwrite": True}
    assert tokenize(inputs, [row(0)], **options) == 0
    assert "contain no answer" in (inputs / "out" / "rejected.jsonl").read_text()


def test_a_jsonl_that_changed_after_its_manifest(inputs, capsys) -> None:
    assert tokenize(inputs, [row(0)]) == 0
    path = inputs / "out" / "d_vbpe.jsonl"
    path.write_text(path.read_text())  # younger, but the same
    assert build(inputs) == 0
    path.write_text(path.read_text().replace("r0", "r1"))
    assert build(inputs) == 2
    assert "does not have the hash that manifest.json says" in capsys.readouterr().err


def test_rows_of_another_vbpe(inputs, capsys) -> None:
    assert tokenize(inputs, [row(0)]) == 0
    codes, other = inputs / "vq_codes", inputs / "other.json"
    assert beingvl("train-vbpe", data_path=codes, output_path=other, num_merges=2) == 0
    assert build(inputs, vbpe_path=other) == 2
    assert "different vbpe" in capsys.readouterr().err


def test_shards_say_whether_their_merged_images_were_decoded(inputs, capsys) -> None:
    assert tokenize(inputs, [row(0)]) == 0
    own_vbpe = inputs / "base" / "vbpe.json"

    def merged_images(name: str, variant: str, **options: object) -> tuple[str, str]:
        rows, output = inputs / "out" / f"d_{variant}.jsonl", inputs / name
        capsys.readouterr()
        assert build(inputs, jsonl_path=rows, output_path=output, **options) == 0
        return read_manifest(output).details["merged_images"], capsys.readouterr().out

    merged, shown = merged_images("unknown", "vbpe")
    assert merged == "not decoded" and "warning: the merged images" in shown and "--vbpe" in shown
    assert "warning: the merged images" in merged_images("unknown", "vbpe")[1]  # when it is reused
    decoded, _ = merged_images("unknown", "vbpe", vbpe_path=inputs / "vbpe.json", overwrite=True)
    assert decoded == "decoded"
    merged, shown = merged_images("raw", "base")
    assert merged == "none" and "warning" not in shown
    own_vbpe.write_bytes((inputs / "vbpe.json").read_bytes())
    assert merged_images("own", "vbpe", model_path=inputs / "base")[0] == "decoded"


def test_parts_made_without_decoding_are_not_passed_off_as_decoded(inputs, capsys) -> None:
    assert tokenize(inputs, [row(0), row(1)]) == 0
    assert build(inputs, part_bytes=600, rank=0, num_ranks=2) == 0
    assert build(inputs, part_bytes=600, vbpe_path=inputs / "vbpe.json") == 2
    assert (
        "unfinished work with different decoded (found False, asked for True)"
        in capsys.readouterr().err
    )


def test_wrong_options(inputs, capsys) -> None:
    for name, value in (("rows_per_part", 0), ("num_workers", -1), ("max_length", 0)):
        assert tokenize(inputs, [row(0)], **{name: value}) == 2
        assert f"--{name}" in capsys.readouterr().err
