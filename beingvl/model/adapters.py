"""Low-rank adapters (Hu et al. 2021, arXiv 2106.09685) beside frozen linear layers.

    y = W x + alpha / rank * B (A x)        W [out, in] frozen    A [rank, in]    B [out, rank]

A and B are parameters named as PEFT's: of `….q_proj.weight` they are `….q_proj.lora_A.weight` and
`….q_proj.lora_B.weight`. A starts as PEFT starts it, uniform within 1 / sqrt(in), from the seed and
its name alone; B starts at zero, so a stage starts with its start model's logits. Without dropout:
its random numbers are in no checkpoint.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from beingvl.errors import InputError
from beingvl.model.param_groups import A, B, plan_parameters, whole_shape
from beingvl.stage.stage_config import Rule


class AdaptedLinear(nn.Linear):
    """A linear layer that got adapters: `attach_adapters` changes the class of one that is there.

    `forward`: `[..., in]` -> `[..., out]`.
    """

    lora_A: nn.Linear  # noqa: N815  PEFT's names
    lora_B: nn.Linear  # noqa: N815
    lora_scale: float

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input) + self.lora_B(self.lora_A(input)) * self.lora_scale


def attach_adapters(causal_lm: nn.Module, rules: Sequence[Rule]) -> None:
    """Give the linear layers that a rule with `lora` decides their adapters, without values yet.

    Inside `deepspeed.zero.Init` each is partitioned as soon as it is made. Raises InputError for a
    rule that names anything but linear layers.
    """
    if not any(rule.lora for rule in rules):
        return
    modules = dict(causal_lm.named_modules())
    shapes = {name: whole_shape(parameter) for name, parameter in causal_lm.named_parameters()}
    for planned in plan_parameters(shapes, rules):
        if not planned.name.endswith(A):
            continue
        stem, lora = planned.name.removesuffix(A), planned.rule.lora
        linear = modules[stem]
        if type(linear) is not nn.Linear:
            raise InputError(
                f"the rule {planned.rule.match!r} of beingvl.trainable puts adapters on {stem!r}, "
                f"a {type(linear).__name__}; only layers of the class Linear can have them"
            )
        assert lora
        rank, has = lora.rank, {"bias": False, "dtype": linear.weight.dtype}
        linear.lora_A = nn.Linear(linear.in_features, rank, **has)
        linear.lora_B = nn.Linear(rank, linear.out_features, **has)
        linear.__class__, linear.lora_scale = AdaptedLinear, lora.scale


def initial_adapter(name: str, shape: Sequence[int], seed: int) -> torch.Tensor:
    """What the adapter parameter `name` starts with, float32."""
    if name.endswith(B):
        return torch.zeros(*shape)
    random = np.random.Generator(np.random.PCG64([seed, *name.encode()]))
    bound = shape[1] ** -0.5
    return torch.from_numpy(random.uniform(-bound, bound, tuple(shape)).astype(np.float32))


def merge(
    weight: torch.Tensor, lora_a: torch.Tensor, lora_b: torch.Tensor, scale: float
) -> torch.Tensor:
    """W + scale * B A, computed in float32 and rounded once to the dtype of `weight`."""
    return torch.addmm(weight.float(), lora_b, lora_a, alpha=scale).to(weight.dtype)
