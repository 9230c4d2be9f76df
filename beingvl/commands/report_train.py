"""The metrics of one training stage on one self-contained HTML page: STAGE_FOLDER/report.html.

    beingvl report train stage-1/

Loss (also per token kind, per source, and on the validation set), gradient norm, learning rate,
tokens per second, MFU, memory, where a step spends its time, skipped steps and spikes. Works while
the stage is still running.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from beingvl.commands.options import options_of
from beingvl.commands.parser import FILE


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("stage_folder", type=FILE, help="output folder of `beingvl train`")
    page = "page to write; default: STAGE_FOLDER/report.html"
    add("--output", dest="output_path", type=Path, help=page)


def run(args: argparse.Namespace) -> None:
    from beingvl.report.train import report_train  # here, so that --help is instant

    report_train(**options_of(args))
