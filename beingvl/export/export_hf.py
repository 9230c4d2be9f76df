"""[7] Start model + training checkpoint -> stock Hugging Face folder.

A finished stage already has its `final/`; this makes the same folder from any checkpoint of a stage, for example to try a
model while its stage still runs. The result loads with unmodified transformers and is a start model for the next stage.
"""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", type=Path, required=True, help="the start model that the stage was trained from")
    parser.add_argument("--checkpoint", type=Path, required=True, help="STAGE/checkpoints/step-…, or STAGE for its newest one")
    parser.add_argument("--output_path", type=Path, required=True, help="folder to write")
    parser.add_argument("--no_link", action="store_true", help="copy unchanged weight files instead of hard-linking them")
    parser.add_argument("--overwrite", action="store_true", help="replace a finished folder")


def run(args: argparse.Namespace) -> None:
    from beingvl.errors import InputError
    from beingvl.manifest import is_complete
    from beingvl.train.checkpoint import CHECKPOINTS, complete_checkpoints
    from beingvl.train.hf_folder import write_hf_folder

    checkpoint = args.checkpoint
    if (checkpoint / CHECKPOINTS).is_dir():
        checkpoints = complete_checkpoints(checkpoint)
        if not checkpoints:
            raise InputError(f"{checkpoint / CHECKPOINTS} holds no finished checkpoint yet")
        checkpoint = checkpoints[-1]
    if is_complete(args.output_path) and not args.overwrite:
        raise InputError(f"{args.output_path} is finished already; choose another folder or add --overwrite")
    manifest = write_hf_folder(args.model, checkpoint, args.output_path, link=not args.no_link)
    print(f"{args.output_path}: {checkpoint.name} as a Hugging Face folder, {len(manifest.files)} files")


if __name__ == "__main__":
    import sys

    from beingvl.cli import main

    sys.exit(main(["export", *sys.argv[1:]]))
