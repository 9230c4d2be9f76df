"""The inputs of the data steps, and every step's finished output, made once."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from beingvl.artefact.manifest import read_manifest, write_manifest
from beingvl.commands import main as cli
from tests.images.test_encode_images import save_vqgan
from tests.tiny import LAYOUT, write_model


@pytest.fixture(scope="session")
def inputs(tmp_path_factory) -> Path:
    """Images, a VQ-GAN, a model folder and LLaVA rows, with some that must be rejected."""
    folder = tmp_path_factory.mktemp("inputs")
    rng = np.random.default_rng(0)
    (folder / "images").mkdir()
    for number in range(40):
        Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(
            folder / "images" / f"{number}.png"
        )
    (folder / "images" / "7.png").write_bytes(b"no image")
    save_vqgan(folder / "vqgan", seed=0)
    vqgan = read_manifest(folder / "vqgan").lineage["vqgan"]
    layout = LAYOUT.__class__(num_text=258, num_vq=32, num_merges=8, bos_id=256, eos_id=257)
    write_model(folder / "base", layout)
    write_manifest(folder / "base", "model", {}, {"vocab": layout.fingerprint(), "vqgan": vqgan})
    turns = [{"from": "human", "value": "<image>\nhi"}, {"from": "gpt", "value": "yes"}]
    rows = [{"id": f"r{n}", "image": f"{n % 40}.png", "conversations": turns} for n in range(400)]
    (folder / "rows.json").write_text(json.dumps(rows))
    assert cli.main(commands(folder, folder)["encode-images"]) == 0
    assert (
        cli.main(
            [
                "train-vbpe",
                "--data_path",
                f"{folder}/encode-images",
                "--output_path",
                f"{folder}/vbpe.json",
                "--num_merges=5",
            ]
        )
        == 0
    )
    assert cli.main(commands(folder, folder)["tokenize"]) == 0
    assert cli.main(commands(folder, folder)["build-shards"]) == 0
    return folder


def commands(inputs: Path, output: Path) -> dict[str, list[str]]:
    """Every step in many small parts; what it writes is OUTPUT/NAME."""
    encode = [
        f"--image_path={inputs}/images",
        f"--vq_path={inputs}/vqgan",
        "--images_per_part=3",
        "--batch_size=2",
    ]
    tokenize = [
        f"--json_path={inputs}/rows.json",
        f"--vq_codes={inputs}/encode-images",
        f"--vbpe_path={inputs}/vbpe.json",
    ]
    tokenize += [
        f"--model_path={inputs}/base",
        f"--output_dir={output}/tokenize",
        "--rows_per_part=16",
    ]
    build = [
        f"--jsonl_path={inputs}/tokenize/data_vbpe.jsonl",
        "--part_bytes=10000",
        "--num_workers=0",
    ]
    build += [f"--vbpe_path={inputs}/vbpe.json"]
    return {
        "encode-images": [
            "encode-images",
            *encode,
            f"--output_path={output}/encode-images",
            "--max_rejected=0.1",
        ],
        "tokenize": ["tokenize", *tokenize, "--max_rejected=0.1"],
        "build-shards": ["build-shards", *build, f"--output_path={output}/build-shards"],
    }
