"""[6] Train one stage: start model + shards + stage JSON -> checkpoints and final/.

    deepspeed --num_gpus 2 --module beingvl.train.train_stage --config \\
        ds_configs/stage1.json --model base/ --data shards/ --output stage-1/

A launcher or `srun` starts it or `beingvl train` once per rank; RANK, LOCAL_RANK and WORLD_SIZE
say which it is. `beingvl train` without them is the only rank.

Started again with the same arguments, it resumes from the newest complete checkpoint; a finished
stage is left alone. SIGTERM, SIGUSR1 and SIGINT stop it after the running step with a checkpoint
and exit code 85 ("requeue me"). A signal during start-up or a save stops it before the next step,
with nothing more to save. If training cannot continue (values that are not finite, a lost rank, a
full disk), the exit code is 1 and the last checkpoint stays valid.

--replay STEP trains nothing: it rebuilds that step's batch, prints its samples and computes its
loss again.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from beingvl.commands.options import add_overrides, options_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    config = "the stage's JSON (ds_configs/)"
    add("--config", dest="deepspeed_config", type=Path, required=True, help=config)
    add("--model", type=Path, required=True, help="base/, or the previous stage's folder")
    add("--data", type=Path, required=True, help="shard folder")
    add("--output", type=Path, required=True, help="stage folder: checkpoints/, …, final/")
    add("--log_dir", type=Path, help="TensorBoard folder (default: OUTPUT/tensorboard)")
    held_out = "shard folder for beingvl.validation_every_steps; never trained on"
    add("--validation_data", type=Path, help=held_out)
    moments = "start with the optimizer moments that --model, a stage folder, ended with"
    add("--carry_moments", action="store_true", help=moments)
    shown = "show this step's samples (steps count from 1) and its loss"
    add("--replay", type=int, metavar="STEP", help=shown)
    add_overrides(parser)
    # passed by DeepSpeed's launcher
    add("--local_rank", type=int, default=0, help=argparse.SUPPRESS)


def run(args: argparse.Namespace) -> int:
    # It imports numpy; imported here, so that --help is instant.
    from beingvl.train.train_stage import as_a_rank, train

    def step(stop_requested: Callable[[], bool]) -> bool:
        final = train(**options_of(args), stop_requested=stop_requested)
        return final is not None or args.replay is not None

    return as_a_rank(step, args.debug)
