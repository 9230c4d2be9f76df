"""Predict memory per rank and time per epoch of a stage, and propose a micro-batch and offload.

  beingvl plan --model base --stage ds_configs/stage3.json --gpus 8x80GB --nodes 2 --data shards/

Nothing is loaded and no GPU is needed: shapes come from the model's config. A run prints its own
prediction beside what it really used. The time assumes that a GPU reaches --mfu of its peak, which
is a guess until a run has shown it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from beingvl.commands.options import add_overrides, options_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    model = "start model: base/, or the previous stage's folder"
    add("--model", type=Path, required=True, help=model)
    stage = "the stage's JSON (ds_configs/)"
    add("--stage", "--deepspeed_config", type=Path, required=True, help=stage)
    gpus = "GPUs of a node and the memory of each, for example 8x80GB"
    add("--gpus", required=True, metavar="NxMGB", help=gpus)
    add("--nodes", type=int, default=1, help="number of nodes")
    add("--data", type=Path, help="shard folder, for the time per epoch")
    add("--gpu", default="H100", help="kind of GPU, for its peak speed")
    add("--mfu", type=float, default=0.4, help="share of the peak that the model's own FLOPs reach")
    add_overrides(parser)


def run(args: argparse.Namespace) -> None:
    # torch is imported here, so that --help is instant.
    from beingvl.launch.plan import plan

    print(plan(**options_of(args)))
