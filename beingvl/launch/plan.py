"""Predict a stage's memory per rank and time per epoch, and propose settings that fit.

plan            needs only the model's shape: no weights, no GPU
find_shape      of a folder, a config.json or a name (model_shapes.py)
Case            a stage on a number of GPUs; `propose` says how to make it fit
epoch_flops     FLOPs of the samples that the mixture draws
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from beingvl.data.arrow_shards import ShardReader
from beingvl.data.stage_data import mixture_of
from beingvl.errors import InputError
from beingvl.launch.model_shapes import ModelShape, find_shape
from beingvl.model.packed_check import refuse_short_window, refuse_unlike_packed
from beingvl.model.param_groups import PlannedParameter, plan_parameters
from beingvl.model.start_model import check_context
from beingvl.stage.mixture import fit_mixture
from beingvl.stage.stage_config import StageConfig, load_stage_config
from beingvl.train.flops import ASSUMED_MFU, GPU_PEAKS, step_flops
from beingvl.train.memory import cpu_bytes, device_bytes, predict_memory

USABLE = 0.92
"""Share of a device's memory for training; the rest is for CUDA, NCCL and fragmentation."""
SHIPPED = tuple(Path(__file__).parents[2] / f"ds_configs/stage{stage}.json" for stage in (1, 2, 3))
NUMBERS_OF_GPUS = (1, 8, 32)  # columns of the table
SMALL_UPDATES = ("zero_optimization.sub_group_size=100000000",)
REMEDIES = (
    SMALL_UPDATES,
    ("train_micro_batch_size_per_gpu=1",),
    ("beingvl.activation_checkpointing=true",),
    ("beingvl.loss_chunk_tokens=256",),
    ("zero_optimization.stage=3",),
    ('zero_optimization.offload_optimizer={"device": "cpu"}',),
    ("zero_optimization.stage=3", 'zero_optimization.offload_param={"device": "cpu"}'),
)
"""`--set` arguments that reduce a rank's memory, those that cost the least speed first."""


@dataclass(frozen=True)
class Case:
    """A stage on `num_ranks` GPUs of `capacity` bytes. `epoch`: a sentence, "" without data."""

    model: ModelShape
    stage: Path
    overrides: tuple[str, ...]
    num_ranks: int
    capacity: int
    epoch: str = ""

    def config(self, *more: str) -> StageConfig:
        return load_stage_config(self.stage, [*self.overrides, *more])

    def memory(self, *more: str) -> dict[str, int]:
        """One rank's bytes by purpose (`cpu_…`: offloaded), with `more` overrides."""
        config = self.config(*more)
        planned = plan_parameters(self.model.parameters, config.beingvl.trainable)
        return predict_memory(planned, self.model.config, config, self.num_ranks)

    def divides(self) -> bool:
        return self.config().sequences_per_step % self.num_ranks == 0

    def fits(self, memory: dict[str, int]) -> bool:
        return device_bytes(memory) <= USABLE * self.capacity

    def __str__(self) -> str:
        config, memory = self.config(), self.memory()
        lines = [
            f"{self.num_ranks} rank{'s' * (self.num_ranks > 1)}, ZeRO-{config.zero_stage}, "
            f"micro-batch {config.micro_batch_size}; predicted memory of one rank:"
        ]
        for purpose, amount in memory.items():
            place = "  (in CPU memory)" if purpose.startswith("cpu_") else ""
            lines.append(f"  {purpose:<14} {amount / 1e9:8.2f} GB{place}")
        used = f"{device_bytes(memory) / 1e9:8.2f} GB of {self.capacity / 1e9:g} GB"
        lines += [f"  {'on the device':<14} {used}", propose(self), self.epoch]
        return "\n".join(lines).rstrip()


@dataclass(frozen=True)
class Plan:
    """One case in detail, or a table of stages x numbers of GPUs."""

    cases: tuple[Case, ...]

    def __str__(self) -> str:
        if len(self.cases) == 1:
            return str(self.cases[0])
        numbers = list(dict.fromkeys(case.num_ranks for case in self.cases))
        rows: dict[str, str] = {}
        notes = []
        for case in self.cases:
            memory, name = case.memory(), case.stage.name
            mark = " " if case.fits(memory) else "*"
            used = f"{device_bytes(memory) / 1e9:.1f}" if case.divides() else "-"
            rows.setdefault(name, f"{name:<28}")
            rows[name] += f"{used:>10} {mark}"
            note = "\n  ".join(filter(None, [propose(case), case.epoch]))
            notes.append(f"{name} on {case.num_ranks}: {note}")
        head = f"{'GB per GPU, GPUs:':<28}" + "".join(f"{number:>10}  " for number in numbers)
        capacity = self.cases[0].capacity / 1e9
        foot = ""
        if not all(case.fits(case.memory()) for case in self.cases):
            foot += (
                f"* does not fit into {USABLE * capacity:.0f} GB, {USABLE:.0%} of {capacity:g}\n"
            )
        if not all(case.divides() for case in self.cases):
            foot += "- the batch is not divisible by so many GPUs\n"
        return "\n".join([head, *rows.values(), foot, *notes])


def plan(
    model: Path | str,
    stage: Path | str | Sequence[Path | str] = SHIPPED,
    gpus: str = "80GB",
    *,
    nodes: int = 1,
    data: Path | str | None = None,
    gpu: str = "H100",
    mfu: float = ASSUMED_MFU,
    overrides: Sequence[str] = (),
) -> Plan:
    """What each stage needs on `nodes` nodes with `gpus` each ("8x80GB"), or on 1, 8 and 32 GPUs
    ("80GB").

    `model` is a folder, a config.json or a name (`find_shape`). With `data`, a shard folder, also
    the time per epoch on GPUs of type `gpu`, assuming the model FLOP utilisation `mfu`.
    """
    numbers, capacity = parse_gpus(gpus, nodes)
    shape = find_shape(model)
    refuse_unlike_packed(shape.model_class, shape.config)
    cases = []
    for path in [stage] if isinstance(stage, Path | str) else stage:
        config = load_stage_config(path, overrides)
        length = config.beingvl.sequence_length
        refuse_short_window(shape.config, length, "lower beingvl.sequence_length to {window}")
        shards = ShardReader(data).manifest if data else None
        context = getattr(shape.config, "max_position_embeddings", None)
        note = check_context(context, config, shards)
        for num_ranks in numbers:
            epoch = _describe_epoch(Path(data), config, shape, gpu, mfu, num_ranks) if data else ""
            epoch = "\n".join(filter(None, [epoch, note]))
            cases.append(Case(shape, Path(path), tuple(overrides), num_ranks, capacity, epoch))
    return Plan(tuple(cases))


def parse_gpus(text: str, nodes: int = 1) -> tuple[tuple[int, ...], int]:
    """`8x80GB` on 2 nodes -> ((16,), 80_000_000_000); `80GB` -> NUMBERS_OF_GPUS and the bytes.
    Raises InputError for anything else.
    """
    found = re.fullmatch(r"(?:([1-9]\d*)x)?([1-9]\d*)GB", text, re.IGNORECASE)
    if not found or nodes < 1 or (nodes > 1 and not found[1]):
        raise InputError(
            f"--gpus {text!r} --nodes {nodes}: expected NUMBERxMEMORY, for example 8x80GB, or the "
            "memory alone for a table"
        )
    numbers = (int(found[1]) * nodes,) if found[1] else NUMBERS_OF_GPUS
    return numbers, int(found[2]) * 10**9


def propose(case: Case) -> str:
    """Whether it fits, and the largest micro-batch that does; if none, what to set instead."""
    config, now = case.config(), case.memory()
    per_rank = config.sequences_per_step // case.num_ranks
    verdict = f"it fits: {_total(now)}"
    if not case.fits(now):
        room = f"{USABLE * case.capacity / 1e9:.1f} GB, {USABLE:.0%} of the memory"
        verdict = f"it does not fit into {room}: {_total(now)}"
    if not case.divides():
        return (
            f"train_batch_size {config.sequences_per_step} is not divisible by {case.num_ranks} "
            f"ranks; {config.batches_beside(case.num_ranks)}"
        )
    for size in range(per_rank, 0, -1):
        memory = case.memory(f"train_micro_batch_size_per_gpu={size}")
        if per_rank % size == 0 and case.fits(memory):
            if size != config.micro_batch_size:
                largest = f"--set train_micro_batch_size_per_gpu={size}: {_total(memory)}"
                verdict += f"; largest micro-batch that fits: {largest}"
            return verdict + _small_updates(case)
    chosen: list[str] = []
    memory = now
    for words in REMEDIES:
        smaller = case.memory(*chosen, *words)
        if device_bytes(smaller) < 0.99 * device_bytes(memory):
            chosen, memory = [*chosen, *words], smaller
        if case.fits(memory):
            return f"{verdict}; --set {shlex.join(chosen)}: {_total(memory)}"
    return (
        f"it does not fit, even with --set {shlex.join(chosen)}: {_total(memory)}; take more GPUs "
        "or a shorter sequence"
    )


def _small_updates(case: Case) -> str:
    """A setting that costs no speed, if it saves a gigabyte or more."""
    before, after = case.memory(), case.memory(*SMALL_UPDATES)
    freed = device_bytes(before) - device_bytes(after)
    if freed < 1e9:
        return ""
    return (
        f"; at micro-batch {case.config().micro_batch_size} --set {SMALL_UPDATES[0]} saves "
        f"{freed / 1e9:.1f} GB: {_total(after)}"
    )


def _total(memory: dict[str, int]) -> str:
    on_cpu = cpu_bytes(memory)
    beside = f" and {on_cpu / 1e9:.1f} GB of CPU memory" if on_cpu else ""
    return f"{device_bytes(memory) / 1e9:.1f} GB{beside}"


def _describe_epoch(
    data: Path, config: StageConfig, shape: ModelShape, gpu: str, mfu: float, num_ranks: int
) -> str:
    if gpu not in GPU_PEAKS:
        raise InputError(f"--gpu {gpu!r} is not known, known are {', '.join(GPU_PEAKS)}")
    planned = plan_parameters(shape.parameters, config.beingvl.trainable)
    shards = ShardReader(data)
    note = fit_mixture(config, shards.manifest)[1]
    num_samples, num_tokens, flops = epoch_flops(shards, config, planned, shape.config)
    hours = flops / (GPU_PEAKS[gpu] * mfu * num_ranks) / 3600
    return (
        f"one epoch: {num_samples:,} samples, {num_tokens:,} tokens, {flops:.3g} FLOPs, "
        f"{hours:.2f} hours at an MFU of {mfu:g}{note and f'; {note}'}"
    )


def epoch_flops(
    shards: ShardReader, config: StageConfig, planned: Sequence[PlannedParameter], model_config: Any
) -> tuple[int, int, float]:
    """Samples, tokens and FLOPs of one epoch of the stage's mixture."""
    mixture = mixture_of(config, shards)
    draws = mixture.counts(mixture.num_samples)
    repeats = [
        draws.get(name, 0) / max(1, len(own))
        for name, own in zip(shards.sources, shards.members, strict=True)
    ]
    times_drawn = np.array(repeats)[shards.source_of]
    lengths = shards.lengths.astype(np.int64)
    num_tokens = round(times_drawn @ lengths)
    targets = round(shards.manifest.counts["target_tokens"] * num_tokens / lengths.sum())
    heads = model_config.num_attention_heads
    width = heads * (getattr(model_config, "head_dim", None) or model_config.hidden_size // heads)
    flops = step_flops(planned, width, num_tokens, round(times_drawn @ lengths**2), targets)
    return mixture.num_samples, num_tokens, flops
