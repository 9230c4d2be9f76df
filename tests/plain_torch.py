"""The oracle for the training engine: one process, no DeepSpeed, no packing, whole logits, stock
transformers model.

It shares the data order with the engine (which samples a step sees) and nothing of what the engine
computes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from beingvl.data.arrow_shards import ShardReader
from beingvl.data.loader import shifted_targets
from beingvl.data.shard_columns import Sample
from beingvl.data.stage_data import data_of
from beingvl.stage.stage_config import StageConfig
from beingvl.vbpe.reference import positions_reference
from beingvl.vbpe.visual_bpe import VisualBPE


def train_plain(
    model_folder: Path,
    shards_folder: Path,
    config: StageConfig,
    trained_rows: slice | None = None,
    adapt: Callable[[torch.nn.Module], object] = lambda model: None,
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses of all steps and the final weights. `trained_rows` trains only those rows of
    embedding and head; `adapt` may change the model first, and what it freezes stays.
    """
    model = AutoModelForCausalLM.from_pretrained(
        model_folder, dtype=torch.float32, attn_implementation="eager"
    )
    adapt(model)
    shards = ShardReader(shards_folder, model_folder)
    data = data_of(config, shards)
    by_id = {shards[index].id: shards[index] for index in range(len(shards))}
    matrices = []
    if trained_rows is not None:
        matrices = [model.get_input_embeddings().weight, model.get_output_embeddings().weight]
    trained = matrices or [weights for weights in model.parameters() if weights.requires_grad]
    start = [matrix.detach().clone() for matrix in matrices]
    settings = config.deepspeed["optimizer"]["params"]
    optimizer = torch.optim.AdamW(
        trained,
        lr=settings["lr"],
        betas=settings["betas"],
        eps=settings["eps"],
        weight_decay=settings["weight_decay"],
    )
    losses = []
    num_steps = min(data.num_steps, config.beingvl.max_steps or data.num_steps)
    for step in range(num_steps):
        batch = data.micro_batch(step, 0, 0, 1, config.sequences_per_step)
        samples = [by_id[name] for name in batch.sample_ids]  # a step may hold a sample twice
        loss_sum, count = torch.zeros(()), 0
        for sample in samples:
            ids = torch.from_numpy(sample.input_ids.astype("int64"))[None]
            position_ids = torch.tensor(plain_positions(sample, shards, model_folder))[None]
            everything = torch.ones_like(ids)
            logits = model(ids, everything, position_ids).logits[0]
            targets = torch.from_numpy(shifted_targets(sample, shards.layout))
            loss_sum = loss_sum + torch.nn.functional.cross_entropy(
                logits, targets, reduction="sum"
            )
            count += int((targets >= 0).sum())
        optimizer.zero_grad()
        (loss_sum / count).backward()
        if trained_rows is not None:
            for matrix in matrices:
                matrix.grad[: trained_rows.start] = 0
        torch.nn.utils.clip_grad_norm_(trained, config.deepspeed["gradient_clipping"])
        optimizer.param_groups[0]["lr"] = plain_learning_rate(step, num_steps, config)
        optimizer.step()
        if trained_rows is not None:  # weight decay moved the frozen rows: put them back
            with torch.no_grad():
                for matrix, original in zip(matrices, start, strict=True):
                    matrix[: trained_rows.start] = original[: trained_rows.start]
        losses.append(float(loss_sum.detach() / count))
    return losses, {name: tensor.detach() for name, tensor in model.state_dict().items()}


def plain_positions(sample: Sample, shards: ShardReader, model_folder: Path) -> list[int]:
    """By the readable twin."""
    if shards.manifest.details.get("image_positions") != "anchor":
        return list(range(len(sample.input_ids)))
    vbpe = VisualBPE.load(model_folder)
    first = shards.layout.first_image_id
    image_ids = [max(-1, token - first) for token in sample.input_ids.tolist()]
    return positions_reference(image_ids, vbpe.num_codes, vbpe.merges.tolist())


def plain_learning_rate(step: int, num_steps: int, config: StageConfig) -> float:
    """Cosine after warm-up, written down a second time."""
    num_warmup = math.ceil(num_steps * config.beingvl.warmup_ratio)
    if step < num_warmup:
        return config.learning_rate * (step + 1) / num_warmup
    return (
        config.learning_rate
        * (1 + math.cos(math.pi * (step - num_warmup) / (num_steps - num_warmup)))
        / 2
    )
