"""[4] LLaVA JSON + images (or vq_codes/) + vbpe.json -> token rows in JSONL, or Arrow shards.

    beingvl tokenize --json_path train.json --codes vq_codes/ --vbpe vbpe/ \\
        --model base/ --output tokenized/

Writes NAME_base.jsonl (VQ codes) and NAME_vbpe.jsonl (merged), one token row per sample; --format
arrow writes shard folders directly. Broken lines and malformed dataset rows go to rejected.jsonl
with index and reason. Several datasets may share --output: each is added to the manifest when it is
finished.

A token row: id, image, category, conversations, token_0, token_image (codes), token_image_new
(merged), token_1, and target_spans (start, end) in token_0 + image + token_1. Ranks, workers and
kills do not change a byte.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from beingvl.commands.options import (
    ENCODER,
    ENCODER_DTYPES,
    EXIF,
    add_rank_arguments,
    add_row_format,
    options_of,
    share,
)
from beingvl.commands.parser import PLACE


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    mode = "category for dataset rows without one: foundation for pt, instruction for sft"
    add("--mode", choices=["pt", "sft"], default="sft", help=mode)
    rows = "dataset: JSON, JSONL, CSV, TSV (also .gz, .zst), parquet, Arrow, tar; files or folders"
    add("--json_path", nargs="+", required=True, help=rows)
    add_row_format(parser)
    images = "root folder of the rows' image paths, or tar files or tables with the images"
    add("--image_path", type=PLACE, nargs="+", help=images)
    add("--output", dest="output_path", type=Path, required=True, help="folder to write")
    model = "Being-VL model folder: tokenizer, vocabulary layout, VQ-GAN"
    add("--model", dest="model_path", type=Path, required=True, help=model)
    vbpe = "vbpe.json; without it only NAME_base.jsonl is written"
    add("--vbpe", dest="vbpe_path", type=Path, help=vbpe)
    for name, meaning in (
        ("init_size", "number of codes of the vBPE"),
        ("vocab_pad", "offset that a published vBPE adds to each code"),
        ("vocab_end", "token of its first merge"),
    ):
        add(f"--vbpe_{name}", type=int, help=f"{meaning}; only checked against the layout")
    codes = "folder written by encode-images; without it, images are encoded now, beside --output"
    add("--codes", dest="vq_codes", type=Path, help=codes)
    add("--dataset_name", default="data", help="NAME in the output files' names")
    templates = ["default", "being-vl-0.5"]
    add("--template", choices=templates, help="chat template; default: the model's")
    positions = "positions of image tokens; default: the model's, see docs/explanation/vbpe.md"
    add("--image_positions", choices=["running", "anchor"], help=positions)
    formats = "JSONL files, or shard folders directly"
    add("--format", choices=["jsonl", "arrow"], default="jsonl", help=formats)
    length = "longest sample, in tokens; the longer of a sample's two variants counts"
    add("--max_length", type=int, help=length)
    too_long = "what happens to samples over --max_length"
    add("--too_long", choices=["reject", "truncate"], default="reject", help=too_long)
    part = "dataset rows per part; a kill loses only unfinished parts"
    add("--rows_per_part", type=int, default=4096, help=part)
    twice = "with --format arrow: two rows with the same id are an error, or two samples"
    add("--duplicate_ids", choices=["refuse", "keep"], default="refuse", help=twice)
    add("--max_rejected", type=share, default=0.01, help="tolerated share of rejected dataset rows")
    exif = f"{EXIF}; default: apply, but ignore for the template being-vl-0.5"
    add("--exif", choices=["apply", "ignore"], help=exif)
    batch = "images per batch, if images are encoded now"
    add("--batch_size", type=int, default=16, help=batch)
    add("--num_workers", type=int, default=1, help="processes that tokenize, or decode images")
    dtype = f"{ENCODER}, if images are encoded now"
    add("--dtype", dest="torch_dtype", choices=ENCODER_DTYPES, default="auto", help=dtype)
    add_rank_arguments(parser)
    other = "replace this dataset, finished or not, and the codes made for it"
    add("--overwrite", action="store_true", help=other)


def with_published_name(words: list[str]) -> list[str]:
    """The command's words, preceded by Being-VL-0.5's default for --dataset_name."""
    parser = argparse.ArgumentParser(add_help=False, exit_on_error=False)
    parser.add_argument("--mode", default="sft")
    parser.add_argument("--json_path", "--json-path", type=Path, default=Path("data"))
    try:
        known, _ = parser.parse_known_args(words)
    except argparse.ArgumentError:
        return words  # the command itself will report the error
    return ["--dataset_name", f"{known.mode}_{known.json_path.stem}", *words]


def run(args: argparse.Namespace) -> None:
    # numpy, pyarrow and numba are imported here, so that --help is instant.
    from beingvl.data.tokenize_dataset import tokenize

    tokenize(**options_of(args))
