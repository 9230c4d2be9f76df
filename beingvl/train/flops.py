"""Floating-point operations that the model needs for a step, for the model FLOP utilisation (MFU).

    MFU = step_flops / (seconds * devices * peak of a device)

For a weight matrix of n elements and T tokens: forward 2 n T; gradient of its input 2 n T, if
anything below it is trained; its own gradient 2 n T, if it is trained. So a frozen layer above
trained vocabulary rows counts 4 n T, and a frozen layer below everything trained counts 2 n T.
Attention over documents of l tokens: 2 * width * sum(l^2) per layer forward (two products, half of
them masked), twice that backward. The head sees target tokens only. Embedding look-ups cost
nothing. Recomputation that saves memory (activation checkpointing, loss chunks) is not counted.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch

from beingvl.model.param_groups import PlannedParameter

_LAYER_NUMBER = re.compile(r"\.(?:layers|h)\.(\d+)\.")

ASSUMED_MFU = 0.4  # default of `beingvl plan --mfu`

# Dense bf16 peaks in FLOP/s, from the vendors' data sheets; the first key that occurs in the
# device's name counts.
GPU_PEAKS = {
    "B200": 2.25e15,
    "H200": 989e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "A10": 125e12,
}


def step_flops(
    plan: Sequence[PlannedParameter],
    attention_width: int,
    num_tokens: int,
    num_pairs: int,
    num_target_tokens: int,
) -> float:
    """FLOPs of forward and backward over `num_tokens`. `num_pairs`: sum of the documents' squared
    lengths. `attention_width`: heads x head size.
    """
    embedding: list[PlannedParameter] = []
    head: list[PlannedParameter] = []
    layers: dict[int, list[PlannedParameter]] = {}
    for planned in plan:
        number = _LAYER_NUMBER.search(planned.name)
        if number:
            layers.setdefault(int(number[1]), []).append(planned)
        elif len(planned.shape) > 1:
            is_embedding = "embed" in planned.name or ".wte." in planned.name
            (embedding if is_embedding else head).append(planned)
    something_trained_below = any(planned.is_trained for planned in embedding)
    flops = 0.0
    for _, members in sorted(layers.items()):
        something_trained_below |= any(planned.is_trained for planned in members)
        matrices = [planned for planned in members if len(planned.shape) > 1]
        flops += _matrix_flops(matrices, num_tokens, something_trained_below)
        flops += 2 * attention_width * num_pairs * (3 if something_trained_below else 1)
    something_trained_below |= any(
        planned.is_trained and len(planned.shape) == 1 for planned in plan
    )
    return flops + _matrix_flops(head, num_target_tokens, something_trained_below)


def _matrix_flops(
    matrices: Sequence[PlannedParameter], num_tokens: int, input_gradient: bool
) -> float:
    products = sum(
        planned.num_elements * (1 + input_gradient + planned.is_trained) for planned in matrices
    )
    return 2.0 * products * num_tokens


def peak_flops(device: torch.device) -> float | None:
    """A known GPU's FLOP/s from its data sheet, else None."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in GPU_PEAKS.items() if part in name), None)
