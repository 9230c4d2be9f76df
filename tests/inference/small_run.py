"""A run folder of the quickstart's layout with random tiny models, made in a second: nothing in
it has learnt anything.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
from PIL import Image

from beingvl.artefact.files import to_json
from beingvl.artefact.manifest import read_manifest, start_folder, write_manifest
from beingvl.commands.main import main
from beingvl.vbpe.visual_bpe import VisualBPE
from beingvl.vocab import VocabLayout
from tests.model.small_models import NUM_CODES, write_vbpe, write_vqgan
from tests.tiny import LAYOUT, write_model

QUESTIONS = {"Which digit is this?": ("one", "two", "three"), "Is it even?": ("yes", "no")}
STAGES = ("base", "stage-1", "stage-2", "stage-3")


def write_images(folder: Path, count: int = 12, side: int = 16) -> list[str]:
    """Random PNG files; returns their keys."""
    (folder / "test").mkdir(parents=True)
    random = np.random.default_rng(0)
    keys = [f"test/{number:04d}.png" for number in range(count)]
    for key in keys:
        Image.fromarray(random.integers(0, 256, (side, side, 3), np.uint8)).save(folder / key)
    return keys


def write_questions(path: Path, keys: list[str]) -> Path:
    """Every question about every image; answers take turns."""
    rows = [
        {
            "id": f"{number}-{turn}",
            "image": key,
            "conversations": [
                {"from": "human", "value": f"<image>\n{question}"},
                {"from": "gpt", "value": answers[number % len(answers)]},
            ],
        }
        for number, key in enumerate(keys)
        for turn, (question, answers) in enumerate(QUESTIONS.items())
    ]
    path.write_text(json.dumps(rows))
    return path


def write_being_vl(
    folder: Path, vqgan: Path, vbpe: VisualBPE, seed: int = 0, layout: VocabLayout = LAYOUT
) -> Path:
    """`tests.tiny.write_model` with the VQ-GAN inside and the lineage that `beingvl convert`
    writes.
    """
    assert layout.num_vq == NUM_CODES
    write_model(folder, layout, seed=seed)
    start_folder_keeping_files(folder)
    shutil.copytree(vqgan, folder / "vqgan")
    lineage = {
        **read_manifest(vqgan).lineage,
        "vocab": layout.fingerprint(),
        "vbpe": vbpe.fingerprint(),
    }
    write_manifest(folder, "model", {}, lineage)
    return folder


def start_folder_keeping_files(folder: Path) -> None:
    (folder / "manifest.json").unlink()


def write_run(folder: Path) -> Path:
    """data/, vqgan/, vq_codes/test/, vbpe/, base/, stage-N/{final,metrics.jsonl}, eval/…"""
    keys = write_images(folder / "data" / "images")
    json_path = write_questions(folder / "data" / "test.json", keys)
    vqgan = write_vqgan(folder / "vqgan")
    (folder / "vbpe").mkdir()
    vbpe = write_vbpe(folder / "vbpe" / "vbpe.json", vqgan)
    codes = folder / "vq_codes" / "test"
    command = [
        "encode-images",
        f"--image_path={folder / 'data' / 'images'}",
        f"--vq_path={vqgan}",
        f"--output_path={codes}",
    ]
    assert main(command) == 0
    for seed, stage in enumerate(STAGES):
        model = write_being_vl(
            folder / "base" if stage == "base" else folder / stage / "final", vqgan, vbpe, seed
        )
        if stage != "base":
            rows = [
                {"step": step, "loss": 3.0 / step, "peak_memory_bytes": 1000 * seed + step}
                for step in range(1, 9)
            ]
            (folder / stage / "metrics.jsonl").write_text(
                "".join(json.dumps(row) + "\n" for row in rows)
            )
        assert evaluate(model, folder, json_path, folder / "eval" / stage) == 0
    return folder


def evaluate(model: Path, run: Path, json_path: Path, output: Path, *more: str) -> int:
    options = [
        f"--model={model}",
        f"--vbpe_path={run / 'vbpe' / 'vbpe.json'}",
        f"--json_path={json_path}",
    ]
    options += [
        f"--vq_codes={run / 'vq_codes' / 'test'}",
        f"--output_path={output}",
        "--max_new_tokens=4",
        "--device=cpu",
    ]
    return main(["evaluate", *options, *more])


def overwrite_summary(folder: Path, **fields: object) -> None:
    """Change scores.json of a finished evaluation, manifest included."""
    manifest = read_manifest(folder, "evaluation")
    summary = json.loads((folder / "scores.json").read_text()) | fields
    predictions = (folder / "predictions.jsonl").read_text()
    start_folder(folder, "evaluation")
    (folder / "scores.json").write_text(to_json(summary))
    (folder / "predictions.jsonl").write_text(predictions)
    write_manifest(folder, "evaluation", manifest.counts, manifest.lineage, manifest.details)
