"""Probe logits: the model's output for one fixed sample, stored in every checkpoint.

    probe.safetensors    input_ids, position_ids [n], positions [p], logits [p, vocabulary] float32

Whoever reads the checkpoint recomputes them: a resumed run before its first step, `beingvl export`
after writing a Hugging Face folder. A wrong tensor, a lost vocabulary row or a different attention
shows as different logits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from transformers import AutoModelForCausalLM

from beingvl.artefact.files import write_atomically
from beingvl.data.arrow_shards import ShardReader
from beingvl.errors import InputError

PROBE_FILE = "probe.safetensors"
MAX_TOKENS, MAX_POSITIONS = 512, 16
# Largest mean KL divergence (nats) between two implementations of the same arithmetic.
TOLERANCE_NATS = {torch.float32: 1e-9, torch.bfloat16: 1e-2, torch.float16: 1e-3}


@dataclass(frozen=True)
class Probe:
    """`input_ids` `[n]` of one sample, its `position_ids` `[n]`, and the indices `positions` `[p]`
    whose logits are kept.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    positions: torch.Tensor

    def as_stock_arguments(self) -> dict[str, torch.Tensor]:
        """Arguments for a transformers model. Without the mask it would take a gap between position
        ids for the start of another sample.
        """
        ids = self.input_ids[None]
        position_ids = self.position_ids[None]
        return {
            "input_ids": ids,
            "position_ids": position_ids,
            "attention_mask": torch.ones_like(ids),
        }

    @classmethod
    def of_shards(cls, shards: ShardReader) -> Probe:
        """The first sample of the shards: at most 512 tokens, logits at 16 positions."""
        row = shards[0].input_ids
        ids = torch.from_numpy(row[:MAX_TOKENS].astype(np.int64))
        position_ids = torch.from_numpy(shards.positions(row)[:MAX_TOKENS].copy())
        positions = torch.linspace(0, len(ids) - 1, min(MAX_POSITIONS, len(ids)))
        return cls(ids, position_ids, positions.long().unique())


@dataclass(frozen=True)
class Comparison:
    """Two sets of logits for one probe. `kl_nats`: mean over positions of KL(stored || found)."""

    kl_nats: float
    max_difference: float
    tolerance_nats: float

    @property
    def matches(self) -> bool:
        return self.kl_nats <= self.tolerance_nats

    def describe(self) -> str:
        verdict = "the same model" if self.matches else "NOT the model that was trained"
        return (
            f"probe logits: KL {self.kl_nats:.2g} nats (at most {self.tolerance_nats:g}), "
            f"largest difference {self.max_difference:.2g}: {verdict}"
        )


def save_probe(folder: Path, probe: Probe, logits: torch.Tensor) -> None:
    """Write `probe.safetensors`, before the checkpoint's manifest, which lists it."""
    tensors = {
        "input_ids": probe.input_ids,
        "position_ids": probe.position_ids,
        "positions": probe.positions,
        "logits": logits.float().cpu().contiguous(),
    }
    write_atomically(folder / PROBE_FILE, save(tensors))


def load_probe(folder: Path) -> tuple[Probe, torch.Tensor]:
    """A checkpoint's probe and its logits. Raises InputError when missing or damaged."""
    path = folder / PROBE_FILE
    try:
        tensors = load_file(path)
    except (FileNotFoundError, SafetensorError) as error:
        raise InputError(
            f"{path} is missing or damaged ({error}), so the model cannot be compared with it"
        ) from error
    ids = tensors["input_ids"]
    # older checkpoints have none
    position_ids = tensors.get("position_ids", torch.arange(len(ids)))
    return Probe(ids, position_ids, tensors["positions"]), tensors["logits"]


def compare_logits(stored: torch.Tensor, found: torch.Tensor, dtype: torch.dtype) -> Comparison:
    """Compare logits `[p, vocabulary]`; `dtype` is the coarser of the two computations'."""
    tolerance = TOLERANCE_NATS[dtype]
    found = found[:, : stored.shape[1]].cpu()
    if found.shape != stored.shape:
        return Comparison(math.inf, math.inf, tolerance)
    ours, theirs = stored.double().log_softmax(-1), found.double().log_softmax(-1)
    kl = (ours.exp() * (ours - theirs)).sum(-1).mean().item()
    difference = float((stored - found).abs().max())
    return Comparison(kl if math.isfinite(kl) else math.inf, difference, tolerance)


@torch.inference_mode()
def compare_probe(checkpoint: Path, folder: Path, trained_dtype: torch.dtype) -> Comparison:
    """Load `folder` with stock transformers and compare its logits with the checkpoint's probe."""
    probe, stored = load_probe(checkpoint)
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype="auto", trust_remote_code=False
    ).eval()
    logits = model(**probe.as_stock_arguments(), use_cache=False).logits
    found = logits[0, probe.positions].float()
    coarser = max(trained_dtype, model.dtype, key=TOLERANCE_NATS.__getitem__)
    return compare_logits(stored, found, coarser)
