"""Low-rank adapters (Hu et al. 2021, arXiv 2106.09685) beside frozen linear layers.

    y = W x + alpha / rank * B (A x)        W [out, in] frozen    A [rank, in]    B [out, rank]

A and B have PEFT's names: for `….q_proj.weight` they are `….q_proj.lora_A.weight` and
`….q_proj.lora_B.weight`. A is initialised as in PEFT, uniform within 1 / sqrt(in), from the seed
and its name alone. B is initialised with zeros, so a stage starts with its start model's logits.
There is no dropout, because no checkpoint holds its random numbers.

With `"base": "nf4"`, W is kept in 4 bits (Dettmers et al. 2023, arXiv 2305.14314; bitsandbytes):
blocks of 64 weights share a float32 scale. Quantisation runs on the CPU from the stored weights, so
the result is the same everywhere. Weights are dequantised when they are used.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from beingvl.errors import InputError
from beingvl.model.param_groups import A, B, plan_parameters, whole_shape
from beingvl.stage.stage_config import Lora, Rule


class AdaptedLinear(nn.Linear):
    """A linear layer with adapters: `attach_adapters` changes the class of an existing layer.

    `forward`: `[..., in]` -> `[..., out]`.
    """

    lora_A: nn.Linear  # noqa: N815  PEFT's names
    lora_B: nn.Linear  # noqa: N815
    lora_scale: float
    blocks: Any = None  # for a weight in 4 bits: its scales and shape

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self._base(input) + self.lora_B(self.lora_A(input)) * self.lora_scale

    def _base(self, input: torch.Tensor) -> torch.Tensor:
        if self.blocks is None:
            return super().forward(input)
        product = _bitsandbytes().matmul_4bit
        return product(input, self.weight.t(), self.blocks, bias=self.bias)

    def keep_in_nf4(self, stored: torch.Tensor, dtype: torch.dtype, device: torch.device) -> None:
        """Quantise the weight `[out, in]` to 4 bits; `forward` dequantises it to `dtype`."""
        packed, self.blocks = _nf4(stored)
        self.blocks.to(device)
        self.blocks.dtype = dtype
        self.weight.requires_grad_(False).data = packed.to(device)


def _bitsandbytes() -> Any:
    try:
        import bitsandbytes  # an optional dependency
    except ImportError as error:
        raise InputError(
            "a rule of beingvl.trainable has the base nf4, which needs bitsandbytes: "
            "pip install '.[quantized]'"
        ) from error
    return bitsandbytes


def _nf4(weight: torch.Tensor) -> tuple[torch.Tensor, Any]:
    functional = _bitsandbytes().functional
    return functional.quantize_4bit(weight.float(), blocksize=64, quant_type="nf4")


def nf4_values(weight: torch.Tensor) -> torch.Tensor:
    """A weight after quantisation to 4 bits and back, float32."""
    return _bitsandbytes().functional.dequantize_4bit(*_nf4(weight))


def attach_adapters(causal_lm: nn.Module, rules: Sequence[Rule]) -> None:
    """Add adapters, without values yet, to the linear layers that a rule with `lora` applies to.

    Inside `deepspeed.zero.Init` each is partitioned as soon as it is made. Raises InputError if
    such a rule names anything but linear layers.
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
    """The initial value of the adapter parameter `name`, float32."""
    if name.endswith(B):
        return torch.zeros(*shape)
    random = np.random.Generator(np.random.PCG64([seed, *name.encode()]))
    bound = shape[1] ** -0.5
    return torch.from_numpy(random.uniform(-bound, bound, tuple(shape)).astype(np.float32))


def merge(
    weight: torch.Tensor, lora_a: torch.Tensor, lora_b: torch.Tensor, lora: Lora
) -> torch.Tensor:
    """W + scale * B A, computed in float32 and rounded once to the dtype of `weight`. If training
    used W in 4 bits, so does this.
    """
    base = nf4_values(weight) if lora.base else weight.float()
    return torch.addmm(base, lora_b, lora_a, alpha=lora.scale).to(weight.dtype)
