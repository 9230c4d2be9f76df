"""[7] Start model + training checkpoint -> stock Hugging Face folder; also to and from the published parameter names.

    beingvl export --model base/ --checkpoint stage-1/ --output_path out/          the model as it is now, before its stage ends
    beingvl export --model stage-3/final --format being-vl-0.5 --output_path out/  VQ-GAN among the weights, as published
    beingvl export --model Being-VL-0.5/ --output_path base/                       a published folder back into ours

A finished stage already has its `final/`. The result loads with unmodified transformers and is a start model for the next stage.
After the export of a checkpoint its probe logits, stored while it was trained, are compared with those of the written folder.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

HF, PUBLISHED = "hf", "being-vl-0.5"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", type=Path, required=True, help="start model of the stage, a finished stage, or a published folder"
    )
    parser.add_argument("--checkpoint", type=Path, help="STAGE/checkpoints/step-…, or STAGE for its newest one")
    parser.add_argument("--format", choices=(HF, PUBLISHED), default=HF, help="names and layout of the weights (default: hf)")
    parser.add_argument("--output_path", type=Path, required=True, help="folder to write")
    parser.add_argument("--no_link", action="store_true", help="copy unchanged weight files instead of hard-linking them")
    parser.add_argument("--no_probe", action="store_true", help="do not load the result to compare the checkpoint's probe logits")
    parser.add_argument("--overwrite", action="store_true", help="replace a finished folder")


def run(args: argparse.Namespace) -> int:
    from beingvl.errors import InputError
    from beingvl.export.published_names import is_published, read_published, write_published
    from beingvl.manifest import is_complete
    from beingvl.train.hf_folder import write_hf_folder
    from beingvl.train.train_stage import find_start_model

    target, link = args.output_path, not args.no_link
    model = find_start_model(args.model)
    if is_complete(target) and not args.overwrite:
        raise InputError(f"{target} is finished already; choose another folder or add --overwrite")
    if args.checkpoint is None:
        if args.format == PUBLISHED:
            manifest = write_published(model, target, link)
        elif is_published(model):
            manifest = read_published(model, target, link=link)
        else:
            raise InputError(f"{model} is a Hugging Face folder already: give --checkpoint or --format {PUBLISHED}")
        print(f"{target}: {manifest.kind.replace('_', ' ')}, {len(manifest.files)} files")
        return 0

    checkpoint = _find_checkpoint(args.checkpoint)
    folder = target if args.format == HF else target.with_name(f".{target.name}.hf.tmp")
    manifest = write_hf_folder(model, checkpoint, folder, link)
    matches = args.no_probe or _compare_probe(checkpoint, folder)
    if args.format == PUBLISHED:
        manifest = write_published(folder, target, link)
        shutil.rmtree(folder)
    print(f"{target}: {checkpoint.name}, {len(manifest.files)} files")
    return 0 if matches else 1


def _find_checkpoint(path: Path) -> Path:
    """A checkpoint folder, or the newest finished one of a stage folder."""
    from beingvl.errors import InputError
    from beingvl.train.checkpoint import CHECKPOINTS, complete_checkpoints

    if not (path / CHECKPOINTS).is_dir():
        return path
    checkpoints = complete_checkpoints(path)
    if not checkpoints:
        raise InputError(f"{path / CHECKPOINTS} holds no finished checkpoint yet")
    return checkpoints[-1]


def _compare_probe(checkpoint: Path, folder: Path) -> bool:
    """Print how far the written folder's logits are from those stored in training; False when they are too far."""
    import torch

    from beingvl.train.checkpoint import read_state
    from beingvl.train.probe import compare_probe

    is_bf16 = bool((read_state(checkpoint).identity["bf16"] or {}).get("enabled"))
    comparison = compare_probe(checkpoint, folder, torch.bfloat16 if is_bf16 else torch.float32)
    print(comparison.describe())
    return comparison.matches


if __name__ == "__main__":
    import sys

    from beingvl.cli import main

    sys.exit(main(["export", *sys.argv[1:]]))
