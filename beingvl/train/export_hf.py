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
import shutil
import sys
from functools import partial
from pathlib import Path

import torch

from beingvl.artefact.manifest import Manifest, is_complete
from beingvl.errors import InputError
from beingvl.model.published_names import is_published, read_published, write_published
from beingvl.model.start_model import find_start_model
from beingvl.model.target_folder import check_target
from beingvl.train.checkpoint import CHECKPOINTS, complete_checkpoints, read_state
from beingvl.train.hf_folder import write_hf_folder
from beingvl.train.probe import compare_probe, load_probe

HF, PUBLISHED = "hf", "being-vl-0.5"


class ProbeMismatchError(Exception):
    """The written folder does not answer the checkpoint's probe as the trained model did."""


def run(args: argparse.Namespace) -> int:
    target, link = args.output_path, not args.no_link
    model = find_start_model(args.model)
    checkpoint = _find_checkpoint(args.checkpoint) if args.checkpoint else None
    check_target(
        target,
        {"--model": model} | ({"--checkpoint": checkpoint} if checkpoint else {}),
        args.overwrite,
    )
    if is_complete(target) and not args.overwrite:
        raise InputError(f"{target} is finished already; choose another folder or add --overwrite")
    if checkpoint is None:
        if args.format == PUBLISHED:
            manifest = write_published(model, target, link)
        elif is_published(model):
            manifest = read_published(model, target, link=link)
        else:
            raise InputError(
                f"{model} is a Hugging Face folder already: give --checkpoint or --format "
                f"{PUBLISHED}"
            )
        print(f"{target}: {manifest.kind.replace('_', ' ')}, {len(manifest.files)} files")
        return 0

    try:
        manifest = _write_checkpoint_model(model, checkpoint, target, args)
    except ProbeMismatchError as error:
        print(f"{error}\n{target} is not finished: {checkpoint} was not written", file=sys.stderr)
        return 1
    print(f"{target}: {checkpoint.name}, {len(manifest.files)} files")
    return 0


def _write_checkpoint_model(
    model: Path, checkpoint: Path, target: Path, args: argparse.Namespace
) -> Manifest:
    """Write and compare the Hugging Face folder; for the published format it is an intermediate
    one beside the target.
    """
    if not args.no_probe:
        load_probe(checkpoint)
    check = None if args.no_probe else partial(_check_probe, checkpoint)
    link = not args.no_link
    if args.format == HF:
        return write_hf_folder(model, checkpoint, target, link, check)
    folder = target.with_name(f".{target.name}.hf.tmp")
    try:
        write_hf_folder(model, checkpoint, folder, link, check)
        return write_published(folder, target, link)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _find_checkpoint(path: Path) -> Path:
    """A checkpoint folder, or the newest finished one of a stage folder."""
    if not (path / CHECKPOINTS).is_dir():
        return path
    checkpoints = complete_checkpoints(path)
    if not checkpoints:
        raise InputError(f"{path / CHECKPOINTS} holds no finished checkpoint yet")
    return checkpoints[-1]


def _check_probe(checkpoint: Path, folder: Path) -> None:
    """Print how far the written folder's logits are from those stored in training. Raises
    ProbeMismatchError when too far.
    """
    is_bf16 = bool((read_state(checkpoint).identity["bf16"] or {}).get("enabled"))
    comparison = compare_probe(checkpoint, folder, torch.bfloat16 if is_bf16 else torch.float32)
    if not comparison.matches:
        raise ProbeMismatchError(comparison.describe())
    print(comparison.describe())


if __name__ == "__main__":
    from beingvl.commands.main import main

    sys.exit(main(["export", *sys.argv[1:]]))
