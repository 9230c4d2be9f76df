"""Rows in every dialect and container -> shards, against LLaVA JSON and a folder of images.

    python -m tests.benchmarks.formats --folder FOLDER     --tiny takes seconds, in its own folder

`--rows` synthetic rows, each of one picture of 8 x 8 pixels and one answer, are written in every
form of tests/data/forms.py. `beingvl tokenize --format arrow` of each, images encoded on the way,
runs in a process of its own on one thread, two at a time, with LLaVA JSON and a folder again and
again between the others (the median counts); its time starts after the imports. The VQ-GAN is as
small as one can be, so that rows and pictures, not its convolutions, are what takes time. A table
and, last, one JSON line:

    rate_ratio      form -> rows a second, over those of LLaVA JSON and a folder; cpu_ratio: of
                    CPU seconds, where others use the machine
    private_bytes   the most that a form's process held of its own, beyond its imports
    equal           whether every form gave the same shards to the byte, but for ids and keys
"""

from __future__ import annotations

import argparse
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import JanusVQVAE, JanusVQVAEConfig

from beingvl.images.vqgan import VQGAN, make_processor
from beingvl.model.convert_llama import convert
from tests.data.forms import Fact, every_form, llava, write_json, write_pictures
from tests.model.small_models import write_base_model

REFERENCE = "llava json and a folder"
BETWEEN = 9  # other forms
PROGRAM = Path(__file__).parent / "data_programs" / "one_format.py"


class Facts(Sequence[Fact]):
    """Made when they are asked for."""

    def __init__(self, count: int) -> None:
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, number: int) -> Fact:  # type: ignore[override]
        if not 0 <= number < self._count:
            raise IndexError
        pixels = np.random.default_rng(number).integers(0, 256, (8, 8, 3), np.uint8)
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG")
        return Fact(number, file.getvalue(), f"hi yes {'hi ' * (number % 7)}ok")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--folder", type=Path, help="scratch folder, kept; default: a temporary one")
    add("--rows", type=int, default=100_000)
    add("--repeats", type=int, default=1, help="runs of each form, in turn; medians count")
    add("--jobs", type=int, default=2, help="forms at a time, each on a core of its own")
    add("--only", default="", help="only forms with this in their name")
    add("--tiny", action="store_true", help="see that it runs, in seconds")
    args = parser.parse_args()
    if args.tiny:
        args.rows, args.repeats, args.only = 40, 1, "texts parquet"
    with tempfile.TemporaryDirectory() as scratch:
        args.folder = args.folder or Path(scratch)
        measure(args)


def measure(args: argparse.Namespace) -> None:
    folder: Path = args.folder
    (folder / "forms").mkdir(parents=True)
    save_small_vqgan(folder / "vqgan")
    write_base_model(folder / "llama")
    convert(folder / "llama", folder / "base", being_vq_path=folder / "vqgan", num_merges=0)
    inputs = dict(write_inputs(folder, Facts(args.rows), args.only))
    order = []
    for number, name in enumerate(list(inputs)[1:] * args.repeats):
        order += [REFERENCE, name] if number % BETWEEN == 0 else [name]
    found: dict[str, list[dict]] = {name: [] for name in inputs}
    with ThreadPoolExecutor(args.jobs) as jobs:
        runs = jobs.map(lambda name: run(folder, *inputs[name]), order)
        for name, one in zip(order, runs, strict=True):
            found[name].append(one)
            print(f"{name}: {one['seconds']:.0f} s", file=sys.stderr, flush=True)
    line: dict[str, object] = {}
    for key, time in (("rate_ratio", "seconds"), ("cpu_ratio", "cpu_seconds")):
        spent = {name: statistics.median(one[time] for one in runs) for name, runs in found.items()}
        line[key] = ratios = {name: spent[REFERENCE] / value for name, value in spent.items()}
        print(f"{args.rows:,} rows, {time}")
        for name, value in spent.items():
            print(f"  {name:<28} {value:8.1f} {args.rows / value:8.0f} rows/s {ratios[name]:6.2f}")
    every = [one for runs in found.values() for one in runs]
    line["private_bytes"] = max(one["private_bytes"] for one in every)
    line["equal"] = len({one["hash"] for one in every}) == 1
    print(json.dumps(line))


def save_small_vqgan(folder: Path) -> None:
    """8 x 8 pixels to as many codes."""
    torch.manual_seed(0)
    sizes = {"embed_dim": 4, "num_embeddings": 32, "latent_channels": 8, "base_channels": 32}
    layers = {"num_res_blocks": 0, "channel_multiplier": [1], "num_patches": 8}
    model = JanusVQVAE(JanusVQVAEConfig(**sizes, **layers, initializer_range=0.2))
    VQGAN(model, make_processor(8)).save(folder)


def write_inputs(
    folder: Path, facts: Facts, only: str
) -> Iterator[tuple[str, tuple[Path, Path | None]]]:
    """Name, rows, and the folder of their images, where they do not hold them."""
    made = list(facts)
    write_pictures(folder / "images", made)
    rows = write_json(folder / "rows", [llava(fact, fact.file) for fact in made])
    yield REFERENCE, (rows, folder / "images")
    for name, path, holds_pictures in every_form(folder / "forms", made):
        if only in name:
            yield name, (path, None if holds_pictures else folder / "images")


def run(folder: Path, rows: Path, images: Path | None) -> dict:
    words = [str(folder / "base"), str(rows), *([str(images)] if images else [])]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(PROGRAM), *words]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
