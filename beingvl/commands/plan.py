"""Predict memory per rank and time per epoch of a stage, and propose a micro-batch and offload.

  beingvl plan --model base --stage ds_configs/stage3.json --gpus 8x80GB --nodes 2 --data shards/

Nothing is loaded and no GPU is needed: shapes come from the model's config. A run prints its own
prediction beside what it really used. The time assumes that a GPU reaches --mfu of its peak, which
is a guess until a run has shown it.
"""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--model",
        type=Path,
        required=True,
        help="start model: base/, or the previous stage's folder",
    )
    add(
        "--stage",
        "--deepspeed_config",
        type=Path,
        required=True,
        help="the stage's JSON (ds_configs/)",
    )
    add(
        "--gpus",
        required=True,
        metavar="NxMGB",
        help="GPUs of a node and the memory of each, for example 8x80GB",
    )
    add("--nodes", type=int, default=1, help="number of nodes")
    add("--data", type=Path, help="shard folder, for the time per epoch")
    add("--gpu", default="H100", help="kind of GPU, for its peak speed")
    add("--mfu", type=float, default=0.4, help="share of the peak that the model's own FLOPs reach")
    add(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="override keys of the JSON",
    )


def run(args: argparse.Namespace) -> None:
    from beingvl.launch.plan import plan

    prediction = plan(
        args.model,
        args.stage,
        args.gpus,
        nodes=args.nodes,
        data=args.data,
        gpu=args.gpu,
        mfu=args.mfu,
        overrides=args.set,
    )
    print(prediction)
