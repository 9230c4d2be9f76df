"""[6] Train one stage: start model + shards + stage JSON -> checkpoints and final/.

Started by a launcher on every rank, for example
  deepspeed --num_gpus 2 --module beingvl.train.train_stage --deepspeed_config
  ds_configs/stage1.json \\
            --model base/ --data shards/ --output stage-1/ [--set beingvl.epochs=1 …]
or alone, as a world of one rank, with `beingvl train`.

Started again with the same arguments it resumes from the newest complete checkpoint; a finished
stage is left alone. SIGTERM, SIGUSR1 and SIGINT end it after the running step with a checkpoint and
exit code 85 ("requeue me"); while it starts up or saves there is nothing more to save, and it ends
before the next step. When training cannot go on (values that are not finite, a lost rank, a full
disk) the exit code is 1 and the last checkpoint stays valid.

--replay STEP trains nothing: it rebuilds that step's batch, prints its samples and computes its
loss again.
"""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--deepspeed_config", type=Path, required=True, help="the stage's JSON (ds_configs/)"
    )
    parser.add_argument(
        "--model",
        type=Path,
        required=True,
        help="start model: base/, or the previous stage's folder",
    )
    parser.add_argument("--data", type=Path, required=True, help="shard folder of build-shards")
    parser.add_argument(
        "--output",
        type=Path,
        required=True,
        help="stage folder: checkpoints/, metrics.jsonl, final/",
    )
    parser.add_argument(
        "--log_dir", type=Path, help="TensorBoard folder (default: OUTPUT/tensorboard)"
    )
    parser.add_argument(
        "--validation_data",
        type=Path,
        help="shard folder for beingvl.validation_every_steps; never trained on",
    )
    parser.add_argument(
        "--carry_moments",
        action="store_true",
        help="start with the optimizer moments that --model, a stage folder, ended with",
    )
    parser.add_argument(
        "--replay",
        type=int,
        metavar="STEP",
        help="show this step's samples (steps count from 1) and its loss",
    )
    parser.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="override keys of the JSON",
    )
    parser.add_argument(
        "--local_rank", type=int, default=0, help=argparse.SUPPRESS
    )  # DeepSpeed's launcher passes it


def run(args: argparse.Namespace) -> int | None:
    from beingvl.train.train_stage import run as step

    return step(args)
