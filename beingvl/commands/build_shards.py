"""[4] JSONL token rows (ours or the published files) -> memory-mapped Arrow shards.

  1. plan_parts    every file is cut at multiples of --part_bytes; a part holds the lines that
                   start inside it
  2. build         parse (token_rows.py), check, write a shard; in --num_workers threads
      (parts.py: killed and started again)
  3. join_shards   all shards, the index files, and manifest.json last

The sequence of a row is token_0 + image + token_1, where image is token_image_new when the row has
it, else token_image. A published file without target_spans is accepted: its targets are token_1. A
file that `beingvl tokenize` wrote brings its vocabulary and lineage in the manifest beside it; for
any other file --model_path says which vocabulary its ids belong to. Merged images are decoded, a
row's first one is compared with its codes, when the vBPE is known: --vbpe_path, or the vbpe.json in
--model_path. The result does not depend on workers, ranks or kills.
"""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from beingvl.commands.ranks import add_rank_arguments

    parser.add_argument(
        "--jsonl_path", type=Path, nargs="+", required=True, help="JSONL files of token rows"
    )
    parser.add_argument("--output_path", type=Path, required=True, help="shard folder to write")
    parser.add_argument(
        "--model_path",
        type=Path,
        help="model folder whose vocabulary the ids belong to, for files without a manifest",
    )
    parser.add_argument(
        "--vbpe_path",
        type=Path,
        help="vbpe.json that merged images must decode with, a row's first to its own "
        "codes; default: the one in --model_path",
    )
    parser.add_argument(
        "--part_bytes", type=int, default=64 << 20, help="bytes of JSONL that become one shard"
    )
    parser.add_argument(
        "--num_workers", type=int, help="threads that parse; default: one a CPU core"
    )
    parser.add_argument(
        "--duplicate_ids",
        choices=["refuse", "keep"],
        default="refuse",
        help="two rows with one id: an error, or two samples",
    )
    add_rank_arguments(parser)
    parser.add_argument(
        "--overwrite", action="store_true", help="replace a finished output of other inputs"
    )


def run(args: argparse.Namespace) -> int | None:
    from beingvl.data.build_shards import run as step

    return step(args)
