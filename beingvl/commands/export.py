"""[7] Start model + training checkpoint -> stock Hugging Face folder; also to and from the
published parameter names.

    beingvl export --model base/ --checkpoint stage-1/ --output_path out/          the model as
        it is now, before its stage ends
    beingvl export --model stage-3/final --format being-vl-0.5 --output_path out/  VQ-GAN among the
    weights, as published
    beingvl export --model Being-VL-0.5/ --output_path base/                       a published
        folder back into ours

A finished stage already has its `final/`. The result loads with unmodified transformers and is a
start model for the next stage. The probe logits that a checkpoint stored while it was trained are
compared with those of the written folder; when they differ, the exit code is 1 and the folder stays
incomplete.
"""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        type=Path,
        required=True,
        help="start model of the stage, a finished stage, or a published folder",
    )
    parser.add_argument(
        "--checkpoint", type=Path, help="STAGE/checkpoints/step-…, or STAGE for its newest one"
    )
    parser.add_argument(
        "--format",
        choices=("hf", "being-vl-0.5"),
        default="hf",
        help="names and layout of the weights",
    )
    parser.add_argument("--output_path", type=Path, required=True, help="folder to write")
    parser.add_argument(
        "--no_link",
        action="store_true",
        help="copy unchanged weight files instead of hard-linking them",
    )
    parser.add_argument(
        "--no_probe",
        action="store_true",
        help="do not load the result to compare the checkpoint's probe logits",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a finished folder")


def run(args: argparse.Namespace) -> int | None:
    from beingvl.train.export_hf import run as step

    return step(args)
