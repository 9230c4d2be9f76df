"""Rewrite the model card of a model folder, with the scores of evaluations.

    beingvl report card stage-3/final --scores eval/stage-3 eval/pope

Training and `convert` write README.md beside the weights, without scores. The manifest does not
hash it, so you can edit it freely. An edited card is never overwritten.
"""

from __future__ import annotations

import argparse

from beingvl.commands.options import options_of
from beingvl.commands.parser import Input


def add_arguments(parser: argparse.ArgumentParser) -> None:
    model = "model folder, or a stage folder, for its final/"
    parser.add_argument("model_path", metavar="MODEL", type=Input("model"), help=model)
    scores = "folders of `beingvl evaluate`, of this model"
    parser.add_argument("--scores", nargs="+", type=Input("evaluation"), default=[], help=scores)


def run(args: argparse.Namespace) -> None:
    from beingvl.report.card import report_card  # here, so that --help is instant

    report_card(**options_of(args))
