"""The commands of docs/tutorial/captions.md on 500 of the quickstart's images."""

import csv
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from beingvl.artefact.manifest import read_manifest
from tests.command import beingvl
from tests.launcher import ENVIRONMENT, free_port

REPOSITORY = Path(__file__).parents[1]
BLOCKS = re.findall(
    r"```bash\n(.*?)```", (REPOSITORY / "docs/tutorial/captions.md").read_text(), re.DOTALL
)


def run(words: list, folder: Path, **more: str) -> str:
    environment = {**ENVIRONMENT, "MASTER_PORT": str(free_port()), **more}
    done = subprocess.run(
        words, cwd=folder, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout


def write_captions(folder: Path) -> None:
    """images/ and captions.csv, from the rows that tell of one image."""
    script = [sys.executable, "scripts/make_digits_dataset.py", "--image_size", "12"]
    run([*script, "--augmentations", "0", "--output_dir", str(folder / "data")], REPOSITORY)
    (folder / "images").symlink_to("data/images")
    captions: dict[str, str] = {}
    for row in json.loads((folder / "data/train.json").read_text()):
        captions.setdefault(row["image"], row["conversations"][1]["value"])
    with open(folder / "captions.csv", "w", newline="") as file:
        csv.writer(file).writerows([("image", "caption"), *list(captions.items())[:500]])


@pytest.mark.slow
def test_the_commands_of_the_page(tmp_path: Path) -> None:
    write_captions(tmp_path)
    pictures = {"image_path": tmp_path / "data/images/validation", "image_size": 12, "grid": 6}
    beingvl("train-vq", **pictures, output_path=tmp_path / "vqgan", steps=6)
    script = [sys.executable, "scripts/make_text_llama.py", "--steps", "3"]
    texts = ["--texts", str(tmp_path / "data/texts.txt")]
    run([*script, *texts, "--output_path", str(tmp_path / "llama")], REPOSITORY)
    config = json.loads((REPOSITORY / "ds_configs/quickstart-stage1.json").read_text())
    config["beingvl"] |= {"max_steps": 4, "mixture": {"foundation": 1.0}}
    (tmp_path / "cpu.json").write_text(json.dumps(config))
    own = {"CONFIG": "cpu.json", "NUM_MERGES": "16"}
    assert len(BLOCKS) == 4
    run(["bash", "-euc", "".join(BLOCKS)], tmp_path, **own)
    assert (
        read_manifest(tmp_path / "tokenized").details["datasets"]["captions"]["counts"][
            "rows_with_1_images"
        ]
        == 500
    )
    assert read_manifest(tmp_path / "stage-1/final").kind == "model"
