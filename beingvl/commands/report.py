"""Pictures and summary of a run.

beingvl report run runs/quickstart             data, vBPE, curves, frozen hashes, scores,
                                               answers: index.html, summary.json, PNG
beingvl report data shards/ …                  what shards hold: lengths, sources, unused rows,
                                               examples
beingvl report train stage-1                   curves, times and events of one stage's training:
                                               report.html
beingvl report vbpe vbpe.json …                what a vBPE vocabulary learnt
"""

from __future__ import annotations

import argparse
import importlib

KINDS = {
    "run": (
        "beingvl.commands.report_run",
        "all that a run left: data, vBPE, curves, hashes, scores, answers",
    ),
    "data": ("beingvl.commands.report_data", "what shards hold"),
    "train": ("beingvl.commands.report_train", "curves, times and events of one stage's training"),
    "vbpe": ("beingvl.commands.report_vbpe", "what a vBPE vocabulary learnt"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    kinds = parser.add_subparsers(dest="kind", metavar="KIND", required=True)
    for kind, (module_name, description) in KINDS.items():
        module = importlib.import_module(module_name)
        sub = kinds.add_parser(
            kind,
            help=description,
            description=module.__doc__,
            formatter_class=parser.formatter_class,
        )
        module.add_arguments(sub)
        # The command's own --debug is known before KIND only; this one leaves its value alone when
        # it is not given.
        sub.add_argument(
            "--debug",
            action="store_true",
            default=argparse.SUPPRESS,
            help="show the traceback of an error",
        )


def run(args: argparse.Namespace) -> int | None:
    return importlib.import_module(KINDS[args.kind][0]).run(args)
