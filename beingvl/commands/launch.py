"""Start a training stage on the hosts of a hostfile, through DeepSpeed's launcher.

    beingvl launch --hostfile hostfiles/hostfile-1 [--dry_run] -- \\
        --config ds_configs/stage1.json --model base/ --data shards/ --output stage-1/

Everything after `--` goes to the trainer (`beingvl train --help`). Every host is checked first, as
by `beingvl preflight` without the all-reduce. A hostfile with localhost as its only host needs no
ssh: it runs one rank per GPU, or without a GPU one CPU rank per slot.

The first SIGINT, SIGTERM or SIGHUP asks only this run's ranks to stop after the running step (exit
code 85); the second kills them.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from beingvl.commands import train
from beingvl.commands.options import options_of
from beingvl.commands.parser import Parser


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    hostfile = "NAME slots=NUMBER, one line per host; the first is rank 0's"
    add("--hostfile", type=Path, required=True, help=hostfile)
    num_ranks = "on this machine alone: number of ranks, instead of all GPUs or the slots"
    add("--num_ranks", type=int, help=num_ranks)
    address = "rank 0's address (default: the one at which ssh reached the first host)"
    add("--master_addr", help=address)
    port = "rank 0's port; each run on a host needs its own"
    add("--master_port", type=int, default=29500, help=port)
    add("--no_preflight", action="store_true", help="start without checking the hosts first")
    dry_run = "print the command and the ranks' variables; start nothing"
    add("--dry_run", action="store_true", help=dry_run)
    add("trainer", nargs=argparse.REMAINDER, help="-- and the trainer's arguments")


def run(args: argparse.Namespace) -> int:
    # deepspeed is imported here, so that --help is instant.
    from beingvl.launch.start_training import launch

    words = args.trainer[1:] if args.trainer[:1] == ["--"] else args.trainer
    parser = Parser(prog="beingvl train")
    train.add_arguments(parser)
    trainer = options_of(parser.parse_args(words))
    return launch(trainer=trainer, **options_of(args, "trainer"))
