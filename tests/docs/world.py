"""A folder in which the shell blocks of tutorials and how-tos run, at small size.

images/ data/ captions.csv                   digits of 12 x 12 pixels, their questions, captions
llama/ chameleon/ janus/                     a small text model; checkpoints that hold a VQ-GAN
vqgan/ vq_codes/ vq_codes_test/ vbpe/ base/  what the steps made of them
rows/ shards/ held-out-shards/
stage-1/ stage-3/ run/                       trained for a few steps
ds_configs/ scripts/ beingvl/ workspace/     as in the repository, but stages for two CPU cores
"""

from __future__ import annotations

import csv
import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.docs.pages import REPOSITORY
from tests.launcher import ENVIRONMENT, PYTHON, free_port

MAX_STEPS = 2
NUM_ROWS = 300
NUM_CAPTIONS = 500
MADE = ("vqgan", "vq_codes", "vbpe", "base", "stage-1", "stage-3")
# What pages say, and what is run instead.
SMALLER = {
    "--steps 600": "--steps 6",
    "--num_merges 8192": "--num_merges 16",
    ".sh 1": ".sh 0",  # this machine
    "/path/to/your/workspace": "$PWD/workspace",
}


def run(words: list, folder: Path, **more: str) -> str:
    environment = {**ENVIRONMENT, "NUM_RANKS": "1", "PYTHON": sys.executable, **more}
    environment.setdefault("MASTER_PORT", str(free_port()))
    environment["PATH"] = f"bin:{ENVIRONMENT['PATH']}"  # relative, so that all share a warm parent
    done = subprocess.run(
        words, cwd=folder, env=environment, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout


def make_world(folder: Path) -> None:
    """Fill the folder. Its pieces are made by the commands of the pages."""
    _copy_repository(folder)
    _write_programs(folder / "bin")
    _write_digits(folder)
    _write_checkpoints(folder)
    run(["bash", "-euc", MAKE], folder)
    _write_workspace(folder / "workspace", folder)


MAKE = """
beingvl train-vq --image_path images/train --validation_path images/validation --output vqgan \\
    --image_size 12 --grid 6 --steps 6
python scripts/make_text_llama.py --texts data/texts.txt --output_path llama --steps 3
for SPLIT in train test; do
    beingvl encode-images --image_path images --json_path data/$SPLIT.json --vqgan vqgan \\
        --output codes-$SPLIT
done
mv codes-train vq_codes; mv codes-test vq_codes_test
beingvl train-vbpe --codes vq_codes --output vbpe --num_merges 16
beingvl convert --llama_path llama --vqgan vqgan --vbpe vbpe --output base
tokenize() {
    beingvl tokenize --codes $2 --vbpe vbpe --model base --json_path $1 --output $3
}
tokenize data/train.json vq_codes rows
tokenize data/test.json vq_codes_test held-out
beingvl build-shards --jsonl_path rows/data_vbpe.jsonl --vbpe vbpe --output shards
beingvl build-shards --jsonl_path held-out/data_vbpe.jsonl --vbpe vbpe --output held-out-shards
beingvl train --config ds_configs/stage1.json --model base --data shards --output stage-1
beingvl train --config ds_configs/stage3.json --model stage-1 --data shards --output stage-3
mkdir -p run && ln -s ../stage-1 ../stage-3 ../base ../vbpe ../shards run
"""


def _write_programs(folder: Path) -> None:
    """`beingvl` and `python` whose imports are done already (tests/warm_python.py)."""
    folder.mkdir()
    for name, more in (("beingvl", "-m beingvl"), ("python", "")):
        program = folder / name
        program.write_text(f'#!/bin/sh\nexec {shlex.join(PYTHON)} {more} "$@"\n')
        program.chmod(0o755)


def _copy_repository(folder: Path) -> None:
    for name in ("scripts", "beingvl", "hostfiles"):
        (folder / name).symlink_to(REPOSITORY / name)
    (folder / "ds_configs").mkdir()
    for file in (REPOSITORY / "ds_configs").glob("*.json"):
        (folder / "ds_configs" / file.name).write_text(json.dumps(_small(file)))


def _small(file: Path) -> dict[str, Any]:
    """The stage's own rules and mixture, with the quickstart's sizes."""
    fields = json.loads((REPOSITORY / "ds_configs/quickstart-stage1.json").read_text())
    own = json.loads(file.read_text())["beingvl"]
    keep = {name: own[name] for name in ("mixture", "trainable") if name in own}
    fields["beingvl"] |= {**keep, "max_steps": MAX_STEPS}
    return fields


def _write_digits(folder: Path) -> None:
    """images/, data/ of the first rows alone, and captions.csv of the first images."""
    script = [sys.executable, "scripts/make_digits_dataset.py", "--image_size", "12"]
    run([*script, "--augmentations", "0", "--output_dir", str(folder / "data")], REPOSITORY)
    (folder / "images").symlink_to("data/images")
    for name in ("images/a.png", "new.png"):
        shutil.copy(folder / "images/test/0002-0.png", folder / name)
    rows = json.loads((folder / "data/train.json").read_text())
    captioned = [row for row in rows if row["category"] == "foundation"][:NUM_CAPTIONS]
    captions = {row["image"]: row["conversations"][1]["value"] for row in captioned}
    assert len(captions) == NUM_CAPTIONS
    with open(folder / "captions.csv", "w", newline="") as file:
        csv.writer(file).writerows([("image", "caption"), *captions.items()])
    for name in ("train", "test"):
        path = folder / f"data/{name}.json"
        path.write_text(json.dumps(json.loads(path.read_text())[:NUM_ROWS]))


def _write_checkpoints(folder: Path) -> None:
    """chameleon/ and janus/, with random weights, as transformers saves them."""
    import torch  # heavy
    from transformers import (
        ChameleonConfig,
        ChameleonForConditionalGeneration,
        JanusConfig,
        JanusForConditionalGeneration,
    )

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**sizes, "intermediate_size": 32, "num_key_value_heads": 2, "vocab_size": 64}
    vq = {"embed_dim": 8, "num_embeddings": 16, "base_channels": 32, "channel_multiplier": [1, 1]}
    vq |= {"num_res_blocks": 1, "latent_channels": 32}
    vision = {**sizes, "image_size": 12, "patch_size": 2, "projection_dim": 32, "mlp_ratio": 1}
    chameleon = ChameleonConfig(
        **text, vq_config={**vq, "resolution": 12}, vocabulary_map={"<image>": 4}
    )
    ChameleonForConditionalGeneration(chameleon).save_pretrained(folder / "chameleon")
    janus = JanusConfig(
        text_config={**text, "model_type": "llama"},
        vision_config=vision,
        vq_config={**vq, "num_patches": 6, "projection_dim": 32, "image_token_embed_dim": 32},
    )
    JanusForConditionalGeneration(janus).save_pretrained(folder / "janus")


def _write_workspace(workspace: Path, folder: Path) -> None:
    """What the page about a cluster asks its reader to bring."""
    (workspace / "models").mkdir(parents=True)
    (workspace / "data").mkdir()
    (workspace / "images").symlink_to(folder / "images")
    (workspace / "models/being-vq-8k").symlink_to(folder / "vqgan")
    (workspace / "models/llama3.1-8b").symlink_to(folder / "llama")
    for name in ("pt", "sft_stage2", "sft_stage3"):
        (workspace / f"data/{name}.json").symlink_to(folder / "data/train.json")
    (workspace / "data/test.json").symlink_to(folder / "data/test.json")
