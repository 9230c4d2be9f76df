"""[7] Pages about a run's results, each a single self-contained file.

beingvl report run runs/quickstart   data, vBPE, curves, frozen hashes, scores, answers
beingvl report data shards/ …        contents of shards: lengths, sources, unused rows, examples
beingvl report train stage-1         curves, times and events of one stage's training
beingvl report vbpe vbpe.json …      what a vBPE vocabulary learnt
beingvl report card stage-3/final …  not a page: the model card, with scores
"""

from __future__ import annotations

import argparse

from beingvl.commands import report_card, report_data, report_run, report_train, report_vbpe

KINDS = {
    "run": (report_run, "everything about a run: data, vBPE, curves, hashes, scores, answers"),
    "data": (report_data, "the contents of shards"),
    "train": (report_train, "curves, times and events of one stage's training"),
    "vbpe": (report_vbpe, "what a vBPE vocabulary learnt"),
    "card": (report_card, "the model card, with scores"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    kinds = parser.add_subparsers(dest="kind", metavar="KIND", required=True)
    for name, (kind, description) in KINDS.items():
        sub = kinds.add_parser(name, help=description, description=kind.__doc__)
        kind.add_arguments(sub)
        # The command's own --debug only works before KIND; SUPPRESS keeps its value.
        debug = "show the traceback of an error"
        sub.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help=debug)


def run(args: argparse.Namespace) -> None:
    KINDS[args.kind][0].run(args)
