"""The training loop: one function, five parts per step.

    fetch the window and count its target tokens / forward and backward / step and check finite /
    log / save or stop

A step's samples and its learning rate are pure functions of its number. So a resumed run needs only
the number, the weights and the optimizer's moments.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from beingvl.data.loader import TrainingData
from beingvl.errors import InputError
from beingvl.stage.stage_config import StageConfig
from beingvl.train.engine import TrainingEngine
from beingvl.train.failures import NonFiniteError
from beingvl.train.loss import LossSums, backward_scale, learning_rate_at
from beingvl.train.metrics import MetricsWriter, SpikeDetector, peak_memory_bytes
from beingvl.train.phases import BETWEEN_STEPS, STEP_PHASES, Phases
from beingvl.train.ranks import sum_over_ranks
from beingvl.train.window import WindowFetcher


@dataclass
class Progress:
    """`step` optimizer steps are done; `num_applied_steps` of them changed weights."""

    step: int = 0
    num_applied_steps: int = 0
    num_skipped_in_a_row: int = 0


class Saver(Protocol):
    """`save` begins a checkpoint, `commit` ends it once every rank `is_written`, or at the end."""

    @property
    def is_written(self) -> bool: ...
    def save(self, progress: Progress) -> None: ...
    def commit(self) -> None: ...


def num_steps_of(data: TrainingData, config: StageConfig) -> int:
    """Optimizer steps of the run and its schedule. Raises InputError for less than one."""
    there, wanted = data.plan.num_sequences, config.sequences_per_step
    if there < wanted:
        epochs = math.ceil(config.beingvl.epochs * wanted / there)
        raise InputError(
            f"{config.source}: train_batch_size is {wanted}, the whole run has {there} sequences, "
            f"less than one step; add --set train_batch_size={there} or smaller, or --set "
            f"beingvl.epochs={epochs} or larger"
        )
    return min(data.num_steps, config.beingvl.max_steps or data.num_steps)


def learning_rate_of(step: int, num_steps: int, config: StageConfig) -> float:
    peak, block = config.learning_rate, config.beingvl
    shape = (block.schedule, block.warmup_ratio, block.min_lr_ratio)
    return learning_rate_at(step, num_steps, peak, *shape)


def train(
    engine: TrainingEngine,
    data: TrainingData,
    config: StageConfig,
    progress: Progress,
    metrics: MetricsWriter,
    phases: Phases,
    saver: Saver,
    validate: Callable[[int], None],
    stop_requested: Callable[[], bool],
) -> bool:
    """Run from `progress.step` to the end. True when finished, False when saved and stopped.

    `stop_requested` is called on every rank before every step; if one says yes, all stop. Raises
    NonFiniteError after `max_skipped_steps` skipped steps in a row, with the last good state saved.
    """
    block, ranks = config.beingvl, engine.ranks
    num_steps = num_steps_of(data, config)
    place = (ranks.rank, ranks.num_ranks)
    is_gpu = ranks.device.type == "cuda"
    windows = WindowFetcher(
        data, engine.accumulation_steps, config.micro_batch_size, *place, stop=num_steps, pin=is_gpu
    )
    windows.load_state_dict({"step": progress.step})
    spikes = SpikeDetector()
    last_good = saved = replace(progress)
    saved_at = time.monotonic()
    masters_before = engine.hash_trained() if progress.num_applied_steps == 0 else None

    for step in range(progress.step, num_steps):
        # ---- fetch the window and count its target tokens ----
        phases.enter(step + 1, "data")
        window = next(windows)
        phases.enter(step + 1, "communication")
        is_time = 0 < block.checkpoint_every_minutes * 60 <= time.monotonic() - saved_at
        asked = [int(stop_requested()), int(is_time and ranks.rank == 0), int(saver.is_written)]
        totals = sum_over_ranks([*window.counts, *asked], ranks.device).astype(int).tolist()
        num_target_tokens, num_tokens, num_pairs, num_visual_tokens, *answers = totals
        num_stop_requests, is_time, num_written = answers
        if num_stop_requests:
            phases.enter(step, "save")
            # skipped steps since then changed nothing; the next start repeats them
            if saved.step < last_good.step:
                saver.save(last_good)
            break

        # ---- forward and backward ----
        learning_rate = learning_rate_of(step, num_steps, config)
        scale = backward_scale(num_target_tokens, ranks.num_ranks, engine.accumulation_steps)
        window_losses = []
        for micro_step, batch in enumerate(window.batches):
            phases.enter(step + 1, "forward")
            token_losses = engine.forward(batch)
            phases.enter(step + 1, "backward")
            engine.backward(token_losses.sum() * scale)
            is_update = micro_step == engine.accumulation_steps - 1
            if is_update:
                phases.enter(step + 1, "optimizer")
            result = engine.step(learning_rate if is_update else None)
            window_losses.append(token_losses.detach())

        # ---- step and check finite ----
        assert result is not None
        phases.enter(step + 1, "check")
        sums = LossSums.zero(data.shards.layout, data.shards.sources)
        on_cpu = torch.cat(window_losses).cpu().split([len(losses) for losses in window_losses])
        for batch, losses in zip(window.batches, on_cpu, strict=True):
            sums.add(batch, losses.numpy())
        phases.enter(step + 1, "communication")
        sums.values = sum_over_ranks(sums.values, ranks.device)
        phases.enter(step + 1, "check")
        means = sums.means()
        is_finite = math.isfinite(means["loss"]) and math.isfinite(result.gradient_norm)
        is_good = result.applied and is_finite
        progress.step = step + 1
        progress.num_applied_steps += result.applied
        progress.num_skipped_in_a_row = 0 if is_good else progress.num_skipped_in_a_row + 1
        if is_good:
            last_good = replace(progress)
        if masters_before and result.applied:
            saw_text, saw_visual = num_tokens > num_visual_tokens, num_visual_tokens > 0
            engine.check_trained(masters_before, saw_text, saw_visual)
            masters_before = None

        # ---- log ----
        phases.enter(step + 1, "log")
        seconds = phases.take_seconds(STEP_PHASES)
        is_spike = is_good and spikes.add(means["loss"])
        is_end, is_noted = progress.step == num_steps, is_spike or not is_good
        if is_noted or is_end or progress.step % block.log_every_steps == 0:
            metrics.write_step(
                progress.step,
                {
                    **means,
                    "learning_rate": learning_rate,
                    **engine.learning_rates(learning_rate),
                    "gradient_norm": result.gradient_norm,
                    "skipped": int(not is_good),
                    "spike": int(is_spike),
                    "target_tokens": num_target_tokens,
                    "tokens": num_tokens,
                    "peak_memory_bytes": peak_memory_bytes(ranks.device),
                },
                engine.step_flops(num_tokens, num_pairs, num_target_tokens),
                seconds | phases.take_seconds(BETWEEN_STEPS),
                windows.sample_ids(step) if is_noted and ranks.rank == 0 else [],
            )
        if block.validation_every_steps and progress.step % block.validation_every_steps == 0:
            phases.enter(step + 1, "validation")
            validate(progress.step)

        # ---- save or stop ----
        phases.enter(step + 1, "save")
        if num_written == ranks.num_ranks:
            saver.commit()
        gives_up = progress.num_skipped_in_a_row >= block.max_skipped_steps
        gives_up |= is_end and last_good.step == 0
        every = block.checkpoint_every_steps
        is_due = is_time or (every and progress.step % every == 0)
        if (is_good and is_due) or ((gives_up or is_end) and saved.step < last_good.step):
            saver.save(last_good)
            saved, saved_at = last_good, time.monotonic()
        if gives_up:
            saver.commit()
            kept = "there was no good one before"
            if last_good.step:
                kept = f"the last good state, after step {last_good.step}, is kept"
            raise NonFiniteError(
                f"{progress.num_skipped_in_a_row} steps in a row had a loss or gradient that is "
                f"not finite (the last is step {progress.step}; their samples are in "
                f"metrics.jsonl); {kept}: lower the learning rate or look at those samples"
            )
    saver.commit()
    windows.close()
    return progress.step == num_steps
