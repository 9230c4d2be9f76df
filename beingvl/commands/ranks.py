"""The options of every command whose work several processes may share."""

from __future__ import annotations

import argparse


def add_rank_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--rank",
        type=int,
        help="this process among --num_ranks; default: as the launcher or the Slurm array says, "
        "else 0",
    )
    parser.add_argument(
        "--num_ranks",
        type=int,
        help="processes that share the work, each started with this command",
    )
