"""From a checkpoint to a stock Hugging Face folder: the stage's start model with the trained
tensors in place.

Frozen tensors come from the start model byte for byte (unchanged files are hard-linked where
possible). Trained tensors are the checkpoint's float32 weights, cast to the start model's dtype.
Text and visual rows become one matrix again, and adapters are merged into their weights. Tensors
are streamed: memory holds one at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch

from beingvl.artefact.files import copy_inside
from beingvl.artefact.manifest import Manifest, read_manifest, verify_file
from beingvl.data.made_with import FACTS
from beingvl.errors import InputError
from beingvl.model import card
from beingvl.model.adapters import merge
from beingvl.model.extended_vocab import stored_slice
from beingvl.model.param_groups import A, B, adapters_by_weight
from beingvl.model.rewrite_weights import bytes_to_write, rewrite_weights
from beingvl.model.target_folder import finish_target, start_target
from beingvl.model.weight_files import WeightFolder
from beingvl.stage.stage_config import Lora, rules_of
from beingvl.train.checkpoint import (
    CheckpointState,
    StateReader,
    read_state,
    refuse_damaged,
)
from beingvl.vocab import VocabLayout


def write_hf_folder(
    start_model: Path,
    checkpoint: Path,
    target: Path,
    link: bool = True,
    check: Callable[[Path], None] | None = None,
    shards: Manifest | None = None,
) -> Manifest:
    """Raises InputError if the checkpoint was not trained from `start_model`, or if a file of
    either is not as it was written.

    `check` is called with the folder before the manifest is written; if it raises, the folder stays
    incomplete. `shards`: manifest of the training data, for the model card.
    """
    manifest = read_manifest(start_model, "model")
    state = read_state(checkpoint)
    if state.identity["start_model"] != manifest.content_hash:
        raise InputError(
            f"{checkpoint} was not trained from {start_model}: its start model has a different "
            "hash; give the right one"
        )
    layout = VocabLayout.load(start_model)
    weights = WeightFolder(start_model)
    refuse_damaged(checkpoint, state.files)
    trained = trained_tensors(weights, checkpoint, state, layout)
    weight_files = {*weights.files, weights.index_file}
    others = [name for name in manifest.files if name not in weight_files]
    num_bytes = sum(int(manifest.files[name]["bytes"]) for name in others)
    num_bytes += bytes_to_write(weights, target, trained, link)
    for name in others:
        verify_file(start_model, name, manifest)
    start_target(target, "model", num_bytes)
    copy_inside(start_model, target, others)
    hashes = rewrite_weights(weights, target, trained, link=link)
    if check:
        check(target)
    counts = {**manifest.counts, "step": state.step}
    identity = state.identity
    made_with = {fact.name: identity.get(fact.name, fact.choices[0]) for fact in FACTS}
    details = {
        "identity": identity,
        **made_with,
        "variant": identity.get("variant"),
        "step": state.step,
        "data": card.data_facts(shards) if shards else None,
        "versions": {name: version(name) for name in ("torch", "transformers", "deepspeed")},
        "history": card.history_of(manifest),
    }
    return finish_target(target, "model", counts, identity["lineage"], details, hashes)


def trained_adapters(weights: WeightFolder, state: CheckpointState) -> dict[str, Lora]:
    """Stored tensor name -> the adapter that the stage trained beside it."""
    shapes = {name: weights.shape(name) for name in weights}
    adapters = adapters_by_weight(shapes, rules_of(state.identity.get("trainable", [])))
    return {
        name: lora
        for name, lora in adapters.items()
        if name.removesuffix(".weight") + A in state.parameters
    }


def trained_tensors(
    weights: WeightFolder, checkpoint: Path, state: CheckpointState, layout: VocabLayout
) -> dict[str, Callable[[], torch.Tensor]]:
    """Stored tensor name -> function that returns the tensor with its trained parts in place."""
    StateReader(checkpoint, state).__exit__()
    adapters = trained_adapters(weights, state)
    trained_parts: dict[str, list[str]] = {}
    for name, parameter in state.parameters.items():
        stored_name, rows = stored_slice(name, layout.num_text)
        shape = list(weights[stored_name][rows].shape) if stored_name in weights else None
        if shape and stored_name in adapters:
            shape[name.endswith(B)] = adapters[stored_name].rank
        if shape != parameter["shape"]:
            found = f"{name} of the shape {parameter['shape']}"
            raise InputError(f"{checkpoint} has trained {found}, {weights.folder} has {shape}")
        trained_parts.setdefault(stored_name, []).append(name)

    def assemble(stored_name: str) -> torch.Tensor:
        with StateReader(checkpoint, state) as reader:
            if stored_name in adapters:
                a, b = map(reader.master, trained_parts[stored_name])
                return merge(weights[stored_name], a, b, adapters[stored_name])
            # on its own private memory map only the rows that change are copied
            tensor = WeightFolder(weights.folder)[stored_name]
            for name in trained_parts[stored_name]:
                tensor[stored_slice(name, layout.num_text)[1]] = reader.master(name).to(
                    tensor.dtype
                )
        return tensor

    return {stored_name: partial(assemble, stored_name) for stored_name in trained_parts}
