"""The quickstart's data: split by image, augmented in training only, every answer true."""

import importlib.util
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from beingvl.artefact.manifest import verify_folder

SCRIPT = Path(__file__).parents[1] / "scripts" / "make_digits_dataset.py"
_spec = importlib.util.spec_from_file_location("make_digits_dataset", SCRIPT)
digits = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(digits)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    output = tmp_path_factory.mktemp("digits") / "digits"
    assert digits.main(["--output_dir", str(output), "--augmentations", "1"]) == 0
    return output


def rows(folder, part):
    return json.loads((folder / f"{part}.json").read_text())


def scan_of(row):
    return int(Path(row["image"]).stem.split("-")[0])


def truth(question, digit):
    """Answers worked out anew, from the wording alone."""
    if "even" in question:
        return "yes" if digit in (0, 2, 4, 6, 8) else "no"
    if "greater" in question:
        return "yes" if digit in (5, 6, 7, 8, 9) else "no"
    return ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"][digit]


def test_no_scan_is_in_two_parts_and_every_digit_in_all(folder):
    target = load_digits().target
    scans = {
        part: {scan_of(row) for row in rows(folder, part)}
        for part in ("train", "validation", "test")
    }
    assert sum(map(len, scans.values())) == len(set.union(*scans.values())) == 1797
    assert [len(part) for part in scans.values()] == [1201, 200, 396]
    for part in scans.values():
        shares = np.bincount(target[sorted(part)], minlength=10) / len(part)
        np.testing.assert_allclose(shares, np.bincount(target) / 1797, atol=0.01)


def test_every_answer_is_true(folder):
    target = load_digits().target
    for part in ("train", "validation", "test"):
        for row in rows(folder, part):
            digit, turns = target[scan_of(row)], row["conversations"]
            assert turns[0]["value"].startswith("<image>\n") and [
                turn["from"] for turn in turns
            ] == ["human", "gpt"] * (len(turns) // 2)
            for question, reply in zip(turns[::2], turns[1::2], strict=True):
                assert "<image>" not in question["value"].removeprefix("<image>\n")
                if row["category"] == "foundation":
                    words = reply["value"].lower().replace(",", "").replace(".", "").split()
                    assert [word for word in words if word in digits.WORDS] == [
                        truth("name", digit)
                    ]
                else:
                    assert reply["value"] == truth(question["value"].lower(), digit)


def test_training_has_all_categories_and_longer_conversations(folder):
    training = rows(folder, "train")
    num_images = len(list((folder / "images" / "train").iterdir()))
    assert num_images == 2 * 1201
    assert Counter(row["category"] for row in training) == dict.fromkeys(
        ("foundation", "perception", "reasoning", "instruction"), num_images
    )
    conversations = [row["conversations"] for row in training if row["category"] == "instruction"]
    assert {len(turns) for turns in conversations} == {6}
    assert all(
        turns[1]["value"] in digits.WORDS for turns in conversations
    )  # the digit is named first
    assert len({row["id"] for row in training}) == len(training)
    assert {turns[0]["value"] for turns in conversations} == {
        f"<image>\n{text}" for text in digits.INSTRUCTIONS[digits.WHICH]
    }
    assert "Answer with yes or no: is it even?" in {turns[2]["value"] for turns in conversations}


@pytest.mark.parametrize("part", ["validation", "test"])
def test_scoring_rows_ask_each_question_once(folder, part):
    asked = Counter(scan_of(row) for row in rows(folder, part))
    assert set(asked.values()) == {3}
    expected = {
        ("perception", "<image>\nWhich digit is this?"),
        ("reasoning", "<image>\nIs it even?"),
        ("reasoning", "<image>\nIs it greater than four?"),
    }
    assert {
        (row["category"], row["conversations"][0]["value"]) for row in rows(folder, part)
    } == expected
    assert all(len(row["conversations"]) == 2 for row in rows(folder, part))


def test_images_are_real_and_only_training_is_augmented(folder):
    scans = load_digits().images
    for part in ("train", "validation", "test"):
        for path in sorted((folder / "images" / part).iterdir())[:40]:
            image = Image.open(path)
            assert (image.mode, image.size) == ("RGB", (16, 16))
            index, number = map(int, path.stem.split("-"))
            assert number == 0 or part == "train"
            shrunk = np.asarray(image)[..., 0].reshape(8, 2, 8, 2).mean((1, 3)) * 16 / 255
            similarity = np.corrcoef(shrunk.ravel(), scans[index].ravel())[0, 1]
            assert similarity > (0.95 if number == 0 else 0.4)


def test_augmented_copies_differ_and_stay_in_place(folder):
    plain, varied = (
        np.asarray(Image.open(path)).astype(int)
        for path in sorted((folder / "images" / "train").iterdir())[:2]
    )
    assert np.abs(plain - varied).max() > 20
    scan = load_digits().images[3]
    np.testing.assert_array_equal(digits.render(scan, 8), np.round(scan * 255 / 16))
    shifted = digits.render(scan, 8, shift=(1.0, 0.0))
    np.testing.assert_array_equal(shifted[1:], digits.render(scan, 8)[:-1])


def test_texts_hold_the_language_and_no_row(folder):
    lines = (folder / "texts.txt").read_text().splitlines()
    assert len(lines) == len(set(lines)) > 200
    assert {"Seven is odd.", "Seven is greater than four.", "Is seven even? no"} <= set(lines)
    words = {word for line in lines for word in line.split()}
    for row in rows(folder, "train"):
        for turn in row["conversations"]:
            assert set(turn["value"].replace("<image>", "").split()) <= words


def test_the_same_arguments_give_the_same_bytes_and_are_reused(folder, tmp_path, capsys):
    again = ["--output_dir", str(tmp_path / "again"), "--augmentations", "1"]
    assert digits.main(again) == 0
    assert verify_folder(tmp_path / "again").content_hash == verify_folder(folder).content_hash
    capsys.readouterr()
    assert digits.main(again) == 0
    assert "reused" in capsys.readouterr().out
    assert digits.main([*again, "--seed", "1"]) == 2
    assert "with different seed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--image_size", "4", "expected at least 8"),
        ("--augmentations", "-1", "from 0"),
        ("--seed", "-1", "from 0"),
    ],
)
def test_wrong_arguments_are_refused(tmp_path, capsys, option, value, message):
    assert digits.main(["--output_dir", str(tmp_path / "digits"), option, value]) == 2
    assert message in capsys.readouterr().err
