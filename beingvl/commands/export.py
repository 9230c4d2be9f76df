"""[7] Start model + training checkpoint -> stock Hugging Face folder; also to and from the
published parameter names.

    beingvl export --model base/ --checkpoint stage-1/ --output out/
        the model as it is now, before its stage ends
    beingvl export --model stage-3/final --format being-vl-0.5 --output out/
        published form, with the VQ-GAN among the weights; a model with llama3 RoPE scaling needs
        --rope_scaling none, which changes the model
    beingvl export --model Being-VL-0.5/ --output base/
        a published folder, converted to ours

A finished stage already has its `final/`. The result loads with unmodified transformers and can be
the start model of the next stage. The written folder's logits are compared with the probe logits
that training stored in the checkpoint; if they differ, the exit code is 1 and the folder stays
incomplete.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from beingvl.commands.options import options_of
from beingvl.commands.parser import FILE


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    model = "start model of the stage, a finished stage, or a published folder"
    add("--model", type=FILE, required=True, help=model)
    add("--checkpoint", type=FILE, help="STAGE/checkpoints/step-…, or STAGE for its newest one")
    formats = ("hf", "being-vl-0.5")
    add("--format", choices=formats, default="hf", help="names and layout of the weights")
    add("--output", dest="output_path", type=Path, required=True, help="folder to write")
    rope = "none: drop RoPE scaling, which being-vl-0.5 does not support"
    add("--rope_scaling", choices=("none",), help=rope)
    templates = "chat template a published folder was trained on; default: as in its manifest"
    add("--template", choices=("default", "being-vl-0.5"), help=templates)
    no_link = "copy unchanged weight files instead of hard-linking them"
    add("--no_link", dest="link", action="store_false", help=no_link)
    no_probe = "do not load the result to compare its logits with the checkpoint's"
    add("--no_probe", dest="probe", action="store_false", help=no_probe)
    add("--overwrite", action="store_true", help="replace a finished folder")


def run(args: argparse.Namespace) -> int:
    # torch and safetensors are imported here, so that --help is instant.
    from beingvl.train.export_hf import ProbeMismatchError, export

    try:
        manifest = export(**options_of(args))
    except ProbeMismatchError as error:
        print(f"{error}; {args.output_path} is not finished", file=sys.stderr)
        return 1
    print(f"{args.output_path}: {manifest.kind.replace('_', ' ')}, {len(manifest.files)} files")
    return 0
