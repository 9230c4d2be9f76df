"""[3] LLaVA JSON + images (or vq_codes/) + vbpe.json -> token rows in JSONL, or straight to
Arrow shards.

Steps, in order:
  1. image codes      from --vq_codes, or encoded now with the model folder's VQ-GAN into
                      OUTPUT_DIR_NAME_vq_codes
  2. stream_rows      one row after the other, whatever the size of the file; every 4096 rows
                      are a part (beingvl/artefact/parts.py)
  3. tokenize_part    in --num_workers processes; a broken line or malformed row goes to
                      rejected.jsonl with index and reason
  4. join             NAME_base.jsonl (VQ codes) and NAME_vbpe.jsonl (merged), one row a sample;
                      --format arrow: folders of shards
  5. manifest.json    last; several datasets may share OUTPUT_DIR, each is added to the manifest
                      when it is finished

A row: id, image, category, conversations, token_0, token_image (codes), token_image_new (merged),
token_1, and target_spans (start, end) in token_0 + image + token_1. Ranks, workers and kills do not
change a byte.
"""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from beingvl.commands.ranks import add_rank_arguments

    parser.add_argument(
        "--mode",
        choices=["pt", "sft"],
        default="sft",
        help="category of rows that name none: pt foundation, sft instruction",
    )
    parser.add_argument(
        "--json_path", type=Path, required=True, help="LLaVA-format JSON array or JSONL"
    )
    parser.add_argument(
        "--image_path", type=Path, help="folder that the rows' image paths start from"
    )
    parser.add_argument(
        "--output_dir", "--output_path", type=Path, required=True, help="folder to write"
    )
    parser.add_argument(
        "--model_path",
        type=Path,
        required=True,
        help="Being-VL model folder: tokenizer, vocabulary layout, VQ-GAN",
    )
    parser.add_argument(
        "--vbpe_path", type=Path, help="vbpe.json; without it only NAME_base.jsonl is written"
    )
    parser.add_argument(
        "--vq_codes",
        type=Path,
        help="folder of encode-images; without it the images are encoded now, beside --output_dir",
    )
    parser.add_argument("--dataset_name", default="data", help="NAME in the output files' names")
    parser.add_argument(
        "--template", choices=["default", "being-vl-0.5"], default="default", help="chat template"
    )
    parser.add_argument(
        "--format",
        choices=["jsonl", "arrow"],
        default="jsonl",
        help="JSONL files, or folders of shards at once",
    )
    parser.add_argument(
        "--max_length",
        type=int,
        help="longest sample, in tokens; the longer one of a row's two variants counts",
    )
    parser.add_argument(
        "--too_long",
        choices=["reject", "truncate"],
        default="reject",
        help="what happens to samples over --max_length",
    )
    parser.add_argument(
        "--rows_per_part",
        type=int,
        default=4096,
        help="rows that are finished, or lost by a kill, together",
    )
    parser.add_argument(
        "--duplicate_ids",
        choices=["refuse", "keep"],
        default="refuse",
        help="two rows with one id in --format arrow: an error, or two samples (for JSONL "
        "build-shards asks)",
    )
    parser.add_argument(
        "--max_rejected",
        type=float,
        default=0.01,
        help="fail when more than this share of rows is rejected",
    )
    parser.add_argument(
        "--batch_size", type=int, default=16, help="images a batch, when images are encoded now"
    )
    parser.add_argument(
        "--num_workers", type=int, default=1, help="processes that tokenize, or decode images"
    )
    parser.add_argument(
        "--torch_dtype",
        default="float32",
        choices=["float32", "bfloat16"],
        help="of the VQ-GAN, when images are encoded now",
    )
    add_rank_arguments(parser)
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace this dataset, finished or not, and codes made for it",
    )


def run(args: argparse.Namespace) -> None:
    from beingvl.data.tokenize_dataset import run as step

    step(args)
