"""[5] JSONL token rows (ours or the published files) -> memory-mapped Arrow shards.

    beingvl build-shards --jsonl_path rows/data_vbpe.jsonl --vbpe vbpe/ --output shards/

The sequence of a token row is token_0 + image + token_1, where image is token_image_new if the row
has it, else token_image. Published files work unchanged: rows without target_spans have the
template being-vl-0.5 and token_1 as targets; rows without an id are named FILE-LINE. For a file
that `beingvl tokenize` wrote, vocabulary and lineage are in the manifest beside it; for any other
file, --model gives the vocabulary of its ids. If the vBPE is known (--vbpe, or the vbpe.json in
--model), merged images are decoded, and a row's first one is compared with its codes. The result
does not depend on workers, ranks or kills.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from beingvl.commands.options import add_rank_arguments, options_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    files = "JSONL files of token rows"
    add("--jsonl_path", type=Path, nargs="+", required=True, help=files)
    add("--output", dest="output_path", type=Path, required=True, help="shard folder to write")
    model = "model folder whose vocabulary the ids belong to, for files without a manifest"
    add("--model", dest="model_path", type=Path, help=model)
    vbpe = "vbpe.json to decode and check merged images with; default: the one in --model"
    add("--vbpe", dest="vbpe_path", type=Path, help=vbpe)
    template = (
        "chat template of the rows; default: from the manifest beside a file, else from its rows"
    )
    add("--template", choices=["default", "being-vl-0.5"], help=template)
    positions = (
        "positions of image tokens; default: from the manifest beside a file, or the model's"
    )
    add("--image_positions", choices=["running", "anchor"], help=positions)
    part = "bytes of JSONL per shard"
    add("--part_bytes", type=int, default=64 << 20, help=part)
    workers = "parsing processes; default: one per CPU core; 0: parse in this process"
    add("--num_workers", type=int, help=workers)
    twice = "two rows with the same id: an error, or two samples"
    add("--duplicate_ids", choices=["refuse", "keep"], default="refuse", help=twice)
    add_rank_arguments(parser)
    add("--overwrite", action="store_true", help="replace a finished output for different inputs")


def run(args: argparse.Namespace) -> None:
    # numpy, pyarrow and numba are imported here, so that --help is instant.
    from beingvl.data.build_shards import build_shards

    build_shards(**options_of(args))
