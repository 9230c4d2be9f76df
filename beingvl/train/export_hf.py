"""[7] Export: start model + checkpoint -> stock Hugging Face folder; also to and from the published
parameter names.

The written folder's logits are compared with the probe logits that training stored in the
checkpoint.
"""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import torch

from beingvl.artefact.manifest import Manifest, is_complete
from beingvl.artefact.owner import owned
from beingvl.errors import InputError
from beingvl.model.published_names import published_config, read_published, write_published
from beingvl.model.start_model import find_start_model
from beingvl.model.target_folder import check_target
from beingvl.published_form import is_published
from beingvl.train.checkpoint import read_state
from beingvl.train.checkpoint_folders import CHECKPOINTS, complete_checkpoints
from beingvl.train.failures import ProbeMismatchError
from beingvl.train.hf_folder import write_hf_folder
from beingvl.train.probe import compare_probe, load_probe
from beingvl.vocab import VocabLayout

HF, PUBLISHED = "hf", "being-vl-0.5"


def export(
    model: Path | str,
    output_path: Path | str,
    *,
    checkpoint: Path | str | None = None,
    format: str = HF,
    rope_scaling: str | None = None,
    template: str | None = None,
    link: bool = True,
    probe: bool = True,
    overwrite: bool = False,
) -> Manifest:
    """Write a model folder.

    Args:
        model: start model of the stage, a finished stage, or a published folder.
        output_path: folder to write.
        checkpoint: a checkpoint folder, or a stage folder for its newest one; without it, only the
            parameter names of `model` change.
        format: "hf", or "being-vl-0.5" for the published names and the VQ-GAN among the weights.
        rope_scaling: "none" leaves it out of the published form, which knows no llama3 scaling.
        template: chat template that a published folder was trained on; None: the one in its
            manifest, else the published one.
        link: hard-link unchanged weight files instead of copying them.
        probe: load the result and compare its logits with the checkpoint's.
        overwrite: replace a finished folder.

    Raises InputError, or ProbeMismatchError, which leaves the folder incomplete.
    """
    model, output_path = find_start_model(Path(model)), Path(output_path)
    inputs = {"--model": model}
    if checkpoint:
        checkpoint = inputs["--checkpoint"] = _find_checkpoint(Path(checkpoint))
    check_target(output_path, inputs)
    with owned(output_path):
        if is_complete(output_path) and not overwrite:
            raise InputError(
                f"{output_path} is finished already; choose another folder or add --overwrite"
            )
        if rope_scaling not in (None, "none"):
            raise InputError(f"--rope_scaling is {rope_scaling!r}, expected none")
        if rope_scaling and format != PUBLISHED:
            raise InputError(f"--rope_scaling belongs to --format {PUBLISHED}; leave it out")
        if template and (checkpoint or format == PUBLISHED):
            raise InputError("--template belongs to the import of a published folder; leave it out")
        config = published_config(model, bool(rope_scaling)) if format == PUBLISHED else None
        if checkpoint:
            return _export_checkpoint(model, checkpoint, output_path, config, link, probe)
        if config:
            return write_published(model, output_path, config, link)
        if is_published(model):
            return read_published(model, output_path, link, template)
        VocabLayout.load(model)
    raise InputError(
        f"{model} is a Hugging Face folder already: give --checkpoint or --format {PUBLISHED}"
    )


def _export_checkpoint(
    model: Path,
    checkpoint: Path,
    target: Path,
    published: dict[str, Any] | None,
    link: bool,
    probe: bool,
) -> Manifest:
    """With a config of the `published` form, the Hugging Face folder is only an intermediate one
    beside the target.
    """
    if probe:
        load_probe(checkpoint)  # report a missing one before anything is written
    check = partial(_check_probe, checkpoint) if probe else None
    if published is None:
        return write_hf_folder(model, checkpoint, target, link, check)
    folder = target.with_name(f".{target.name}.hf.tmp")
    try:
        write_hf_folder(model, checkpoint, folder, link, check)
        return write_published(folder, target, published, link)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _find_checkpoint(path: Path) -> Path:
    """`path` itself, or the newest finished checkpoint if it is a stage folder."""
    if not (path / CHECKPOINTS).is_dir():
        return path
    checkpoints = complete_checkpoints(path)
    if not checkpoints:
        raise InputError(f"{path / CHECKPOINTS} holds no finished checkpoint yet")
    return checkpoints[-1]


def _check_probe(checkpoint: Path, folder: Path) -> None:
    """Print how far the folder's logits are from those in training. Raises ProbeMismatchError."""
    is_bf16 = bool((read_state(checkpoint).identity["bf16"] or {}).get("enabled"))
    comparison = compare_probe(checkpoint, folder, torch.bfloat16 if is_bf16 else torch.float32)
    if not comparison.matches:
        raise ProbeMismatchError(f"{comparison.describe()}\n{checkpoint} was not written")
    print(comparison.describe())
