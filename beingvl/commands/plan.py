"""Predict a stage's memory per rank and time per epoch, and propose settings that fit.

  beingvl plan --model llama3.1-8b --gpus 80GB
  beingvl plan --model base --config ds_configs/stage3.json --gpus 8x80GB --nodes 2 --data shards/

It loads no weights and needs no GPU: shapes come from the model's config, or from a name
(llama3.1-8b, llama3.1-70b, llama3.2-1b, llama3.2-3b, llama2-7b, smollm2-135m, -360m, -1.7b). A run
prints its prediction next to what it really used. The time assumes that a GPU reaches --mfu of its
peak, which is a guess until you have measured it in a run.
"""

from __future__ import annotations

import argparse

from beingvl.commands.options import add_overrides, options_of
from beingvl.commands.parser import FILE, Input


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    model = "base/, the previous stage's folder, a base model's folder or config.json, or a name"
    add("--model", required=True, help=model)
    stage = "the stage's JSON, or several (default: ds_configs/stage1.json to stage3.json)"
    add("--config", dest="stage", nargs="+", type=FILE, help=stage)
    gpus = "GPUs per node and the memory of each, for example 8x80GB; 80GB alone gives a table"
    add("--gpus", default="80GB", metavar="[Nx]MGB", help=gpus)
    add("--nodes", type=int, default=1, help="number of nodes")
    add("--data", type=Input("shards"), help="shard folder, for the time per epoch")
    add("--gpu", default="H100", help="type of GPU, for its peak speed")
    add("--mfu", type=float, default=0.4, help="assumed model FLOP utilisation")
    add_overrides(parser)


def run(args: argparse.Namespace) -> None:
    # torch is imported here, so that --help is instant, and after a wrong --model was reported.
    from beingvl.launch.known_shapes import folder_of

    folder_of(args.model)
    from beingvl.launch.plan import SHIPPED, plan

    print(plan(stage=args.stage or SHIPPED, **options_of(args, "stage")))
