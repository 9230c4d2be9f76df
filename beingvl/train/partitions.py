"""Where this rank keeps a parameter's weights and Adam moments, for every ZeRO stage, behind one
interface.

    stage 3     weights, masters and moments are cut: rank r holds elements r*E … (r+1)*E - 1 of
                each flattened parameter; what is offloaded to NVMe is in memory only while it is
                accessed
    stage 1, 2  weights are whole on every rank; masters and moments are a piece of one flat buffer
                per optimizer group

    span(name)                  the flat range [start, stop) that this rank saves
    read(names, keys)           those float32 elements, one (name, key, tensor) at a time, in the
                                cheapest order
    write(names, fetch, keys)   restore parameters: `fetch(name, key, start, stop)` returns any flat
                                float32 range of one
    held_weights(name)          this rank's part of the weights, as the forward pass uses them
    create_moments(adam_steps)  Adam's state before its first update; name -> earlier updates

A key is one of master, exp_avg, exp_avg_sq. `read` yields views, except on NVMe: there the next one
overwrites the last.

No caller depends on the ZeRO stage, so a checkpoint of one stage can be read by any other.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

MASTER = "master"
MOMENTS = ("exp_avg", "exp_avg_sq")
STATE_KEYS = (MASTER, *MOMENTS)
Fetch = Callable[[str, str, int, int], torch.Tensor]
Read = Iterator[tuple[str, str, torch.Tensor]]


@contextmanager
def partition_in_memory(parameter: Any, changes: bool = False) -> Iterator[torch.Tensor]:
    """A rank's flat part of a parameter, in memory meanwhile; `changes` are written back."""
    partition, swapper = parameter.ds_tensor, parameter.nvme_swapper
    if partition.status.name == "INFLIGHT":  # being prefetched
        swapper.synchronize_reads()
    is_away = partition.status.name == "NOT_AVAILABLE"
    assert is_away or not (changes and partition.final_location == "nvme"), (
        "the change would not reach its file"
    )
    if is_away:
        swapper.swap_in([parameter], async_op=False)
    try:
        yield partition.data
    finally:
        if is_away and changes:
            swapper.swap_out_and_release([parameter])
        elif is_away:
            swapper.remove_partition_and_release_buffers([parameter])


class CutPartitions:
    """DeepSpeedZeroOptimizer_Stage3 keeps masters and moments in flat sub-groups of parameters."""

    def __init__(self, zero: Any, parameters: Mapping[str, Any], rank: int) -> None:
        self._zero, self._parameters, self._rank = zero, parameters, rank
        self._swapping = threading.Lock()

    def span(self, name: str) -> tuple[int, int]:
        parameter = self._parameters[name]
        part, size = parameter.ds_tensor.ds_numel, parameter.ds_numel
        return min(self._rank * part, size), min((self._rank + 1) * part, size)

    def read(self, names: Sequence[str], keys: Sequence[str] = STATE_KEYS) -> Read:
        for group, members in self._by_group(names).items():
            with self._state_in_memory(group) as state:
                for name in members:
                    start, stop = self.span(name)
                    for key in keys:
                        yield name, key, self._piece(state[key], name)[: stop - start]

    def write(self, names: Sequence[str], fetch: Fetch, keys: Sequence[str] = STATE_KEYS) -> None:
        for group, members in self._by_group(names).items():
            with self._state_in_memory(group, changes=True) as state:
                for name in members:
                    start, stop = self.span(name)
                    for key in keys:
                        padded = torch.zeros(self._parameters[name].ds_tensor.ds_numel)
                        padded[: stop - start] = fetch(name, key, start, stop)
                        self._piece(state[key], name).copy_(padded)
                        if key == MASTER:
                            with partition_in_memory(
                                self._parameters[name], changes=True
                            ) as weights:
                                weights.copy_(padded)

    def held_weights(self, name: str) -> torch.Tensor:
        parameter = self._parameters[name]
        if parameter.ds_tensor.final_location != "nvme":
            return parameter.ds_tensor.detach()
        # callers use threads; DeepSpeed's buffers have no locks
        with self._swapping, partition_in_memory(parameter) as weights:
            return weights.clone()

    def create_moments(self, adam_steps: Mapping[str, int]) -> None:
        names = {id(parameter): name for name, parameter in self._parameters.items()}
        adam = self._zero.optimizer
        for group, members in enumerate(self._zero.fp16_groups):
            with self._state_in_memory(group, changes=True) as state:
                adam.state[state[MASTER]] = _new_moments(
                    state[MASTER], adam_steps[names[id(members[0])]], adam
                )

    def _by_group(self, names: Sequence[str]) -> dict[int, list[str]]:
        """Sub-group -> the `names` in it."""
        groups: dict[int, list[str]] = {}
        for name in names:
            groups.setdefault(self._position(name)[0], []).append(name)
        return groups

    def _position(self, name: str) -> tuple[int, int, int]:
        """Sub-group, first element in it, number of elements including padding."""
        return self._zero.grad_position[self._zero.get_param_id(self._parameters[name])]

    def _piece(self, flat: torch.Tensor, name: str) -> torch.Tensor:
        _, start, length = self._position(name)
        return flat.detach()[start : start + length]

    @contextmanager
    def _state_in_memory(
        self, group: int, changes: bool = False
    ) -> Iterator[Mapping[str, torch.Tensor]]:
        """Key -> flat tensor of a sub-group, in memory meanwhile; `changes` are written back."""
        zero, is_away = self._zero, self._zero._swappable_optimizer_subgroup(group)
        if is_away:
            zero._optimizer_states_and_gradient_swap_in(group)
        flat = zero.fp32_partitioned_groups_flat[group]
        try:
            yield {MASTER: flat, **zero.optimizer.state.get(flat, {})}
        finally:
            if is_away and changes:
                # not the step's own write-back: it is asynchronous, and the next read overtakes it
                zero._writeback_swap_state(group, write_opt_state=True, write_gradients=False)
            elif is_away:
                zero._release_swap_buffers(group)


class FlatPartitions:
    """DeepSpeedZeroOptimizer links each parameter to its piece of the flat buffers. It links the
    moments once, after the first group's first update, when other groups have none yet. So we
    create all moments beforehand.
    """

    def __init__(self, zero: Any, parameters: Mapping[str, Any]) -> None:
        self._zero, self._parameters = zero, parameters
        self.create_moments(dict.fromkeys(parameters, 0))

    def span(self, name: str) -> tuple[int, int]:
        link = self._parameters[name]._hp_mapping
        if link is None:  # this rank's part of the buffer has none of its elements
            return 0, 0
        address = link.lp_fragment_address
        return address.start, address.start + address.numel

    def read(self, names: Sequence[str], keys: Sequence[str] = STATE_KEYS) -> Read:
        for name, key in itertools.product(names, keys):
            link = self._parameters[name]._hp_mapping
            piece = (
                torch.empty(0)
                if link is None
                else link.get_hp_fragment(None if key == MASTER else key)
            )
            yield name, key, piece.detach().float()

    def write(self, names: Sequence[str], fetch: Fetch, keys: Sequence[str] = STATE_KEYS) -> None:
        for name in names:
            parameter = self._parameters[name]
            if MASTER in keys:
                parameter.data.view(-1).copy_(fetch(name, MASTER, 0, parameter.numel()))
            if parameter._hp_mapping is not None:
                for key in keys:
                    values = fetch(name, key, *self.span(name))
                    parameter._hp_mapping.get_hp_fragment(
                        None if key == MASTER else key
                    ).data.copy_(values)

    def held_weights(self, name: str) -> torch.Tensor:
        return self._parameters[name].detach()

    def create_moments(self, adam_steps: Mapping[str, int]) -> None:
        names = {id(parameter): name for name, parameter in self._parameters.items()}
        for flat, group in zip(
            self._zero.single_partition_of_fp32_groups, self._zero.bit16_groups, strict=True
        ):
            self._zero.optimizer.state[flat] = _new_moments(
                flat, adam_steps[names[id(group[0])]], self._zero.optimizer
            )
        self._zero._hp_optimizer_states_linked = False  # or it would keep the old links
        self._zero._lazy_init_hp_params_optimizer_state()


Partitions = CutPartitions | FlatPartitions


def partitions_of(
    zero_stage: int, zero: Any, parameters: Mapping[str, Any], rank: int
) -> Partitions:
    """The partitions of `parameters` (by name); `zero` is that stage's DeepSpeed optimizer."""
    if zero_stage == 3:
        return CutPartitions(zero, parameters, rank)
    return FlatPartitions(zero, parameters)


def _new_moments(
    master: torch.Tensor, num_steps: int, adam: torch.optim.Optimizer
) -> dict[str, torch.Tensor]:
    on_device = any(group.get("fused") or group.get("capturable") for group in adam.param_groups)
    step = torch.tensor(float(num_steps), device=master.device if on_device else "cpu")
    return {"step": step, **{key: torch.zeros_like(master) for key in MOMENTS}}
