"""Held-out samples in shard order, each once: the batches of validation during training
(train/validation.py) and of `beingvl evaluate --data`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from beingvl.data.arrow_shards import ShardReader
from beingvl.data.loader import MicroBatch, collate
from beingvl.data.packing import WINDOW, check_lengths, pack_window


def pack_in_order(lengths: np.ndarray, sequence_length: int) -> list[list[int]]:
    """For each sequence, its samples as positions in `lengths`; each sample occurs once. Raises
    InputError for a sample that is too long.
    """
    check_lengths(lengths, sequence_length)
    return [
        [start + position for position in sequence]
        for start in range(0, len(lengths), WINDOW)
        for sequence in pack_window(lengths[start : start + WINDOW], sequence_length)
    ]


def held_out_batch(shards: ShardReader, indices: Sequence[int], loss_on: str) -> MicroBatch:
    """The samples `indices` end to end; without samples, a batch without targets."""
    sources = [int(shards.source_of[index]) for index in indices]
    samples = [shards[index] for index in indices]
    return collate(samples, sources, shards.layout, loss_on, shards.positions)
