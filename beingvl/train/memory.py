"""Predicted memory of one rank, in bytes, by purpose: arithmetic on shapes, nothing is measured.

n weights, some of them trained; b is 2 bytes in bf16, 4 in float32; "cut" is divided by the ranks.

    weights       n * b; cut under ZeRO-3; on the CPU with offload_param; on NVMe except for its
                  buffers and max_in_cpu; weights of an nf4 base take 9/16 bytes each: 4 bits, and
                  one float32 per 64
    gathered      ZeRO-3 on several ranks, or with offloaded weights: parameters that are whole.
                  From its second step on, DeepSpeed prefetches one bucket per module until
                  max_live_parameters (by default a billion) are whole; the last one fetched may be
                  the largest of a layer. A bucket is held twice, flat and as parameters, when it
                  is first used; the largest may be the vocabulary's rows. These also go past the
                  limit when they are fetched, but as much is released before they are used. With
                  an nf4 base: its largest weight
    gradients     trained * b; cut under ZeRO-2 and 3
    optimizer     trained * 12 (float32 master and two moments); cut; on NVMe its buffers, each a
                  sub-group of float32
    update        while Adam runs: float32 gradients and two temporaries of what it updates at once,
                  which is a sub-group in stage 3, this rank's share in 1 and 2; fused Adam has no
                  temporaries. On the device it reuses the memory of activations, logits and
                  gathered weights, so only the excess counts
    activations   with checkpointing: every layer's input and the inside of one layer; else the
                  inside of every layer: 14 hidden sizes and 3 intermediate sizes per token
    logits        one chunk of target tokens: b, a float32 copy, and that copy's gradient
    buffers       DeepSpeed's reduce and gather buckets, at most as large as what goes through them
                  (the engine limits them)
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

# DeepSpeed's defaults
DEFAULT_BUCKET_ELEMENTS = 500_000_000
DEFAULT_SUB_GROUP_ELEMENTS = 1_000_000_000
DEFAULT_MAX_IN_CPU = 1_000_000_000
DEFAULT_LEFT_WHOLE = 1_000_000_000
DEFAULT_PREFETCH_ELEMENTS = 50_000_000
# our default: DeepSpeed's is ten times as large, and the buffers would hold the whole optimizer
NVME_SUB_GROUP_ELEMENTS = 100_000_000


def reduce_bucket_elements(plan: Sequence[PlannedParameter], config: StageConfig) -> int:
    """At most as many as there are gradients: DeepSpeed allocates all of it, used or not."""
    zero = config.deepspeed["zero_optimization"]
    return min(int(zero.get("reduce_bucket_size", DEFAULT_BUCKET_ELEMENTS)), _num_trained(plan))


def predict_memory(
    plan: Sequence[PlannedParameter],
    model_config: Any,
    config: StageConfig,
    num_ranks: int,
) -> dict[str, int]:
    """Bytes on one rank's device, by purpose; what is offloaded to CPU memory is named `cpu_…`."""
    stage, width = config.zero_stage, 2 if config.is_bf16 else 4
    total, trained = sum(planned.num_elements for planned in plan), _num_trained(plan)
    # embedding and head each have all vocabulary rows
    vocabulary = sum(planned.shape[0] for planned in plan if planned.name.endswith("_rows")) // 2
    tokens = config.micro_batch_size * config.beingvl.sequence_length
    in_nf4 = [planned.num_elements for planned in plan if planned.is_in_nf4]
    gathered = _gathered_elements(plan, config, num_ranks) + max(in_nf4, default=0)

    def cut(amount: int, first_stage: int) -> int:
        return -(-amount // num_ranks) if stage >= first_stage else amount

    num_buckets = 2 if num_ranks > 1 else 1 if stage == 3 else 0
    memory = {
        "weights": cut((total - sum(in_nf4)) * width + sum(in_nf4) * 9 // 16, 3),
        "gathered": gathered * width,
        "gradients": cut(trained * width, 2),
        "optimizer": cut(trained * 12, 1),
        "activations": _activation_bytes(model_config, config, tokens, width),
        "logits": min(tokens, config.beingvl.loss_chunk_tokens) * vocabulary * (width + 8),
        "buffers": num_buckets * reduce_bucket_elements(plan, config) * width,
        "update": _update_bytes(config, cut(trained, 1)),
    }
    shapes = {planned.name: planned.shape for planned in plan}
    return _offloaded(memory, config) | _beside_nvme(
        config, shapes, cut(trained, 3), num_ranks, width
    )


def _num_trained(plan: Sequence[PlannedParameter]) -> int:
    return sum(planned.num_elements for planned in plan if planned.is_trained)


def _activation_bytes(model_config: Any, config: StageConfig, tokens: int, width: int) -> int:
    hidden, num_layers = model_config.hidden_size, model_config.num_hidden_layers
    intermediate = getattr(model_config, "intermediate_size", 4 * hidden)
    inside = tokens * (14 * hidden + 3 * intermediate) * width
    if config.beingvl.activation_checkpointing:
        return num_layers * tokens * hidden * width + inside
    return num_layers * inside


def _gathered_elements(
    plan: Sequence[PlannedParameter], config: StageConfig, num_ranks: int
) -> int:
    zero = config.deepspeed["zero_optimization"]
    is_offloaded = (zero.get("offload_param") or {}).get("device", "none") != "none"
    if config.zero_stage < 3 or (num_ranks == 1 and not is_offloaded):
        return 0

    def limit(name: str, default: int) -> int:
        return int(zero.get(f"stage3_{name}", zero.get(name, default)))

    ahead = limit("prefetch_bucket_size", DEFAULT_PREFETCH_ELEMENTS)
    whole = limit("max_reuse_distance", DEFAULT_LEFT_WHOLE)
    if ahead:
        whole = max(whole, limit("max_live_parameters", DEFAULT_LEFT_WHOLE))
    if "offload_param" in config.nvme_offloads:  # no prefetching there
        ahead = whole = 0
    total = sum(planned.num_elements for planned in plan)
    largest = max(planned.num_elements for planned in plan)
    of_layer = max(
        (planned.num_elements for planned in plan if not planned.name.endswith("_rows")), default=0
    )
    return min(total, max(whole + of_layer, largest)) + min(total, ahead + largest)


def _update_bytes(config: StageConfig, trained: int) -> int:
    """What an update of `trained` elements needs beyond weights, moments and stored gradients."""
    is_on_nvme = "offload_optimizer" in config.nvme_offloads  # its buffers hold the gradients
    default = NVME_SUB_GROUP_ELEMENTS if is_on_nvme else DEFAULT_SUB_GROUP_ELEMENTS
    sub_group = int(config.deepspeed["zero_optimization"].get("sub_group_size", default))
    at_once = min(trained, sub_group) if config.zero_stage == 3 else trained
    temporaries = 0 if config.deepspeed["optimizer"]["params"].get("fused") else 2
    return at_once * 4 * (temporaries + (not is_on_nvme))


def _offloaded(memory: dict[str, int], config: StageConfig) -> dict[str, int]:
    """Move what is offloaded to `cpu_…`; an update on the device reuses other memory there."""
    offloads = {
        "offload_param": ["weights"],
        "offload_optimizer": ["optimizer", "gradients", "update"],
    }
    moved: list[str] = []
    for key, purposes in offloads.items():
        offload = config.deepspeed["zero_optimization"].get(key) or {}
        if offload.get("device", "none") != "none":
            moved += purposes
    if "update" not in moved:
        freed = memory["activations"] + memory["logits"] + memory["gathered"]
        memory = {**memory, "update": max(0, memory["update"] - freed)}
    on_cpu = {f"cpu_{purpose}": memory[purpose] for purpose in moved}
    return memory | on_cpu | dict.fromkeys(moved, 0)


def _beside_nvme(
    config: StageConfig,
    shapes: Mapping[str, Sequence[int]],
    trained: int,
    num_ranks: int,
    width: int,
) -> dict[str, int]:
    """CPU memory that NVMe offload needs on a rank that trains `trained` elements."""
    zero, memory = config.deepspeed["zero_optimization"], {}
    size, count = swap_buffers(shapes, num_ranks)
    sub_group = min(trained, int(zero.get("sub_group_size", NVME_SUB_GROUP_ELEMENTS)) + size)
    for key, offload in config.nvme_offloads.items():
        if key == "offload_optimizer":
            num_buffers = offload.get("buffer_count", fewest_buffers(offload))
            memory["cpu_optimizer"] = num_buffers * sub_group * 4
        else:
            kept = min(trained, int(offload.get("max_in_cpu", DEFAULT_MAX_IN_CPU)))
            buffers = offload.get("buffer_count", count) * offload.get("buffer_size", size)
            memory["cpu_weights"] = (buffers + kept + (sub_group if kept < trained else 0)) * width
    return memory


def swap_buffers(shapes: Mapping[str, Sequence[int]], num_ranks: int) -> tuple[int, int]:
    """(elements, number) of the buffers that weights on NVMe need.

    Each holds one rank's share of the largest weight. In memory together are the matrices of one
    layer (when a frozen layer is recomputed for the gradient) and the four row blocks.
    """
    matrices = [re.search(r"\.\d+\.", name) for name, shape in shapes.items() if len(shape) > 1]
    of_layers = Counter(match[0] for match in matrices if match)
    largest = max(math.prod(shape) for shape in shapes.values())
    return -(-largest // num_ranks), max(of_layers.values(), default=0) + 4


def device_bytes(memory: dict[str, int]) -> int:
    """The part of a prediction that is on the device."""
    return sum(memory.values()) - cpu_bytes(memory)


def cpu_bytes(memory: dict[str, int]) -> int:
    """The part of a prediction that is offloaded."""
    return sum(amount for purpose, amount in memory.items() if purpose.startswith("cpu_"))
