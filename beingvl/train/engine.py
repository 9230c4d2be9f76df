"""The DeepSpeed boundary: besides nvme.py the only place that calls DeepSpeed.

    1. start_distributed      process group from the launcher's environment
    2. build_engine           empty model; plan; shard-wise weights; deepspeed.initialize
    3. forward / backward / step
    4. local_state            this rank's slices of what training changes, for checkpoints
       load_state             restores them before the first step

Under ZeRO-3 no rank ever holds the whole model: every parameter is partitioned on creation, and
each rank copies its own flat slice from the memory-mapped weights into its partition. Stages 1 and
2 keep all weights on every rank; they are copied one by one. train/partitions.py knows where each
stage keeps its state.
"""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import deepspeed
import numpy as np
import torch
from blake3 import blake3
from deepspeed.accelerator import get_accelerator
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

from beingvl.artefact.processes import listener_on
from beingvl.artefact.progress import progress
from beingvl.data.loader import IGNORED, MicroBatch
from beingvl.errors import InputError
from beingvl.model.adapters import AdaptedLinear, initial_adapter
from beingvl.model.base_model import open_config
from beingvl.model.extended_vocab import PackedCausalLM, build_packed_model, stored_slice
from beingvl.model.packed_check import refuse_short_window, refuse_unlike_packed
from beingvl.model.param_groups import (
    A,
    PlannedParameter,
    is_adapter,
    plan_parameters,
    whole_shape,
)
from beingvl.model.weight_files import WeightFolder
from beingvl.stage.stage_config import StageConfig
from beingvl.train.failures import FreezerError
from beingvl.train.flops import step_flops
from beingvl.train.memory import predict_memory, reduce_bucket_elements
from beingvl.train.nvme import fetch_copies, swap_settings
from beingvl.train.partitions import MASTER, MOMENTS, STATE_KEYS, partition_in_memory, partitions_of
from beingvl.train.probe import Probe
from beingvl.train.ranks import Ranks, sum_over_ranks
from beingvl.vocab import VocabLayout

# Heartbeats detect a lost or stalled rank (train/phases.py), so a collective may wait as long as
# any other rank is working.
LONGEST_COLLECTIVE = timedelta(days=1)


@dataclass(frozen=True)
class StepResult:
    """`applied` is False if DeepSpeed skipped the step because a gradient was not finite."""

    applied: bool
    gradient_norm: float


def start_distributed(deterministic: bool = False) -> Ranks:
    """Join the launcher's process group; without a launcher, a group of one.

    Raises InputError when rank 0's port is taken, or cannot be reached.
    """
    if deterministic:
        # cuBLAS reads it on first use
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # a single rank takes any free port, so that two runs can share a machine
    port = "29500" if "WORLD_SIZE" in os.environ else "0"
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    # DeepSpeed imports all its optimizers, and one of them loads torch's compiler: a second and
    # 30 MB for nothing.
    for name, value in {**alone, "MASTER_PORT": port, "TORCHDYNAMO_DISABLE": "1"}.items():
        os.environ.setdefault(name, value)
    # On CPU ranks DeepSpeed would compile a shared-memory op that only its inference uses. Without
    # it we need no compiler, save a minute, and leave no lock files.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # for calls by DeepSpeed, not ours
    warnings.filterwarnings("ignore", r"`torch.distributed.\w+` is deprecated", FutureWarning)
    local_rank = int(os.environ["LOCAL_RANK"])
    accelerator = get_accelerator()
    accelerator.set_device(local_rank)
    try:
        deepspeed.init_distributed(verbose=False, timeout=LONGEST_COLLECTIVE)
    except torch.distributed.DistNetworkError as error:
        place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        reason = str(error).partition("\n")[0]
        if "EADDRINUSE" in str(error):
            user = listener_on(int(os.environ["MASTER_PORT"]))
            reason = (
                f"{user} listens there. An older run may still be there: wait for its end, or end "
                "it; only a second run on the same host needs another MASTER_PORT"
            )
        raise InputError(f"ranks cannot meet at {place}, rank 0's place: {reason}") from error
    is_cpu = accelerator.device_name() == "cpu"
    device = torch.device("cpu" if is_cpu else accelerator.device_name(local_rank))
    return Ranks(deepspeed.comm.get_rank(), deepspeed.comm.get_world_size(), device)


def stop_distributed() -> None:
    """Leave the process group, all ranks together."""
    deepspeed.comm.barrier()
    deepspeed.comm.destroy_process_group()


def build_engine(
    model_folder: Path,
    layout: VocabLayout,
    config: StageConfig,
    ranks: Ranks,
    adam_steps: Mapping[str, int] | None = None,
    weights: Mapping[str, torch.Tensor] | None = None,
    advance: Callable[[], object] = lambda: None,
) -> TrainingEngine:
    """Build the empty model, plan its parameters, load the start model's weights, start DeepSpeed.

    Args:
        model_folder: the start model.
        layout: of its vocabulary.
        adam_steps: trained name -> updates that its moments have seen, if any.
        weights: by their names on disk, instead of the folder's.
        advance: called, from any thread, for every finished parameter and batch.
    """
    accumulation = {"gradient_accumulation_steps": config.accumulation_steps(ranks.num_ranks)}
    weights = weights or WeightFolder(model_folder)
    zero = config.deepspeed["zero_optimization"]
    zero = {**zero, **swap_settings(config, weights, ranks.num_ranks)}
    deepspeed_config = {**config.deepspeed, **accumulation, "zero_optimization": zero}
    model_config = open_config(model_folder)
    model = _empty_model(model_config, layout, config, deepspeed_config)
    parameters = dict(model.causal_lm.named_parameters())
    is_alone_on_cpu = ranks.num_ranks == 1 and ranks.device.type == "cpu"
    if "offload_param" in config.nvme_offloads and is_alone_on_cpu:
        fetch_copies(parameters.values())
    shapes = {
        name: whole_shape(parameter)
        for name, parameter in parameters.items()
        if not is_adapter(name)
    }
    plan = plan_parameters(shapes, config.beingvl.trainable)
    in_nf4 = {planned.name for planned in plan if planned.is_in_nf4}
    stored_weights: Iterable[Any] = _stored_weights(model_folder, weights, shapes, layout)
    if ranks.rank == 0:
        what: Any = {"name": f"load {model_folder}", "unit": "parameter", "total": len(shapes)}
        stored_weights = progress(stored_weights, **what, leave=False)
    for name, stored in stored_weights:
        advance()
        if name in in_nf4:
            linear = model.causal_lm.get_submodule(name.removesuffix(".weight"))
            assert isinstance(linear, AdaptedLinear)
            linear.keep_in_nf4(stored, _dtype(config), ranks.device)
        else:
            _copy_in(parameters[name], stored, config, ranks)
    for planned in plan:
        if is_adapter(planned.name):
            start = initial_adapter(planned.name, planned.shape, config.beingvl.seed)
            _copy_in(parameters[planned.name], start, config, ranks)
        parameters[planned.name].requires_grad_(planned.is_trained)
    zero["reduce_bucket_size"] = reduce_bucket_elements(plan, config)
    groups = _optimizer_groups(plan, config, adam_steps or {})
    settings = [
        {
            "params": [parameters[name] for name in names],
            "lr": config.learning_rate * multiplier,
            "weight_decay": decay,
        }
        for (multiplier, decay, _), names in groups.items()
    ]
    engine, *_ = deepspeed.initialize(
        model=model, model_parameters=settings, config=deepspeed_config
    )
    _restore_rotary_buffers(model, model_config, ranks.device)
    return TrainingEngine(engine, model, plan, groups, config, ranks, advance)


def _empty_model(
    model_config: Any, layout: VocabLayout, config: StageConfig, deepspeed_config: dict[str, Any]
) -> PackedCausalLM:
    """The model without weights; under ZeRO-3 every parameter is partitioned on creation."""
    model_class, block = MODEL_FOR_CAUSAL_LM_MAPPING[type(model_config)], config.beingvl
    refuse_short_window(
        model_config, block.sequence_length, "lower beingvl.sequence_length to {window}"
    )
    refuse_unlike_packed(model_class, model_config)
    place: Any = contextlib.nullcontext()
    if config.zero_stage == 3:
        # any dtype= argument would mean 16 bits, so only the JSON sets it
        place = deepspeed.zero.Init(config_dict_or_path=deepspeed_config)
    # more than layout.num_visual if the converter padded the vocabulary
    num_visual = model_config.vocab_size - layout.num_text
    with place:
        return build_packed_model(
            model_class,
            model_config,
            layout.num_text,
            num_visual,
            block.loss_chunk_tokens,
            block.activation_checkpointing,
            block.trainable,
        )


def _stored_weights(
    folder: Path,
    weights: Mapping[str, torch.Tensor],
    shapes: Mapping[str, tuple[int, ...]],
    layout: VocabLayout,
) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, memory-mapped tensor) of every parameter. Raises InputError if one does not fit."""
    for name, shape in shapes.items():
        stored_name, rows = stored_slice(name, layout.num_text)
        if stored_name not in weights:
            raise InputError(
                f"{folder} has no tensor {stored_name!r}; it is not a whole Being-VL model folder"
            )
        stored = weights[stored_name][rows]
        if tuple(stored.shape) != shape:
            raise InputError(
                f"{folder}: {stored_name!r} gives {tuple(stored.shape)} for {name!r}, expected "
                f"{shape}; config.json and weights disagree"
            )
        yield name, stored
        if isinstance(weights, WeightFolder):
            weights.release()


def _copy_in(parameter: Any, stored: torch.Tensor, config: StageConfig, ranks: Ranks) -> None:
    """Copy this rank's part of a parameter."""
    if config.zero_stage < 3:
        parameter.data = stored.to(ranks.device, _dtype(config), copy=True)
        return
    with partition_in_memory(parameter, changes=True) as partition:
        start = ranks.rank * partition.numel()
        mine = stored.reshape(-1)[start : start + partition.numel()]
        partition.zero_()
        partition[: mine.numel()].copy_(mine)


def _dtype(config: StageConfig) -> torch.dtype:
    return torch.bfloat16 if config.is_bf16 else torch.float32


def _restore_rotary_buffers(
    model: torch.nn.Module, model_config: Any, device: torch.device
) -> None:
    """In bf16 DeepSpeed casts buffers too, which would put rotary positions off by 0.1 %."""
    for module in model.modules():
        if "inv_freq" in dict(module.named_buffers(recurse=False)):
            for name, buffer in type(module)(model_config).named_buffers():
                setattr(module, name, buffer.to(device))


# (learning-rate multiplier, weight decay, earlier Adam updates) -> trained names
Groups = dict[tuple[float, float, int], list[str]]


def _optimizer_groups(
    plan: list[PlannedParameter], config: StageConfig, adam_steps: Mapping[str, int]
) -> Groups:
    """Adam counts updates per group, so parameters with different counts need different groups."""
    groups: Groups = {}
    for planned in plan:
        rule = planned.rule
        if planned.is_trained:
            decay = config.weight_decay if rule.weight_decay is None else rule.weight_decay
            key = (rule.lr_multiplier, decay, adam_steps.get(planned.name, 0))
            groups.setdefault(key, []).append(planned.name)
    return groups


class TrainingEngine:
    """Model and optimizer. `trained_shapes`: trained name -> whole shape, in DeepSpeed's order."""

    def __init__(
        self,
        engine: Any,
        model: PackedCausalLM,
        plan: list[PlannedParameter],
        groups: Groups,
        config: StageConfig,
        ranks: Ranks,
        advance: Callable[[], object],
    ) -> None:
        self._engine = engine
        self._parameters = dict(model.causal_lm.named_parameters())
        self.model, self.plan, self.config, self.ranks = model, plan, config, ranks
        self.advance = advance
        self.accumulation_steps = config.accumulation_steps(ranks.num_ranks)
        self._lr_multipliers = [multiplier for multiplier, _, _ in groups]
        shapes = {planned.name: planned.shape for planned in plan}
        self.trained_shapes = {name: shapes[name] for names in groups.values() for name in names}
        self._partitions = partitions_of(
            config.zero_stage, engine.optimizer, self._parameters, ranks.rank
        )
        self._frozen_hashes = self._hash_frozen()
        self._carried_names: set[str] = set()  # parameters with moments from an earlier stage

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
            longest=int(np.diff(batch.cu_seqlens).max()),
        )

    @torch.no_grad()
    def evaluate(self, batch: MicroBatch) -> torch.Tensor:
        """As `forward`, without gradients and in evaluation mode; all ranks call together."""
        self.advance()
        self._engine.eval()
        losses = self.forward(batch)
        self._engine.train()
        return losses

    @torch.no_grad()
    def logits(self, probe: Probe) -> torch.Tensor:
        """Logits `[p, vocabulary]` float32 of the probe's sample, on every rank."""
        device = self.ranks.device
        self._engine.eval()
        logits = self._engine(
            input_ids=probe.input_ids.to(device)[None],
            position_ids=probe.position_ids.to(device)[None],
            cu_seqlens=torch.tensor([0, len(probe.input_ids)], dtype=torch.int32, device=device),
            target_positions=probe.positions.to(device),
            longest=len(probe.input_ids),
        )
        self._engine.train()
        return logits.float()

    def _tensor(self, array: np.ndarray) -> torch.Tensor:
        tensor = torch.from_numpy(array)
        if self.ranks.device.type == "cuda" and not tensor.is_pinned():
            # a copy from pageable memory would wait for the GPU's earlier work
            tensor = tensor.pin_memory()
        return tensor.to(self.ranks.device, non_blocking=True)

    def backward(self, scaled_loss: torch.Tensor) -> None:
        self._engine.backward(scaled_loss)

    def step(self, learning_rate: float | None) -> StepResult | None:
        """End a micro-step; the last one of a window (with a learning rate) updates the weights."""
        if learning_rate is None:
            self._engine.step()
            return None
        groups = self._engine.optimizer.param_groups
        for group, multiplier in zip(groups, self._lr_multipliers, strict=True):
            group["lr"] = learning_rate * multiplier
        self._engine.step()
        applied, norm = self._engine.was_step_applied(), self._engine.get_global_grad_norm()
        return StepResult(bool(applied), float(norm))

    def learning_rates(self, learning_rate: float) -> dict[str, float]:
        """`learning_rate/xM` for every multiplier M != 1 of the freezer's rules."""
        others = [m for m in dict.fromkeys(self._lr_multipliers) if m != 1]
        return {f"learning_rate/x{m:g}": learning_rate * m for m in others}

    def step_flops(self, num_tokens: int, num_pairs: int, num_target_tokens: int) -> float:
        """FLOPs of a step's forward and backward, as train/flops.py counts them."""
        config = self.model.causal_lm.config
        width = config.num_attention_heads * (
            getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        )
        return step_flops(self.plan, width, num_tokens, num_pairs, num_target_tokens)

    def predicted_memory(self) -> dict[str, int]:
        """Bytes by purpose, as train/memory.py predicts them for one rank."""
        model_config = self.model.causal_lm.config
        return predict_memory(self.plan, model_config, self.config, self.ranks.num_ranks)

    # ---- what checkpoints need ----
    @property
    def dtype(self) -> torch.dtype:
        """The dtype that forward passes compute in."""
        return _dtype(self.config)

    def span(self, name: str) -> tuple[int, int]:
        """The flat range [start, stop) of a trained parameter that this rank saves."""
        return self._partitions.span(name)

    def local_state(self, copy: bool = False) -> Iterable[tuple[str, torch.Tensor]]:
        """(`NAME.KEY`, this rank's flat float32 slice) of every trained parameter, on the CPU.

        In the order of `trained_shapes`; each is valid until the next is requested. With `copy`,
        all are copied at once and do not change when training continues.
        """

        def pieces() -> Iterator[tuple[str, torch.Tensor]]:
            for name, key, piece in self._partitions.read([*self.trained_shapes]):
                self.advance()
                yield f"{name}.{key}", piece.to("cpu", copy=copy)

        return list(pieces()) if copy else pieces()

    def load_state(
        self,
        fetch: Callable[[str, str, int, int], torch.Tensor],
        adam_steps: Mapping[str, int],
        only_moments_of: Collection[str] | None = None,
    ) -> None:
        """Restore masters and moments before the first step; with `only_moments_of`, only these
        parameters' moments, and adapters A.

        `fetch(name, key, start, stop)` returns a flat range; `adam_steps`: updates that the moments
        have seen.
        """
        self._partitions.create_moments(adam_steps)
        self._carried_names = set(only_moments_of or ())

        def fetch_next(name: str, key: str, start: int, stop: int) -> torch.Tensor:
            self.advance()
            return fetch(name, key, start, stop)

        if only_moments_of is None:
            self._partitions.write([*self.trained_shapes], fetch_next, STATE_KEYS)
        else:
            self._partitions.write([*only_moments_of], fetch_next, MOMENTS)
            # B starts at zero, since the old B is merged into the weights. B's gradient depends on
            # A, so its moments are only valid with the A they were computed with.
            carried_a = [name for name in only_moments_of if name.endswith(A)]
            self._partitions.write(carried_a, fetch_next, [MASTER])

    # ---- the freezer's checks ----
    def _hash_frozen(self) -> dict[str, str]:
        names = [planned.name for planned in self.plan if not planned.is_trained]
        # hashing releases the GIL
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            hashes = pool.map(lambda name: self._hash(self._partitions.held_weights(name)), names)
            return dict(zip(names, hashes, strict=True))

    def _hash(self, tensor: torch.Tensor) -> str:
        self.advance()
        data = tensor.detach().cpu().contiguous().view(-1)
        return blake3(memoryview(data.view(torch.uint8).numpy())).hexdigest()

    def check_frozen(self) -> None:
        """Raises FreezerError, on all ranks, if a frozen parameter changed on any of them."""
        if not self._frozen_hashes:
            return
        now = self._hash_frozen()
        flags = [now[name] != then for name, then in self._frozen_hashes.items()]
        counts = sum_over_ranks(flags, self.ranks.device)
        changed = [name for name, count in zip(self._frozen_hashes, counts, strict=True) if count]
        if changed:
            raise FreezerError(
                f"the frozen parameter {changed[0]} changed during training ({len(changed)} "
                "did); nothing is saved"
            )

    def hash_trained(self) -> dict[str, tuple[str, str]]:
        """For `check_trained`, before the first step: a hash of every master and, for carried
        second moments, a hash of what an update without gradient would make of them.
        """
        decay, read = self.config.second_moment_decay, self._partitions.read
        second_moments = read([*self._carried_names], [MOMENTS[1]])
        carried = {name: self._hash(piece * decay) for name, _, piece in second_moments}
        masters = read([*self.trained_shapes], [MASTER])
        return {name: (self._hash(piece), carried.get(name, "")) for name, _, piece in masters}

    def check_trained(
        self, before: Mapping[str, tuple[str, str]], saw_text: bool = True, saw_visual: bool = True
    ) -> None:
        """Raises FreezerError if a trained parameter got no gradient in the first update, or did
        not move.

        Exceptions: vocabulary rows of the input embedding that no token of the step looked up, and
        adapters A, whose gradient has B as a factor, which starts at zero.
        """
        embedding = self.model.causal_lm.get_input_embeddings()
        unseen = [] if saw_text else [embedding.text_rows]
        unseen += [] if saw_visual else [embedding.visual_rows]
        has_moved, has_gradient = {}, {}
        for name, key, piece in self._partitions.read([*before]):
            master, without = before[name]
            if key == MASTER:
                has_moved[name] = self._hash(piece) != master
            elif without and key == MOMENTS[1]:
                has_gradient[name] = self._hash(piece) != without
            elif not without and key == MOMENTS[0]:
                has_gradient[name] = bool(piece.any())
        flags = [(has_moved[name], has_gradient[name]) for name in before]
        sums = sum_over_ranks(flags, self.ranks.device)
        for name, (moved, got_gradient) in zip(before, sums, strict=True):
            is_excused = any(self._parameters[name] is rows for rows in unseen)
            is_excused |= name.endswith(A)
            if not ((moved and got_gradient) or is_excused):
                what = "did not move" if got_gradient else "got no gradient"
                raise FreezerError(
                    f"{name} is declared trained but {what} in the first step; correct "
                    "beingvl.trainable"
                )
