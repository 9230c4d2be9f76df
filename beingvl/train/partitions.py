"""Where a parameter's weights and Adam moments lie on this rank, for every ZeRO stage, behind four verbs.

    stage 3     weights, masters and moments are cut: rank r holds elements r*E … (r+1)*E - 1 of each flattened parameter
    stage 1, 2  weights are whole on every rank; masters and moments are a piece of one flat buffer per optimizer group
    stage 0     everything is whole on every rank; each rank saves the r-th part

    span(name)                  the flat range [start, stop) that this rank saves
    read(name, key)             those float32 elements where they lie, key one of master, exp_avg, exp_avg_sq
    write(name, fetch, keys)    put a parameter back: `fetch(key, start, stop)` gives any flat float32 range of it
    held_weights(name)          the weights as the forward pass uses them, as far as this rank holds them

Nothing outside asks for the stage, so a checkpoint of one stage is read by any other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch

MASTER = "master"
MOMENTS = ("exp_avg", "exp_avg_sq")
STATE_KEYS = (MASTER, *MOMENTS)
Fetch = Callable[[str, int, int], torch.Tensor]


class Partitions(Protocol):
    """See the module's docstring. `create_moments` makes Adam's state before its first update; name -> updates already made."""

    def span(self, name: str) -> tuple[int, int]: ...
    def read(self, name: str, key: str) -> torch.Tensor: ...
    def write(self, name: str, fetch: Fetch, keys: Sequence[str] = STATE_KEYS) -> None: ...
    def held_weights(self, name: str) -> torch.Tensor: ...
    def create_moments(self, adam_steps: Mapping[str, int]) -> None: ...


def partitions_of(zero_stage: int, engine: Any, parameters: Mapping[str, Any], rank: int, num_ranks: int) -> Partitions:
    """The partitions of a DeepSpeed engine's parameters (name -> parameter)."""
    if zero_stage == 3:
        return CutPartitions(engine.optimizer, parameters, rank)
    if zero_stage in (1, 2):
        return FlatPartitions(engine.optimizer, parameters)
    return WholePartitions(engine.optimizer, parameters, rank, num_ranks)


def share_of(num_elements: int, rank: int, num_ranks: int) -> tuple[int, int]:
    """The r-th of R equal parts: 7 elements, 2 ranks -> (0, 4) and (4, 7)."""
    part = -(-num_elements // num_ranks)
    return min(rank * part, num_elements), min((rank + 1) * part, num_elements)


class CutPartitions:
    """ZeRO-3. `zero` is DeepSpeedZeroOptimizer_Stage3."""

    def __init__(self, zero: Any, parameters: Mapping[str, Any], rank: int) -> None:
        self._zero, self._parameters, self._rank = zero, parameters, rank

    def span(self, name: str) -> tuple[int, int]:
        parameter = self._parameters[name]
        part, size = parameter.ds_tensor.numel(), parameter.ds_numel
        return min(self._rank * part, size), min((self._rank + 1) * part, size)

    def read(self, name: str, key: str) -> torch.Tensor:
        start, stop = self.span(name)
        state = self._zero.get_local_fp32_param(self._parameters[name], None if key == MASTER else key)
        return state[: stop - start].detach()

    def write(self, name: str, fetch: Fetch, keys: Sequence[str] = STATE_KEYS) -> None:
        parameter = self._parameters[name]
        for key in keys:
            start, stop = self.span(name)
            padded = torch.zeros(parameter.ds_tensor.numel())
            padded[: stop - start] = fetch(key, start, stop)
            self._zero.set_local_hp_param(padded, parameter, None if key == MASTER else key)
            if key == MASTER:
                parameter.ds_tensor.data.copy_(padded)

    def held_weights(self, name: str) -> torch.Tensor:
        return self._parameters[name].ds_tensor.detach()

    def create_moments(self, adam_steps: Mapping[str, int]) -> None:
        names = {id(parameter): name for name, parameter in self._parameters.items()}
        for flat, group in zip(self._zero.fp32_partitioned_groups_flat, self._zero.fp16_groups, strict=True):
            self._zero.optimizer.state[flat] = _new_moments(flat, adam_steps[names[id(group[0])]], self._zero.optimizer)


class FlatPartitions:
    """ZeRO-1 and 2. `zero` is DeepSpeedZeroOptimizer, which links each parameter to its piece of the flat buffers.

    It links moments once, after the first group's first update, when the other groups have none: so they are made beforehand.
    """

    def __init__(self, zero: Any, parameters: Mapping[str, Any]) -> None:
        self._zero, self._parameters = zero, parameters
        self.create_moments(dict.fromkeys(parameters, 0))

    def span(self, name: str) -> tuple[int, int]:
        link = self._parameters[name]._hp_mapping
        if link is None:  # no element of it lies in this rank's part of the buffer
            return 0, 0
        address = link.lp_fragment_address
        return address.start, address.start + address.numel

    def read(self, name: str, key: str) -> torch.Tensor:
        link = self._parameters[name]._hp_mapping
        if link is None:
            return torch.empty(0)
        return link.get_hp_fragment(None if key == MASTER else key).detach().float()

    def write(self, name: str, fetch: Fetch, keys: Sequence[str] = STATE_KEYS) -> None:
        parameter = self._parameters[name]
        if MASTER in keys:
            parameter.data.view(-1).copy_(fetch(MASTER, 0, parameter.numel()))
        if parameter._hp_mapping is not None:
            for key in keys:
                values = fetch(key, *self.span(name))
                parameter._hp_mapping.get_hp_fragment(None if key == MASTER else key).data.copy_(values)

    def held_weights(self, name: str) -> torch.Tensor:
        return self._parameters[name].detach()

    def create_moments(self, adam_steps: Mapping[str, int]) -> None:
        names = {id(parameter): name for name, parameter in self._parameters.items()}
        for flat, group in zip(self._zero.single_partition_of_fp32_groups, self._zero.bit16_groups, strict=True):
            self._zero.optimizer.state[flat] = _new_moments(flat, adam_steps[names[id(group[0])]], self._zero.optimizer)
        self._zero._hp_optimizer_states_linked = False  # or it would keep what it linked before
        self._zero._lazy_init_hp_params_optimizer_state()


class WholePartitions:
    """Stage 0. `optimizer` is torch's in float32, and DeepSpeed's wrapper with float32 masters around it in bf16."""

    def __init__(self, optimizer: Any, parameters: Mapping[str, Any], rank: int, num_ranks: int) -> None:
        self._parameters, self._rank, self._num_ranks = parameters, rank, num_ranks
        self._adam = getattr(optimizer, "optimizer", optimizer)
        names = {id(parameter): name for name, parameter in parameters.items()}
        low = getattr(optimizer, "fp16_groups", None) or [group["params"] for group in optimizer.param_groups]
        high = getattr(optimizer, "fp32_groups", low)
        self._masters = {names[id(p)]: m for ps, ms in zip(low, high, strict=True) for p, m in zip(ps, ms, strict=True)}
        if high is not low:  # the wrapper has made one update with zero gradients, which decays weights and counts as a step
            for name, master in self._masters.items():
                self._adam.state.pop(master, None)
                master.data.copy_(parameters[name].data)

    def span(self, name: str) -> tuple[int, int]:
        return share_of(self._parameters[name].numel(), self._rank, self._num_ranks)

    def read(self, name: str, key: str) -> torch.Tensor:
        start, stop = self.span(name)
        master = self._masters[name]
        whole = master if key == MASTER else self._adam.state[master][key]
        return whole.detach().view(-1)[start:stop]

    def write(self, name: str, fetch: Fetch, keys: Sequence[str] = STATE_KEYS) -> None:
        master = self._masters[name]
        for key in keys:
            whole = master.data if key == MASTER else self._adam.state[master][key]
            whole.view(-1).copy_(fetch(key, 0, master.numel()))
        self._parameters[name].data.copy_(master.data)

    def held_weights(self, name: str) -> torch.Tensor:
        return self._parameters[name].detach()

    def create_moments(self, adam_steps: Mapping[str, int]) -> None:
        for name, master in self._masters.items():
            self._adam.state[master] = _new_moments(master, adam_steps[name], self._adam)


def _new_moments(master: torch.Tensor, num_steps: int, adam: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    on_device = any(group.get("fused") or group.get("capturable") for group in adam.param_groups)
    step = torch.tensor(float(num_steps), device=master.device if on_device else "cpu")
    return {"step": step, **{key: torch.zeros_like(master) for key in MOMENTS}}
