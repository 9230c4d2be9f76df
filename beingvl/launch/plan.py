"""Predict memory per rank and time per epoch of a stage, and propose a micro-batch and offload.

plan            from a model's config alone: nothing is loaded, and no GPU is needed
plan_of         the freezer's plan, from shapes
propose         the largest micro-batch that fits, or what to change
epoch_flops     FLOPs of the samples that the mixture draws
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

from beingvl.artefact.manifest import read_manifest
from beingvl.data.arrow_shards import ShardReader
from beingvl.data.stage_data import mixture_of
from beingvl.errors import InputError
from beingvl.model.extended_vocab import build_packed_model
from beingvl.model.packed_check import refuse_short_window, refuse_unlike_packed
from beingvl.model.param_groups import PlannedParameter, plan_parameters
from beingvl.model.start_model import find_start_model
from beingvl.stage.mixture import fit_mixture
from beingvl.stage.stage_config import StageConfig, load_stage_config
from beingvl.train.flops import ASSUMED_MFU, GPU_PEAKS, step_flops
from beingvl.train.memory import device_bytes, predict_memory
from beingvl.vocab import VocabLayout

USABLE = 0.92
"""Share of a device's memory that training may use; the rest is CUDA's, NCCL's and
fragmentation.
"""


@dataclass(frozen=True)
class Prediction:
    """`memory`: bytes of one rank by purpose, `cpu_…` what is offloaded; `capacity`: bytes of a
    device; `epoch`: a sentence, empty without data.
    """

    num_ranks: int
    config: StageConfig
    memory: dict[str, int]
    capacity: int
    proposal: str
    epoch: str

    def __str__(self) -> str:
        lines = [
            f"{self.num_ranks} ranks, ZeRO-{self.config.zero_stage}, micro-batch "
            f"{self.config.micro_batch_size}; predicted memory of one rank:"
        ]
        for purpose, amount in self.memory.items():
            place = "  (in the memory of the CPU)" if purpose.startswith("cpu_") else ""
            lines.append(f"  {purpose:<14} {amount / 1e9:8.2f} GB{place}")
        used = f"{device_bytes(self.memory) / 1e9:8.2f} GB of {self.capacity / 1e9:g} GB"
        lines += [f"  {'on the device':<14} {used}", self.proposal, self.epoch]
        return "\n".join(lines).rstrip()


def plan(
    model: Path | str,
    stage: Path | str,
    gpus: str,
    *,
    nodes: int = 1,
    data: Path | str | None = None,
    gpu: str = "H100",
    mfu: float = ASSUMED_MFU,
    overrides: Sequence[str] = (),
) -> Prediction:
    """What a stage needs on `nodes` nodes with `gpus` each ("8x80GB").

    With `data`, a shard folder, also the time per epoch on GPUs of the kind `gpu`, when the model's
    own FLOPs reach the share `mfu` of their peak.
    """
    per_node, capacity = parse_gpus(gpus)
    num_ranks = per_node * nodes
    config = load_stage_config(stage, overrides)
    folder = find_start_model(Path(model))
    read_manifest(folder, "model")
    model_config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    planned = plan_of(folder, model_config, config)
    epoch = ""
    if data:
        if gpu not in GPU_PEAKS:
            raise InputError(f"--gpu {gpu!r} is not known, known are {', '.join(GPU_PEAKS)}")
        shards = ShardReader(data)
        note = fit_mixture(config, shards.manifest)[1]
        num_samples, num_tokens, flops = epoch_flops(shards, config, planned, model_config)
        hours = flops / (GPU_PEAKS[gpu] * mfu * num_ranks) / 3600
        epoch = (
            f"one epoch: {num_samples:,} samples, {num_tokens:,} tokens, {flops:.3g} FLOPs, "
            f"{hours:.2f} hours at an MFU of {mfu:g}{note and f'; {note}'}"
        )
    return Prediction(
        num_ranks,
        config,
        predict_memory(planned, model_config, config, num_ranks),
        capacity,
        propose(planned, model_config, config, num_ranks, capacity),
        epoch,
    )


def parse_gpus(text: str) -> tuple[int, int]:
    """`8x80GB` -> (8, 80_000_000_000). Raises InputError for anything else."""
    found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)GB", text, re.IGNORECASE)
    if not found:
        raise InputError(f"--gpus {text!r}: expected NUMBERxMEMORY, for example 8x80GB")
    return int(found[1]), int(found[2]) * 10**9


def plan_of(model: Path, model_config: Any, config: StageConfig) -> list[PlannedParameter]:
    """The freezer's plan for a model folder, from shapes alone."""
    num_text = VocabLayout.load(model).num_text
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(model_config)]
    refuse_short_window(
        model_config, config.beingvl.sequence_length, "lower beingvl.sequence_length to {window}"
    )
    refuse_unlike_packed(model_class, model_config)
    with torch.device("meta"):
        built = build_packed_model(
            model_class, model_config, num_text, model_config.vocab_size - num_text, 1, False
        )
    shapes = {
        name: tuple(parameter.shape) for name, parameter in built.causal_lm.named_parameters()
    }
    return plan_parameters(shapes, config.beingvl.trainable)


def propose(
    planned: Sequence[PlannedParameter],
    model_config: Any,
    config: StageConfig,
    num_ranks: int,
    capacity: int,
) -> str:
    """The largest micro-batch that fits; when none does, what to change."""
    per_rank, rest = divmod(config.sequences_per_step, num_ranks)
    if rest:
        return (
            f"train_batch_size {config.sequences_per_step} does not divide by {num_ranks} ranks; "
            f"{config.batches_beside(num_ranks)}"
        )
    usable = USABLE * capacity
    for size in range(per_rank, 0, -1):
        memory = predict_memory(planned, model_config, config, num_ranks, size)
        if per_rank % size == 0 and device_bytes(memory) <= usable:
            return (
                f"proposal: train_micro_batch_size_per_gpu {size}, accumulation "
                f"{per_rank // size}, no change of offload"
            )
    if config.zero_stage < 3:
        return "proposal: it does not fit; use ZeRO stage 3"
    memory = predict_memory(planned, model_config, config, num_ranks, 1)
    kept = device_bytes(memory) - memory["optimizer"] - memory["gradients"] - memory["update"]
    if kept <= usable:
        return 'proposal: it does not fit; micro-batch 1 and "offload_optimizer": {"device": "cpu"}'
    if kept - memory["weights"] <= usable:
        return (
            "proposal: it does not fit; micro-batch 1, offload_optimizer and offload_param "
            "(ds_configs/stage3-offload.json)"
        )
    return (
        "proposal: it does not fit, even with everything offloaded: more GPUs, a shorter sequence "
        "or a smaller loss chunk"
    )


def epoch_flops(
    shards: ShardReader, config: StageConfig, planned: Sequence[PlannedParameter], model_config: Any
) -> tuple[int, int, float]:
    """Samples, tokens and FLOPs of what the stage's mixture draws in an epoch."""
    mixture = mixture_of(config, shards)
    draws = mixture.counts(mixture.num_samples)
    repeats = [
        draws.get(name, 0) / max(1, len(own))
        for name, own in zip(shards.sources, shards.members, strict=True)
    ]
    times_drawn = np.array(repeats)[shards.source_of]
    lengths = shards.lengths.astype(np.int64)
    num_tokens = round(times_drawn @ lengths)
    targets = round(shards.manifest.counts["target_tokens"] * num_tokens / lengths.sum())
    heads = model_config.num_attention_heads
    width = heads * (getattr(model_config, "head_dim", None) or model_config.hidden_size // heads)
    flops = step_flops(planned, width, num_tokens, round(times_drawn @ lengths**2), targets)
    return mixture.num_samples, num_tokens, flops
