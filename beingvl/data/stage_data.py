"""A stage's data from its JSON, for training, `plan` and `report data`."""

from __future__ import annotations

from collections.abc import Callable

from beingvl.data.arrow_shards import ShardReader
from beingvl.data.loader import TrainingData, open_mixture
from beingvl.data.mixture import Mixture
from beingvl.stage.mixture import fit_mixture
from beingvl.stage.stage_config import StageConfig


def mixture_of(config: StageConfig, shards: ShardReader) -> Mixture:
    """The stage's mixture. Raises InputError if the shards lack its sources."""
    block = fit_mixture(config, shards.manifest)[0].beingvl
    return open_mixture(shards, block.mixture, block.mixture_by, block.seed)


def data_of(
    config: StageConfig, shards: ShardReader, advance: Callable[[], object] = lambda: None
) -> TrainingData:
    """The stage's mixture for all its epochs, packed and divided into steps. `advance` is called
    after each part of a long plan.
    """
    block, mixture = config.beingvl, mixture_of(config, shards)
    return TrainingData(
        shards,
        mixture,
        round(block.epochs * mixture.num_samples),
        block.sequence_length,
        config.sequences_per_step,
        block.loss_on,
        block.packing,
        advance,
    )
