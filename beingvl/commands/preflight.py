"""Ask every host of a hostfile whether a run can start there, before it starts.

Asks each host over ssh, all at once: is it there; do its versions, code, clock, model and data
equal the first host's; has it the devices that its slots promise; is there disk space, also where
the stage offloads to; is rank 0's port free. Then checks the stage's JSON, and measures an
all-reduce through the real launcher. Prints a table; exit code 1 when a row is red.
"""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--hostfile", type=Path, required=True, help="NAME slots=NUMBER, one line a host"
    )
    parser.add_argument(
        "--stage",
        "--deepspeed_config",
        help="the stage's JSON (ds_configs/): it must be accepted, and equal on every host",
    )
    parser.add_argument("--model", help="start model; every host must see the same")
    parser.add_argument("--data", help="shard folder; every host must see the same")
    parser.add_argument(
        "--output", help="stage folder that will be written; its disk must have room"
    )
    parser.add_argument("--master_port", type=int, default=29500, help="rank 0's port")
    parser.add_argument(
        "--seconds", type=float, default=5.0, help="of the all-reduce reading; 0 leaves it out"
    )


def run(args: argparse.Namespace) -> int | None:
    from beingvl.launch.preflight import run as step

    return step(args)
