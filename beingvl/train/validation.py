"""Validation: the loss over held-out shards, per token kind and per source, by the code that computes the training loss.

Every sample is seen once, in the order of the shards, packed like the training data. Nothing of the training state is touched:
no gradient, no random number, no optimizer; a run is the same to the bit with and without it.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from beingvl.data.arrow_shards import ShardReader
from beingvl.data.loader import MicroBatch, collate
from beingvl.data.packing import WINDOW, check_lengths, pack_window
from beingvl.train.engine import TrainingEngine, sum_over_ranks
from beingvl.train.loss import LossSums
from beingvl.train.metrics import MetricsWriter
from beingvl.train.stage_config import StageConfig


def validator(
    engine: TrainingEngine, shards: ShardReader | None, config: StageConfig, metrics: MetricsWriter
) -> Callable[[int], None]:
    """The function the loop calls after a step; all ranks call together."""
    if shards is None:
        return lambda step: None
    length, ranks = config.beingvl.sequence_length, engine.ranks
    check_lengths(shards.lengths, length)
    sequences = [
        [start + position for position in sequence]
        for start in range(0, len(shards), WINDOW)
        for sequence in pack_window(shards.lengths[start : start + WINDOW], length)
    ]

    def batch_of(number: int) -> MicroBatch:
        """Packed sequence `number`, or a batch without targets past the end, because every rank must take part."""
        indices = sequences[number] if number < len(sequences) else []
        sources = [int(shards.source_of[index]) for index in indices]
        return collate([shards[index] for index in indices], sources, shards.layout, config.beingvl.loss_on)

    def validate(step: int) -> None:
        sums = LossSums.zero(shards.layout, shards.sources)
        for first in range(0, len(sequences), ranks.num_ranks):
            batch = batch_of(first + ranks.rank)
            sums.add(batch, engine.evaluate(batch).cpu().numpy())
        sums.values = np.asarray(sum_over_ranks(sums.values, ranks.device))
        metrics.write_validation(step, sums.means())

    return validate
