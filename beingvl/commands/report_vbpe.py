"""What a vBPE vocabulary learnt, as one self-contained HTML page and the PNG files in it.

    beingvl report vbpe vbpe.json [--codes vq_codes/] [--vq vq/]

With --codes: compression against number of merges, most used tokens, example images with their
tokens' borders. With --vq as well, tokens and examples are shown as pixels; otherwise every code
has a colour of its own.
"""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("vbpe", type=Path, help="vbpe.json, or the folder it lies in")
    parser.add_argument(
        "--codes",
        "--vq_codes",
        nargs="+",
        type=Path,
        default=[],
        help="VQ codes (folder or .npy) to measure on; best not those it learnt from",
    )
    parser.add_argument(
        "--vq",
        "--vq_path",
        type=Path,
        help="VQ-GAN folder with a decoder, to show pixels instead of colours",
    )
    parser.add_argument(
        "--max_images", type=int, default=2000, help="measure on a sample of this many images"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument(
        "--output_path",
        type=Path,
        help="folder for report.html and the PNG files (default: vbpe_report beside vbpe.json)",
    )


def run(args: argparse.Namespace) -> None:
    from beingvl.report.vbpe import report_vbpe  # here, so that --help is instant

    report_vbpe(
        args.vbpe,
        codes=args.codes,
        vq=args.vq,
        max_images=args.max_images,
        seed=args.seed,
        output_path=args.output_path,
    )
