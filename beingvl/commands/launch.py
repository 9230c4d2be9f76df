"""Start a training stage on the hosts of a hostfile, through DeepSpeed's launcher.

    beingvl launch --hostfile hostfiles/hostfile-1 [--dry_run] -- --deepspeed_config
    ds_configs/stage1.json --model base/ …

What follows `--` goes to the trainer. In order: read the hostfile; ask its hosts what `beingvl
preflight` asks (all but the all-reduce); write the variables that remote ranks need where DeepSpeed
reads them; run `deepspeed`; take that file away. A hostfile whose only host is localhost needs no
ssh: its GPUs are counted, and where there is none its slots are CPU ranks.

The first SIGINT, SIGTERM or SIGHUP asks the ranks of this run alone to stop after the running step
(exit code 85); the second kills them. DeepSpeed's launcher itself, when signalled, kills every
DeepSpeed run on all hosts.
"""

from __future__ import annotations

import argparse
from pathlib import Path

TRAINER = "beingvl.train.train_stage"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--hostfile",
        type=Path,
        required=True,
        help="NAME slots=NUMBER, one line a host; the first is rank 0's",
    )
    parser.add_argument(
        "--num_ranks",
        type=int,
        help="on this machine alone: ranks, instead of all GPUs or the hostfile's slots",
    )
    parser.add_argument(
        "--master_addr",
        help="rank 0's address (default: the one by which ssh reached the first host)",
    )
    parser.add_argument(
        "--master_port",
        type=int,
        default=29500,
        help="rank 0's port; each run on a host needs its own",
    )
    parser.add_argument("--module", default=TRAINER, help=argparse.SUPPRESS)
    parser.add_argument(
        "--no_preflight", action="store_true", help="start without asking the hosts first"
    )
    parser.add_argument(
        "--dry_run",
        action="store_true",
        help="print the command and the ranks' variables; start nothing",
    )
    parser.add_argument("trainer", nargs=argparse.REMAINDER, help="-- and the trainer's arguments")


def run(args: argparse.Namespace) -> int | None:
    from beingvl.launch.start_training import run as step

    return step(args)
