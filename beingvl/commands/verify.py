"""Re-hash an artefact of any step (a folder with a manifest.json), and check that its content
makes sense.

Every file must have the hash of the manifest; of weight files that a step linked without reading it
has one of samples only, and their number is printed. Shards and JSONL rows are read again: ids
inside the vocabulary, target spans inside their rows; index files and the manifest's counts agree
with the shards. Codes must be inside the code book, keys sorted and unique, merges possible.
Headers of weight files must fit the files, the index and config.json, and the vocabulary the
embedding; slices of a checkpoint must make whole parameters; an evaluation must have a readable
line for every row. Weights themselves are not read a second time. Of a stage's folder its finished
checkpoints and final/ are taken. A single file is compared with the manifest beside it; a vbpe.json
without one has no hash, its merges are checked.
"""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "paths", nargs="+", type=Path, help="artefact folders, or files like vbpe.json"
    )


def run(args: argparse.Namespace) -> None:
    from beingvl.artefact.verify import run as step

    step(args)
