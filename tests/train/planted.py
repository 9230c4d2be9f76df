"""Defects for a run to find."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from beingvl.artefact.manifest import read_manifest, start_folder, write_manifest


def cut_gradient(engine: Any) -> Any:
    """The engine, in which model.layers.1.mlp.down_proj.weight is trained but gets no gradient."""
    projection = engine.model.causal_lm.model.layers[1].mlp.down_proj
    projection.forward = lambda x: torch.nn.functional.linear(x, projection.weight.detach())
    return engine


def poison(model: Path, target: Path, token_id: int) -> Path:
    """The model with an infinite embedding row: every sample that holds the token gives a loss
    that is not finite.
    """
    tensors = load_file(model / "model.safetensors")
    tensors["model.embed_tokens.weight"][token_id] = float("inf")
    start_folder(target, "model")
    for name in read_manifest(model).files:
        (target / name).write_bytes((model / name).read_bytes())
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    write_manifest(target, "model", {}, read_manifest(model).lineage)
    return target
