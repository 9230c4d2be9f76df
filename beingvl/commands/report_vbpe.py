"""What a vBPE vocabulary learnt, as one self-contained HTML page and its pictures as PNG files.

    beingvl report vbpe vbpe.json [--codes vq_codes/] [--vqgan vqgan/]

With --codes: compression against number of merges, most used tokens, example images with token
borders. With --vqgan, tokens and examples are shown as pixels; otherwise every code has its own
colour.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from beingvl.commands.options import options_of
from beingvl.commands.parser import FILE, VBPE, VQGAN


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("vbpe", type=VBPE, help="vbpe.json, or its folder")
    codes = "VQ codes (folder or .npy) to measure on; preferably not those it learnt from"
    add("--codes", nargs="+", type=FILE, default=[], help=codes)
    vq = "VQ-GAN folder with a decoder, to show pixels instead of colours"
    add("--vqgan", dest="vq", type=VQGAN, help=vq)
    add("--max_images", type=int, default=2000, help="measure on a sample of this many images")
    add("--seed", type=int, default=0, help="seed of the sample")
    folder = "folder for report.html and the PNG files (default: vbpe_report beside vbpe.json)"
    add("--output", dest="output_path", type=Path, help=folder)


def run(args: argparse.Namespace) -> None:
    from beingvl.report.vbpe import report_vbpe  # here, so that --help is instant

    report_vbpe(**options_of(args))
