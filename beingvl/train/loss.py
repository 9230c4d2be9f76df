"""Token-exact loss and learning rate: what a step computes, as pure functions.

The loss of an optimizer step is the sum over its target tokens divided by their number, over all
ranks and accumulation steps. DeepSpeed averages gradients over ranks and divides by the
accumulation steps, so every micro-batch's *sum* is scaled by

    num_ranks * accumulation_steps / num_target_tokens_of_the_step

and the mean of means never appears.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from beingvl.data.loader import IGNORED, MicroBatch
from beingvl.vocab import TOKEN_KINDS, VocabLayout


def backward_scale(num_target_tokens: int, num_ranks: int, accumulation_steps: int) -> float:
    """Factor from a micro-batch's loss sum to what `engine.backward` takes; 0 without targets."""
    return num_ranks * accumulation_steps / num_target_tokens if num_target_tokens else 0.0


def learning_rate_at(
    step: int, num_steps: int, peak: float, schedule: str, warmup_ratio: float, min_ratio: float
) -> float:
    """Learning rate of `step` (from 0) of `num_steps`: linear warm-up, then cosine or constant.

    The first step already learns, with peak / num_warmup_steps; the last cosine step is just above
    min_ratio * peak.
    """
    num_warmup = math.ceil(num_steps * warmup_ratio)
    if step < num_warmup:
        return peak * (step + 1) / num_warmup
    if schedule == "constant":
        return peak
    progress = (step - num_warmup) / max(1, num_steps - num_warmup)
    return peak * (min_ratio + (1 - min_ratio) * 0.5 * (1 + math.cos(math.pi * progress)))


@dataclass
class LossSums:
    """Loss sums (nats) and target counts of one rank and step, by token kind and mixture source.

    `values` is `[2, num_kinds + num_sources]` float64: sums in `values[0]`, counts in `values[1]`.
    They add up over ranks.
    """

    layout: VocabLayout
    sources: list[str]
    values: np.ndarray

    @classmethod
    def zero(cls, layout: VocabLayout, sources: list[str]) -> LossSums:
        return cls(layout, sources, np.zeros((2, len(TOKEN_KINDS) + len(sources))))

    def add(self, batch: MicroBatch, token_losses: np.ndarray) -> None:
        """Add a micro-batch's `token_losses` `[num_targets]`, in the order of its targets."""
        positions = np.flatnonzero(batch.target_ids != IGNORED)
        kinds = self.layout.token_kinds(batch.target_ids[positions])
        sources = batch.source_of_token[positions] + len(TOKEN_KINDS)
        for groups in (kinds, sources):
            self.values[0] += np.bincount(groups, token_losses, minlength=self.values.shape[1])
            self.values[1] += np.bincount(groups, minlength=self.values.shape[1])

    def means(self) -> dict[str, float]:
        """`loss`, `loss/kind/…` and `loss/source/…`, for kinds and sources that occurred."""
        names = [
            *(f"loss/kind/{kind}" for kind in TOKEN_KINDS),
            *(f"loss/source/{source}" for source in self.sources),
        ]
        sums, counts = self.values
        total = counts[: len(TOKEN_KINDS)].sum()
        means = {"loss": float(sums[: len(TOKEN_KINDS)].sum() / total)} if total else {"loss": 0.0}
        return means | {
            name: float(value / count)
            for name, value, count in zip(names, sums, counts, strict=True)
            if count
        }
