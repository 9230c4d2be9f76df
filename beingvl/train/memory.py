"""Predicted memory of one rank, in bytes, by what it is for: arithmetic on shapes, nothing is
measured.

    weights       n * b, cut by the ranks under ZeRO-3; on the CPU with offload_param; on NVMe
                  all but its buffers and max_in_cpu
    gathered      ZeRO-3 on several ranks: weights that DeepSpeed leaves whole between forward
                  and backward, a billion by default;
                  at least the largest twice (one computes while the next is fetched)
    gradients     trained * b; cut under ZeRO-2 and 3
    optimizer     trained * 12 (float32 master and two moments; 8 without master: stage 0 in
                  float32); cut from ZeRO-1 on; on NVMe
                  its buffers, each a sub-group of float32
    update        ZeRO-1 to 3, while Adam runs: float32 gradients and two temporaries of what it
                  updates at once, a sub-group in
                  stage 3, this rank's share in 1 and 2; fused, no temporaries. On the device it
                  takes the place of activations and logits: only what it needs beyond them counts
    activations   with checkpointing the input of every layer and one layer's inside, else every
                  layer's inside
    logits        one chunk of target tokens: b, its float32 copy and that one's gradient
    buffers       DeepSpeed's reduce and gather buckets, at most as large as what goes through
                  them (the engine sees to it)

b is 2 bytes in bf16, 4 in float32. The inside of a layer is taken as 14 hidden sizes and 3
intermediate sizes a token.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from beingvl.model.param_groups import PlannedParameter
from beingvl.stage.deepspeed_keys import fewest_buffers
from beingvl.stage.stage_config import StageConfig

DEFAULT_BUCKET_ELEMENTS = 500_000_000  # DeepSpeed's, as the next
DEFAULT_SUB_GROUP_ELEMENTS = 1_000_000_000
DEFAULT_MAX_IN_CPU = 1_000_000_000
# ours: with DeepSpeed's ten times as many the buffers would hold the whole optimizer
NVME_SUB_GROUP_ELEMENTS = 100_000_000


def reduce_bucket_elements(plan: Sequence[PlannedParameter], config: StageConfig) -> int:
    """What the JSON allows, but not more than there are gradients: DeepSpeed allocates all of
    it, whatever goes through it.
    """
    allowed = config.deepspeed["zero_optimization"].get(
        "reduce_bucket_size", DEFAULT_BUCKET_ELEMENTS
    )
    return min(int(allowed), sum(planned.num_elements for planned in plan if planned.rule.train))


def predict_memory(
    plan: Sequence[PlannedParameter],
    model_config: Any,
    config: StageConfig,
    num_ranks: int,
    micro_batch_size: int | None = None,
) -> dict[str, int]:
    """Bytes on the device of one rank, by purpose; with offload, what moves to the CPU's memory
    is in `cpu_…`.
    """
    zero, stage = config.deepspeed["zero_optimization"], config.zero_stage
    width = 2 if config.is_bf16 else 4
    total = sum(planned.num_elements for planned in plan)
    trained = sum(planned.num_elements for planned in plan if planned.rule.train)
    tokens = (micro_batch_size or config.micro_batch_size) * config.beingvl.sequence_length
    hidden, num_layers = model_config.hidden_size, model_config.num_hidden_layers
    inside = (
        tokens * (14 * hidden + 3 * getattr(model_config, "intermediate_size", 4 * hidden)) * width
    )
    inputs = num_layers * tokens * hidden * width
    vocabulary = (
        sum(planned.shape[0] for planned in plan if planned.name.endswith("_rows")) // 2
    )  # embedding and head
    largest = max(planned.num_elements for planned in plan)
    bucket = reduce_bucket_elements(plan, config)

    def cut(amount: int, first_stage: int) -> int:
        return -(-amount // num_ranks) if stage >= first_stage else amount

    memory = {
        "weights": cut(total * width, 3),
        "gathered": max(2 * largest, min(total, _left_whole(config))) * width
        if stage == 3 and num_ranks > 1
        else 0,
        "gradients": cut(trained * width, 2),
        "optimizer": cut(trained * (8 if stage == 0 and not config.is_bf16 else 12), 1),
        "activations": inputs + inside
        if config.beingvl.activation_checkpointing
        else num_layers * inside,
        "logits": min(tokens, config.beingvl.loss_chunk_tokens) * vocabulary * (width + 8),
        "buffers": (2 if num_ranks > 1 else 1 if stage == 3 else 0) * bucket * width,
    }
    update = _update_bytes(config, cut(trained, 1))
    is_offloaded = (zero.get("offload_optimizer") or {}).get("device", "none") != "none"
    memory["update"] = (
        update if is_offloaded else max(0, update - memory["activations"] - memory["logits"])
    )
    for key, purposes in (
        ("offload_param", ["weights"]),
        ("offload_optimizer", ["optimizer", "gradients", "update"]),
    ):
        if (zero.get(key) or {}).get("device", "none") != "none":
            memory |= {f"cpu_{purpose}": memory[purpose] for purpose in purposes} | dict.fromkeys(
                purposes, 0
            )
    shapes = {planned.name: planned.shape for planned in plan}
    return memory | _beside_nvme(config, shapes, cut(trained, 3), num_ranks, width)


def _left_whole(config: StageConfig) -> int:
    """How many gathered weights DeepSpeed leaves for their next use; on NVMe, where nothing may
    wait for it, none.
    """
    zero = config.deepspeed["zero_optimization"]
    if "offload_param" in config.nvme_offloads:
        return 0
    limits = [
        zero.get(f"stage3_{name}", zero.get(name, 10**9))
        for name in ("max_live_parameters", "max_reuse_distance")
    ]
    return min(map(int, limits))


def _update_bytes(config: StageConfig, trained: int) -> int:
    """What an update of `trained` elements of a rank needs beside its weights, moments and
    stored gradients, stage 0 left out.
    """
    if config.zero_stage == 0:
        return 0
    is_on_nvme = "offload_optimizer" in config.nvme_offloads  # whose buffers hold the gradients
    default = NVME_SUB_GROUP_ELEMENTS if is_on_nvme else DEFAULT_SUB_GROUP_ELEMENTS
    sub_group = int(config.deepspeed["zero_optimization"].get("sub_group_size", default))
    at_once = min(trained, sub_group) if config.zero_stage == 3 else trained
    temporaries = 0 if config.deepspeed["optimizer"]["params"].get("fused") else 2
    return at_once * 4 * (temporaries + (not is_on_nvme))


def _beside_nvme(
    config: StageConfig,
    shapes: Mapping[str, Sequence[int]],
    trained: int,
    num_ranks: int,
    width: int,
) -> dict[str, int]:
    """What stays in the CPU's memory of a rank that trains `trained` elements, for what is
    offloaded to NVMe.
    """
    zero, memory = config.deepspeed["zero_optimization"], {}
    size, count = swap_buffers(shapes, num_ranks)
    sub_group = min(trained, int(zero.get("sub_group_size", NVME_SUB_GROUP_ELEMENTS)) + size)
    for key, offload in config.nvme_offloads.items():
        if key == "offload_optimizer":
            memory["cpu_optimizer"] = (
                offload.get("buffer_count", fewest_buffers(offload)) * sub_group * 4
            )
        else:
            kept = min(trained, int(offload.get("max_in_cpu", DEFAULT_MAX_IN_CPU)))
            buffers = offload.get("buffer_count", count) * offload.get("buffer_size", size)
            memory["cpu_weights"] = (buffers + kept + (sub_group if kept < trained else 0)) * width
    return memory


def swap_buffers(shapes: Mapping[str, Sequence[int]], num_ranks: int) -> tuple[int, int]:
    """(elements, number) of the buffers that weights on NVMe need: the largest one's share, and
    how many are in memory together.

    Those are the matrices of a layer, when a frozen one is computed again for the gradient, and
    four row blocks.
    """
    matrices = [re.search(r"\.\d+\.", name) for name, shape in shapes.items() if len(shape) > 1]
    of_layers = Counter(match[0] for match in matrices if match)
    largest = max(math.prod(shape) for shape in shapes.values())
    return -(-largest // num_ranks), max(of_layers.values(), default=0) + 4


def device_bytes(memory: dict[str, int]) -> int:
    """Of a prediction, what lies on the device."""
    return sum(amount for purpose, amount in memory.items() if not purpose.startswith("cpu_"))
