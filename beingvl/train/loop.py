"""The training loop: one function, five parts a step.

    fetch the window and count its target tokens / forward and backward / step and check finite / log / save or stop

Everything that decides what a step does is a pure function of its number: which samples it sees, its learning rate. So a
resumed run only needs the number, the weights and the optimizer's moments.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from beingvl.data.loader import TrainingData
from beingvl.train.engine import TrainingEngine, sum_over_ranks
from beingvl.train.loss import LossSums, backward_scale, learning_rate_at
from beingvl.train.metrics import MetricsWriter, peak_memory_bytes
from beingvl.train.stage_config import StageConfig


@dataclass
class Progress:
    """Where a run is. `step` optimizer steps are done, `num_applied_steps` of them changed weights."""

    step: int = 0
    num_applied_steps: int = 0
    num_skipped_in_a_row: int = 0


class NonFiniteError(RuntimeError):
    """Too many steps in a row had a loss or gradient that is not a finite number."""


def num_steps_of(data: TrainingData, config: StageConfig) -> int:
    """Optimizer steps of the whole run; the learning-rate schedule spans exactly these."""
    return min(data.num_steps, config.beingvl.max_steps or data.num_steps)


def train(
    engine: TrainingEngine,
    data: TrainingData,
    config: StageConfig,
    progress: Progress,
    metrics: MetricsWriter,
    save: Callable[[Progress], None],
    stop_requested: Callable[[], bool],
) -> bool:
    """Run from `progress.step` to the end. True when finished, False when stopped early after saving.

    `stop_requested` is asked on every rank in every step; one rank's yes is everybody's. Raises NonFiniteError after
    `max_skipped_steps` skipped steps in a row.
    """
    block, ranks = config.beingvl, engine.ranks
    num_steps = num_steps_of(data, config)
    schedule = (num_steps, config.learning_rate, block.schedule, block.warmup_ratio, block.min_lr_ratio)
    saved_step = progress.step

    for step in range(progress.step, num_steps):
        started = time.perf_counter()

        # ---- fetch the window and count its target tokens ----
        window = [
            data.micro_batch(step, micro_step, ranks.rank, ranks.num_ranks, config.micro_batch_size)
            for micro_step in range(engine.accumulation_steps)
        ]
        counts = [sum(b.num_target_tokens for b in window), sum(len(b.input_ids) for b in window), int(stop_requested())]
        num_target_tokens, num_tokens, num_stop_requests = sum_over_ranks(counts, ranks.device)
        fetched = time.perf_counter()

        # ---- forward and backward ----
        learning_rate = learning_rate_at(step, *schedule)
        scale = backward_scale(int(num_target_tokens), ranks.num_ranks, engine.accumulation_steps)
        window_losses = []
        for micro_step, batch in enumerate(window):
            is_last = micro_step == engine.accumulation_steps - 1
            token_losses = engine.forward(batch)
            engine.backward(token_losses.sum() * scale)
            result = engine.step(learning_rate if is_last else None)
            window_losses.append(token_losses.detach())

        # ---- step and check finite ----
        assert result is not None
        sums = LossSums.zero(data.shards.layout, data.shards.sources)
        for batch, token_losses in zip(window, window_losses, strict=True):
            sums.add(batch, token_losses.cpu().numpy())
        sums.values = sum_over_ranks(sums.values, ranks.device)
        losses = sums.means()
        is_good = result.applied and math.isfinite(losses["loss"]) and math.isfinite(result.gradient_norm)
        progress.step = step + 1
        progress.num_applied_steps += result.applied
        progress.num_skipped_in_a_row = 0 if is_good else progress.num_skipped_in_a_row + 1

        # ---- log ----
        seconds = time.perf_counter() - started
        if progress.step % block.log_every_steps == 0 or progress.step == num_steps or not is_good:
            metrics.write(
                progress.step,
                {
                    **losses,
                    "learning_rate": learning_rate,
                    "gradient_norm": result.gradient_norm,
                    "skipped": int(not is_good),
                    "target_tokens": int(num_target_tokens),
                    "tokens": int(num_tokens),
                    "tokens_per_second": num_tokens / seconds,
                    "seconds": seconds,
                    "seconds_data": fetched - started,
                    "peak_memory_bytes": peak_memory_bytes(ranks.device),
                    **({} if is_good else {"sample_ids": [name for b in window for name in b.sample_ids]}),
                },
            )

        # ---- save or stop ----
        if progress.num_skipped_in_a_row > block.max_skipped_steps:
            raise NonFiniteError(
                f"{progress.num_skipped_in_a_row} steps in a row had a loss or gradient that is not finite (the last is step "
                f"{progress.step}; its samples are in metrics.jsonl); lower the learning rate or look at those samples"
            )
        is_due = block.checkpoint_every_steps and progress.step % block.checkpoint_every_steps == 0
        if is_good and (is_due or num_stop_requests or progress.step == num_steps):
            save(progress)
            saved_step = progress.step
        if num_stop_requests and saved_step == progress.step:
            return progress.step == num_steps
    return True
