"""A small model taught on rows of either template, 150 steps on the quickstart's digits, answers
what it is asked in the template of its training: the prompt ends, and the answer stops, where its
rows do.
"""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from beingvl import BeingVL, convert, encode_images, tokenize, train_vbpe
from beingvl.artefact.manifest import read_manifest
from beingvl.images.train_vq import train_vq
from tests.launcher import PYTHON, stage_words
from tests.test_whole_line import REPOSITORY, must

QUESTION = "Which digit is this?"


def rows_of(folder: Path, split: str) -> list[dict[str, Any]]:
    """Those that ask which digit it is, one per image."""
    rows = json.loads((folder / f"data/{split}.json").read_text())
    return [row for row in rows if row["conversations"][0]["value"] == f"<image>\n{QUESTION}"]


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """Digits, their codes and merges, and a base made of a text model, as in the quickstart."""
    folder = tmp_path_factory.mktemp("taught")
    scripts = REPOSITORY / "scripts"
    size = ["--image_size", 12, "--augmentations", 3]
    data = ["--output_dir", folder / "data", *size]
    must([sys.executable, scripts / "make_digits_dataset.py", *data])
    texts = ["--texts", folder / "data/texts.txt", "--output_path", folder / "llama"]
    options = ["--vocab_size", 448, "--steps", 60]
    must([sys.executable, scripts / "make_text_llama.py", *texts, *options])
    rows = [row for row in rows_of(folder, "train") if row["category"] == "perception"]
    (folder / "train.json").write_text(json.dumps(rows))
    images, vqgan = folder / "data/images", folder / "vqgan"
    train_vq(images / "train", vqgan, image_size=12, grid=6, steps=150)
    encode_images(images, vqgan, folder / "codes", keys=[row["image"] for row in rows])
    train_vbpe(folder / "codes", folder / "vbpe", num_merges=16)
    made_of = {"being_vq_path": vqgan, "vbpe": folder / "vbpe", "init": "codebook"}
    convert(folder / "llama", folder / "base", **made_of)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("template", ["default", "being-vl-0.5"])
def test_it_answers_in_the_template_of_its_training(work, template) -> None:
    inputs = {"vq_codes": work / "codes", "vbpe_path": work / "vbpe", "dataset_name": "digits"}
    shards, stage = work / f"shards-{template}", work / f"stage-{template}"
    base = work / "base"
    form = {"format": "arrow", "template": template}
    tokenize(work / "train.json", base, shards, **inputs, **form)
    config = REPOSITORY / "ds_configs/quickstart-stage3.json"
    words = stage_words(config, base, shards / "digits_vbpe", stage)
    values = {"max_steps": 150, "mixture": '{"perception": 1}', "epochs": 20}
    changed = [f"beingvl.{name}={value}" for name, value in values.items()]
    must([*PYTHON, "-m", "beingvl", "train", *words, "--set", *changed, "optimizer.params.lr=3e-3"])
    assert read_manifest(stage / "final").details["template"] == template

    rows = rows_of(work, "test")
    model = BeingVL(stage / "final", work / "vbpe").load_model(device="cpu")
    pictures = [work / "data/images" / row["image"] for row in rows]
    answers = model.generate_with_vbpe([QUESTION] * len(rows), pictures, max_new_tokens=8)
    right = [row["conversations"][1]["value"] for row in rows]
    share = sum(map(str.__eq__, answers, right)) / len(rows)
    print(f"{template}: {share:.1%} of {len(rows)} answers are right")
    assert len(rows) > 300 and share >= 0.8
