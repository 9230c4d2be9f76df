"""Everything about a run, on one self-contained HTML page.

    beingvl report run runs/quickstart

Reads what exists in RUN_FOLDER (each piece can be elsewhere, see the options)

    stage-N/          metrics, validation, plan; final/ for the hashes of frozen groups
    eval/*/           every finished evaluation: accuracy after each stage, scores, answers
    base/             the model that stage 1 started from
    shards*/          the data report
    vbpe/             the vBPE report, on the images of vq_codes/test/
    data/images/      the images of example answers
    equal_time.json   a comparison that was made elsewhere, as the quickstart brings one

and writes

    index.html           everything, and what is missing, on one page
    summary.json         accuracy, chance, compression, scores, hashes, time, memory
    contact_sheet.png    ten test images with their token borders, question, answer and truth
    training.png         loss of each stage, and accuracy after it
    manifest.json        written last

The examples are answers of the last stage, spread evenly over the test images; they are not chosen
by their answers.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from beingvl.commands.options import options_of
from beingvl.commands.parser import FILE


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("run_folder", type=FILE, help="folder of the run")
    add("--stages_path", type=FILE, help="folder with stage-N/ and eval/; default: RUN_FOLDER")
    add("--base_path", type=FILE, help="model that stage 1 started from; default: RUN_FOLDER/base")
    shards = "shard folders; default: RUN_FOLDER/shards*"
    add("--data", nargs="+", type=FILE, default=[], help=shards)
    add("--vbpe", dest="vbpe_path", type=FILE, help="vBPE; default: RUN_FOLDER/vbpe")
    codes = "codes to measure the vBPE on; default: RUN_FOLDER/vq_codes/test"
    add("--codes", dest="vq_codes", type=FILE, help=codes)
    images = "root folder of the evaluations' image paths; default: RUN_FOLDER/data/images"
    add("--image_path", type=FILE, help=images)
    folder = "folder to write; default: report/ beside the stages"
    add("--output", dest="output_path", type=Path, help=folder)
    add("--wall_seconds", type=float, help="seconds that the whole run took, for the summary")
    memory = "peak memory of the whole run; default: rank 0's maximum in the stages' metrics"
    add("--peak_memory_bytes", type=int, help=memory)


def run(args: argparse.Namespace) -> None:
    from beingvl.report.run import report_run  # here, so that --help is instant

    report_run(**options_of(args))
