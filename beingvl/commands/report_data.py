"""What shards hold, as one self-contained HTML page.

    beingvl report data shards/… [--deepspeed_config stage1.json] [--vq_path vqgan --vbpe_path vbpe]

Counts, lengths, packing efficiency, kinds of tokens, new rows that never occur, and examples. With
a stage's JSON: what its mixture draws. With a VQ-GAN that has a decoder, and the shards' vBPE: the
examples' images. A folder that holds folders of shards, as `beingvl tokenize --format arrow`
writes it, stands for all of them.
"""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shards", nargs="+", type=Path, help="shard folders, or folders of them")
    parser.add_argument(
        "--output_path", type=Path, default=Path("data_report.html"), help="HTML file to write"
    )
    parser.add_argument(
        "--model_path", type=Path, help="model folder whose tokenizer shows the examples' text"
    )
    parser.add_argument(
        "--vbpe_path", type=Path, help="vbpe.json, to turn merged images into codes"
    )
    parser.add_argument(
        "--vq_path", type=Path, help="VQ-GAN folder with a decoder, to show the examples' images"
    )
    parser.add_argument(
        "--deepspeed_config",
        type=Path,
        help="a stage's JSON: shows what its mixture draws from the shards",
    )
    parser.add_argument(
        "--sequence_length",
        type=int,
        default=4096,
        help="tokens per sequence, for the packing efficiency without a stage",
    )
    parser.add_argument(
        "--num_examples", type=int, default=6, help="examples per folder, of every source in turn"
    )


def run(args: argparse.Namespace) -> None:
    from beingvl.report.data import report_data  # here, so that --help is instant

    report_data(
        args.shards,
        output_path=args.output_path,
        model_path=args.model_path,
        vbpe_path=args.vbpe_path,
        vq_path=args.vq_path,
        deepspeed_config=args.deepspeed_config,
        sequence_length=args.sequence_length,
        num_examples=args.num_examples,
    )
