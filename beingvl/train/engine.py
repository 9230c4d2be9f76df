"""The DeepSpeed boundary: the only place that knows ZeRO-3.

    1. start_distributed      process group from the launcher's environment
    2. build_engine           zero.Init -> empty partitioned model; plan; shard-wise weights; deepspeed.initialize
    3. forward / backward / step
    4. local_state            this rank's slices of what training changes, for checkpoints
       load_local_state       the way back, before the first step

No rank ever holds the whole model: every parameter is partitioned when it is made, and each rank copies its own flat slice
from the memory-mapped weights into its partition. A parameter of n elements on R ranks lies in R slices of ceil(n / R)
elements, the last ones padded.
"""

from __future__ import annotations

import hashlib
import logging
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import deepspeed
import numpy as np
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import (
    safe_get_local_fp32_param,
    safe_get_local_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from numpy.typing import ArrayLike
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

from beingvl.data.loader import IGNORED, MicroBatch
from beingvl.errors import InputError
from beingvl.model.extended_vocab import PackedCausalLM, build_packed_model, stored_slice
from beingvl.model.param_groups import PlannedParameter, Rule, plan_parameters
from beingvl.model.weight_files import WeightFolder
from beingvl.train.stage_config import StageConfig
from beingvl.vocab import VocabLayout

STATE_KEYS = ("master", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Ranks:
    """This process among the others."""

    rank: int
    num_ranks: int
    device: torch.device


@dataclass(frozen=True)
class StepResult:
    """What an optimizer step did. `applied` is False when DeepSpeed skipped it for a non-finite gradient."""

    applied: bool
    gradient_norm: float


def start_distributed(stall_timeout_seconds: int) -> Ranks:
    """Join the launcher's process group; a process started without a launcher is a world of one."""
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    for name, value in {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29500",
    }.items():
        os.environ.setdefault(name, value)
    # On CPU ranks DeepSpeed compiles a shared-memory op that only its inference calls: no compiler, no minute, no lock files.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    warnings.filterwarnings("ignore", r"`torch.distributed.\w+` is deprecated", FutureWarning)  # DeepSpeed's calls, not ours
    local_rank = int(os.environ["LOCAL_RANK"])
    accelerator = get_accelerator()
    accelerator.set_device(local_rank)
    deepspeed.init_distributed(verbose=False, timeout=timedelta(seconds=stall_timeout_seconds))
    device = torch.device(accelerator.device_name(local_rank) if accelerator.device_name() != "cpu" else "cpu")
    return Ranks(deepspeed.comm.get_rank(), deepspeed.comm.get_world_size(), device)


def stop_distributed() -> None:
    """Leave together."""
    deepspeed.comm.barrier()
    deepspeed.comm.destroy_process_group()


def sum_over_ranks(values: ArrayLike, device: torch.device) -> np.ndarray:
    """Element-wise sum over all ranks, in float64 (exact for counts up to 2**53)."""
    tensor = torch.as_tensor(np.asarray(values, np.float64)).to(device)
    deepspeed.comm.all_reduce(tensor)
    return tensor.cpu().numpy()


def gather_objects(value: Any, num_ranks: int) -> list[Any]:
    """`value` of every rank, in rank order, on every rank."""
    gathered: list[Any] = [None] * num_ranks
    torch.distributed.all_gather_object(gathered, value)
    return gathered


def build_engine(model_folder: Path, layout: VocabLayout, config: StageConfig, ranks: Ranks) -> TrainingEngine:
    """Build the stage's model partitioned, load the start model's weights, freeze by plan, hand over to DeepSpeed."""
    if config.zero_stage != 3:
        raise InputError(f"{config.source}: zero_optimization.stage is {config.zero_stage}, beingvl trains with stage 3")
    accumulation_steps = config.accumulation_steps(ranks.num_ranks)
    deepspeed_config = {**config.deepspeed, "gradient_accumulation_steps": accumulation_steps}
    block = config.beingvl

    model_config = AutoConfig.from_pretrained(model_folder)
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(model_config)]
    with deepspeed.zero.Init(config_dict_or_path=deepspeed_config):  # with dtype= given, it takes 16 bits whatever is given
        model = build_packed_model(
            model_class,
            model_config,
            layout.num_text,
            model_config.vocab_size - layout.num_text,  # more than layout.num_visual when the converter padded the rows
            block.loss_chunk_tokens,
            block.activation_checkpointing,
        )
    parameters = dict(model.causal_lm.named_parameters())
    plan = plan_parameters({name: tuple(parameter.ds_shape) for name, parameter in parameters.items()}, block.trainable)
    _load_partitions(parameters, WeightFolder(model_folder), layout, ranks.rank)
    for planned in plan:
        parameters[planned.name].requires_grad_(planned.rule.train)
    groups = _optimizer_groups(plan, parameters, config)
    engine, *_ = deepspeed.initialize(model=model, model_parameters=groups, config=deepspeed_config)
    _restore_rotary_buffers(model, model_config, ranks.device)
    return TrainingEngine(engine, model, parameters, plan, config, ranks, accumulation_steps)


def _load_partitions(parameters: Mapping[str, Any], weights: WeightFolder, layout: VocabLayout, rank: int) -> None:
    """Copy this rank's flat slice of every parameter from the memory map. Raises InputError for what does not fit."""
    for name, parameter in parameters.items():
        stored_name, rows = stored_slice(name, layout.num_text)
        if stored_name not in weights:
            raise InputError(f"{weights.folder} has no tensor {stored_name!r}; it is not a whole Being-VL model folder")
        stored = weights[stored_name][rows]
        if tuple(stored.shape) != tuple(parameter.ds_shape):
            found = f"{weights.folder}: {stored_name!r} gives {tuple(stored.shape)} for {name!r}"
            raise InputError(f"{found}, expected {tuple(parameter.ds_shape)}; config.json and weights disagree")
        partition = parameter.ds_tensor
        start = rank * partition.numel()
        mine = stored.reshape(-1)[start : start + partition.numel()]
        partition.data.zero_()
        partition.data[: mine.numel()].copy_(mine)


def _restore_rotary_buffers(model: torch.nn.Module, model_config: Any, device: torch.device) -> None:
    """Rotary frequencies in float32 again: in a bf16 run DeepSpeed casts buffers too, and positions would be wrong by 0.1 %."""
    for module in model.modules():
        if "inv_freq" in dict(module.named_buffers(recurse=False)):
            for name, buffer in type(module)(model_config).named_buffers():
                setattr(module, name, buffer.to(device))


def _optimizer_groups(plan: list[PlannedParameter], parameters: Mapping[str, Any], config: StageConfig) -> list[dict[str, Any]]:
    """One optimizer group per (learning-rate multiplier, weight decay); only trained parameters are in it."""
    members: dict[tuple[float, float], list[Any]] = {}
    for planned in plan:
        if planned.rule.train:
            members.setdefault(_group_key(planned.rule, config), []).append(parameters[planned.name])
    return [
        {"params": params, "lr": config.learning_rate * multiplier, "weight_decay": decay}
        for (multiplier, decay), params in members.items()
    ]


def _group_key(rule: Rule, config: StageConfig) -> tuple[float, float]:
    return rule.lr_multiplier, config.weight_decay if rule.weight_decay is None else rule.weight_decay


class TrainingEngine:
    """One stage's model and optimizer under DeepSpeed."""

    def __init__(
        self,
        engine: Any,
        model: PackedCausalLM,
        parameters: dict[str, Any],
        plan: list[PlannedParameter],
        config: StageConfig,
        ranks: Ranks,
        accumulation_steps: int,
    ) -> None:
        self._engine = engine
        self._model = model
        self._parameters = parameters
        self._config = config
        self.plan = plan
        self.ranks = ranks
        self.accumulation_steps = accumulation_steps
        trained_rules = dict.fromkeys(_group_key(planned.rule, config) for planned in plan if planned.rule.train)
        self._lr_multipliers = [multiplier for multiplier, _ in trained_rules]
        self._frozen_hash = self.hash_frozen()

    # ---- one step ----
    def forward(self, batch: MicroBatch) -> torch.Tensor:
        """Losses `[num_targets]` float32 of a micro-batch, in the order of its target positions."""
        positions = np.flatnonzero(batch.target_ids != IGNORED)
        return self._engine(
            input_ids=self._tensor(batch.input_ids)[None],
            position_ids=self._tensor(batch.position_ids)[None],
            cu_seqlens=self._tensor(batch.cu_seqlens),
            target_positions=self._tensor(positions),
            target_ids=self._tensor(batch.target_ids[positions]),
        )

    @torch.no_grad()
    def logits(self, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Logits `[p, vocabulary]` float32 of one sample `[n]` at some positions, on every rank; all ranks call together."""
        device = self.ranks.device
        self._engine.eval()
        logits = self._engine(
            input_ids=input_ids.to(device)[None],
            position_ids=torch.arange(len(input_ids), device=device)[None],
            cu_seqlens=torch.tensor([0, len(input_ids)], dtype=torch.int32, device=device),
            target_positions=positions.to(device),
        )
        self._engine.train()
        return logits.float()

    def _tensor(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(self.ranks.device, non_blocking=True)

    def backward(self, scaled_loss: torch.Tensor) -> None:
        self._engine.backward(scaled_loss)

    def step(self, learning_rate: float | None) -> StepResult | None:
        """End a micro step; the last one of a window (with a learning rate) updates the weights."""
        if learning_rate is not None:
            for group, multiplier in zip(self._engine.optimizer.param_groups, self._lr_multipliers, strict=True):
                group["lr"] = learning_rate * multiplier
        self._engine.step()
        if learning_rate is None:
            return None
        norm = self._engine.get_global_grad_norm()
        return StepResult(bool(self._engine.was_step_applied()), float(norm if norm is not None else 0.0))

    # ---- what checkpoints need ----
    @property
    def dtype(self) -> torch.dtype:
        """What forward passes compute in."""
        return torch.bfloat16 if self._config.is_bf16 else torch.float32

    @property
    def trained_shapes(self) -> dict[str, tuple[int, ...]]:
        return {planned.name: planned.shape for planned in self.plan if planned.rule.train}

    def partition_numel(self, name: str) -> int:
        """Elements in every rank's slice of a parameter."""
        return self._parameters[name].ds_tensor.numel()

    def local_state(self) -> dict[str, torch.Tensor]:
        """`NAME.master`, `NAME.exp_avg`, `NAME.exp_avg_sq`: this rank's flat float32 slices of every trained parameter."""
        state = {}
        for name in self.trained_shapes:
            parameter = self._parameters[name]
            state[f"{name}.master"] = safe_get_local_fp32_param(parameter).detach().cpu()
            for key in STATE_KEYS[1:]:
                state[f"{name}.{key}"] = safe_get_local_optimizer_state(parameter, key).detach().cpu()
        return state

    def load_local_state(self, state: Mapping[str, torch.Tensor], num_applied_steps: int) -> None:
        """Put back what `local_state` gave, before the first step, with the optimizer's count of applied updates."""
        self._create_optimizer_state(num_applied_steps)
        for name in self.trained_shapes:
            parameter = self._parameters[name]
            master = state[f"{name}.master"].to(self.ranks.device)
            safe_set_local_fp32_param(parameter, master)
            parameter.ds_tensor.data.copy_(master)
            for key in STATE_KEYS[1:]:
                safe_set_local_optimizer_state(parameter, state[f"{name}.{key}"].to(self.ranks.device), key)

    def _create_optimizer_state(self, num_applied_steps: int) -> None:
        """Adam makes its state in the first update; a resumed run needs it before."""
        zero = self._engine.optimizer
        for flat in zero.fp32_partitioned_groups_flat:
            zero.optimizer.state[flat] = {
                "step": torch.tensor(float(num_applied_steps)),
                "exp_avg": torch.zeros_like(flat),
                "exp_avg_sq": torch.zeros_like(flat),
            }

    def hash_frozen(self) -> str:
        """Hash of this rank's slices of every frozen parameter."""
        digest = hashlib.sha256()
        for planned in self.plan:
            if not planned.rule.train:
                data = self._parameters[planned.name].ds_tensor.detach().cpu().contiguous()
                digest.update(data.view(torch.uint8).numpy())
        return digest.hexdigest()

    def check_frozen(self) -> None:
        """Raises RuntimeError when a frozen parameter is no longer what it was at the start."""
        if self.hash_frozen() != self._frozen_hash:
            raise RuntimeError("a frozen parameter changed during training; the checkpoint is not written")
