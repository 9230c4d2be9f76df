"""Trained adapters in PEFT's own format: stock `peft` loads them onto the stage's start model.

    adapter_config.json         where the adapters are, their rank and alpha, what else is trained
    adapter_model.safetensors   adapters in float32, everything else in the start model's dtype
    manifest.json               written last

If only visual rows of a matrix were trained, they become PEFT's trainable tokens. A matrix whose
text rows were trained too is stored whole (`modules_to_save`), as are norms and trained layers
without adapters.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from beingvl.artefact.files import give_usual_mode, to_json, write_atomically
from beingvl.artefact.manifest import Manifest
from beingvl.model.extended_vocab import VISUAL_ROWS, stored_slice
from beingvl.model.param_groups import is_adapter
from beingvl.model.start_model import ADAPTER_CONFIG
from beingvl.model.target_folder import finish_target, start_target
from beingvl.model.weight_files import WeightFolder
from beingvl.stage.stage_config import Lora
from beingvl.train.checkpoint import CheckpointState, StateReader, read_state, refuse_damaged
from beingvl.train.hf_folder import trained_adapters, trained_tensors
from beingvl.vocab import VocabLayout

WEIGHTS_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."  # of the names in that file


def write_adapter_folder(start_model: Path, checkpoint: Path, target: Path) -> Manifest:
    """Raises InputError for a damaged checkpoint, or one that does not fit `start_model`.

    Holds everything that was trained in memory, without its moments.
    """
    state = read_state(checkpoint)
    refuse_damaged(checkpoint, state.files)
    weights, layout = WeightFolder(start_model), VocabLayout.load(start_model)
    new_rows, whole = _beside_adapters(state, layout)
    tensors: dict[str, torch.Tensor] = {}
    token_ids: dict[str, list[int]] = {}
    with StateReader(checkpoint, state) as reader:
        for name in filter(is_adapter, state.parameters):
            tensors[PREFIX + name] = reader.master(name)
        for module in new_rows:
            dtype = weights.dtype(f"{module}.weight")
            rows = reader.master(f"{module}.{VISUAL_ROWS}").to(dtype)
            tensors[f"{PREFIX}{module}.token_adapter.trainable_tokens_delta"] = rows
            token_ids[module] = list(range(layout.num_text, layout.num_text + len(rows)))
    for stored_name, make in trained_tensors(weights, checkpoint, state, layout).items():
        module = stored_name.removesuffix(".weight")
        if module in whole:
            tensors[PREFIX + stored_name] = make()
    config = _peft_config(trained_adapters(weights, state), start_model)
    config["modules_to_save"] = whole or None
    config["trainable_token_indices"] = token_ids or None
    start_target(target, "adapter", sum(tensor.nbytes for tensor in tensors.values()))
    save_file(tensors, target / WEIGHTS_FILE, metadata={"format": "pt"})
    give_usual_mode(target / WEIGHTS_FILE)
    write_atomically(target / ADAPTER_CONFIG, to_json(config))
    details = {"identity": state.identity}
    counts = {"step": state.step}
    return finish_target(target, "adapter", counts, state.identity["lineage"], details, {})


def _beside_adapters(state: CheckpointState, layout: VocabLayout) -> tuple[list[str], list[str]]:
    """Modules with only their visual rows trained, and modules to store whole."""
    parts: dict[str, list[str]] = {}
    for name in state.parameters:
        if not is_adapter(name):
            module = stored_slice(name, layout.num_text)[0].rpartition(".")[0]
            parts.setdefault(module, []).append(name)
    new_rows = [module for module, names in parts.items() if names == [f"{module}.{VISUAL_ROWS}"]]
    return new_rows, [module for module in parts if module not in new_rows]


def _peft_config(adapters: Mapping[str, Lora], start_model: Path) -> dict[str, Any]:
    """The fields of `peft.LoraConfig` that say where the adapters are."""
    by_module = {name.removesuffix(".weight"): lora for name, lora in adapters.items()}
    first = next(iter(by_module.values()))
    others = {module: lora for module, lora in by_module.items() if lora != first}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(start_model.resolve()),
        "inference_mode": True,
        "r": first.rank,
        "lora_alpha": first.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "target_modules": list(by_module),
        "rank_pattern": {module: lora.rank for module, lora in others.items()},
        "alpha_pattern": {module: lora.alpha for module, lora in others.items()},
    }
