"""Predict memory per rank and time per epoch of a stage, and propose a micro-batch and offload.

  beingvl plan --model base --stage ds_configs/stage3.json --gpus 8x80GB --nodes 2 --data shards/

Nothing is loaded and no GPU is needed: shapes come from the model's config. A run prints its own
prediction beside what it really used. The time assumes that a GPU reaches --mfu of its peak, which
is a guess until a run has shown it.
"""

from __future__ import annotations

import argparse
import re
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
from beingvl.stage.stage_config import StageConfig, load_stage_config
from beingvl.train.flops import GPU_PEAKS, step_flops
from beingvl.train.memory import device_bytes, predict_memory
from beingvl.vocab import VocabLayout

USABLE = 0.92
"""Share of a device's memory that training may use; the rest is CUDA's, NCCL's and
fragmentation.
"""


def run(args: argparse.Namespace) -> int:
    gpus, capacity = parse_gpus(args.gpus)
    num_ranks = gpus * args.nodes
    config = load_stage_config(args.stage, args.set)
    model = find_start_model(args.model)
    read_manifest(model, "model")
    model_config = AutoConfig.from_pretrained(model)
    plan = plan_of(model, model_config, config)
    memory = predict_memory(plan, model_config, config, num_ranks)
    print(
        f"{num_ranks} ranks, ZeRO-{config.zero_stage}, micro-batch "
        f"{config.micro_batch_size}; predicted memory of one rank:"
    )
    for purpose, amount in memory.items():
        print(
            f"  {purpose:<14} {amount / 1e9:8.2f} "
            f"GB{'  (in the memory of the CPU)' if purpose.startswith('cpu_') else ''}"
        )
    print(f"  {'on the device':<14} {device_bytes(memory) / 1e9:8.2f} GB of {capacity / 1e9:g} GB")
    print(proposal(plan, model_config, config, num_ranks, capacity))
    if args.data:
        print(time_per_epoch(args, config, plan, model_config, num_ranks))
    return 0


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


def proposal(
    plan: list[PlannedParameter],
    model_config: Any,
    config: StageConfig,
    num_ranks: int,
    capacity: int,
) -> str:
    """The largest micro-batch that fits; when none does, what to change."""
    per_rank = config.sequences_per_step // num_ranks
    if per_rank * num_ranks != config.sequences_per_step:
        return (
            f"train_batch_size {config.sequences_per_step} does not divide by {num_ranks} "
            "ranks: change it, or their number"
        )
    fitting = [
        size
        for size in range(1, per_rank + 1)
        if per_rank % size == 0
        and device_bytes(predict_memory(plan, model_config, config, num_ranks, size))
        <= USABLE * capacity
    ]
    if fitting:
        best = fitting[-1]
        return (
            f"proposal: train_micro_batch_size_per_gpu {best}, accumulation "
            f"{per_rank // best}, no change of offload"
        )
    if config.zero_stage < 3:
        return "proposal: it does not fit; use ZeRO stage 3"
    memory = predict_memory(plan, model_config, config, num_ranks, 1)
    kept = device_bytes(memory) - memory["optimizer"] - memory["gradients"] - memory["update"]
    if kept <= USABLE * capacity:
        return 'proposal: it does not fit; micro-batch 1 and "offload_optimizer": {"device": "cpu"}'
    if kept - memory["weights"] <= USABLE * capacity:
        return (
            "proposal: it does not fit; micro-batch 1, offload_optimizer and offload_param "
            "(ds_configs/stage3-offload.json)"
        )
    return (
        "proposal: it does not fit, even with everything offloaded: more GPUs, a "
        "shorter sequence or a smaller loss chunk"
    )


def time_per_epoch(
    args: argparse.Namespace,
    config: StageConfig,
    plan: list[PlannedParameter],
    model_config: Any,
    num_ranks: int,
) -> str:
    """FLOPs of the samples that the stage's mixture draws in an epoch, over what the GPUs reach."""
    if args.gpu not in GPU_PEAKS:
        raise InputError(f"--gpu {args.gpu!r} is not known, known are {', '.join(GPU_PEAKS)}")
    shards = ShardReader(args.data)
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
    flops = step_flops(plan, width, num_tokens, round(times_drawn @ lengths**2), targets)
    hours = flops / (GPU_PEAKS[args.gpu] * args.mfu * num_ranks) / 3600
    size = f"{mixture.num_samples:,} samples, {num_tokens:,} tokens, {flops:.3g} FLOPs"
    return f"one epoch: {size}, {hours:.2f} hours at an MFU of {args.mfu:g}"
