"""Start a training stage on the hosts of a hostfile, through DeepSpeed's launcher.

    beingvl launch --hostfile hostfiles/hostfile-1 [--dry_run] -- \\
        --deepspeed_config ds_configs/stage1.json --model base/ --data shards/ --output stage-1/

What follows `--` goes to the trainer (`beingvl train --help`). Every host is asked first what
`beingvl preflight` asks, all but the all-reduce. A hostfile whose only host is localhost needs no
ssh: its GPUs are counted, and where there is none its slots are CPU ranks.

The first SIGINT, SIGTERM or SIGHUP asks the ranks of this run alone to stop after the running step
(exit code 85); the second kills them.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from beingvl.commands import train


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--hostfile",
        type=Path,
        required=True,
        help="NAME slots=NUMBER, one line per host; the first is rank 0's",
    )
    add(
        "--num_ranks",
        type=int,
        help="on this machine alone: ranks, instead of all GPUs or the hostfile's slots",
    )
    add(
        "--master_addr",
        help="rank 0's address (default: the one by which ssh reached the first host)",
    )
    add(
        "--master_port",
        type=int,
        default=29500,
        help="rank 0's port; each run on a host needs its own",
    )
    add("--no_preflight", action="store_true", help="start without asking the hosts first")
    add(
        "--dry_run",
        action="store_true",
        help="print the command and the ranks' variables; start nothing",
    )
    add("trainer", nargs=argparse.REMAINDER, help="-- and the trainer's arguments")


def run(args: argparse.Namespace) -> int:
    from beingvl.launch.start_training import launch

    words = args.trainer[1:] if args.trainer[:1] == ["--"] else args.trainer
    parser = argparse.ArgumentParser(prog="beingvl launch … --")
    train.add_arguments(parser)
    trainer = vars(parser.parse_args(words))
    del trainer["local_rank"]  # DeepSpeed's launcher passes it
    return launch(
        args.hostfile,
        trainer,
        num_ranks=args.num_ranks,
        master_addr=args.master_addr,
        master_port=args.master_port,
        no_preflight=args.no_preflight,
        dry_run=args.dry_run,
    )
