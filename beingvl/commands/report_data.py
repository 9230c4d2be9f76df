"""The contents of shards, as one self-contained HTML page.

    beingvl report data shards/… [--config stage1.json] [--vqgan vqgan --vbpe vbpe]

Counts, lengths, packing efficiency, token kinds, visual rows that never occur, and examples. With a
stage's JSON: what its mixture draws. With a VQ-GAN that has a decoder, and the shards' vBPE: the
examples' images. A folder of shard folders, as `beingvl tokenize --format arrow` writes, means all
of them.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from beingvl.commands.options import add_overrides, options_of
from beingvl.commands.parser import FILE, VBPE, VQGAN, Input


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("shards", nargs="+", type=FILE, help="shard folders, or folders of them")
    page = "HTML file to write"
    add("--output", dest="output_path", type=Path, default=Path("data_report.html"), help=page)
    model = "model folder whose tokenizer shows the examples' text"
    add("--model", dest="model_path", type=Input("model"), help=model)
    add("--vbpe", dest="vbpe_path", type=VBPE, help="vbpe.json, to turn merged images into codes")
    vq = "VQ-GAN folder with a decoder, to show the examples' images"
    add("--vqgan", dest="vq_path", type=VQGAN, help=vq)
    stage = "a stage's JSON: shows what its mixture draws from the shards"
    add("--config", dest="deepspeed_config", type=FILE, help=stage)
    add_overrides(parser)
    length = "tokens per sequence, for the packing efficiency without a stage"
    add("--sequence_length", type=int, default=4096, help=length)
    examples = "examples per folder, from all sources"
    add("--num_examples", type=int, default=6, help=examples)


def run(args: argparse.Namespace) -> None:
    from beingvl.report.data import report_data  # here, so that --help is instant

    report_data(**options_of(args))
