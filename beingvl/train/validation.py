"""Validation: the loss on held-out shards, per token kind and per source, computed by the same code
as the training loss.

It touches no training state (gradients, random numbers, optimizer), so a run is bit-identical with
and without it. `beingvl evaluate --data` uses the same batches (data/held_out.py) and sums
(`LossSums`), without DeepSpeed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from beingvl.artefact.progress import progress
from beingvl.data.arrow_shards import ShardReader
from beingvl.data.held_out import held_out_batch, pack_in_order
from beingvl.train.engine import TrainingEngine
from beingvl.train.loss import LossSums
from beingvl.train.metrics import MetricsWriter
from beingvl.train.ranks import sum_over_ranks


def validator(
    engine: TrainingEngine,
    shards: ShardReader | None,
    metrics: MetricsWriter,
    stop_requested: Callable[[], bool],
) -> Callable[[int], None]:
    """The function that the loop calls after a step, on all ranks. When any rank is asked to stop,
    it gives up after the current batch and writes nothing.
    """
    if shards is None:
        return lambda step: None
    ranks, block = engine.ranks, engine.config.beingvl
    sequences = pack_in_order(shards.lengths, block.sequence_length)

    def validate(step: int) -> None:
        sums = LossSums.zero(shards.layout, shards.sources)
        starts: Iterable[int] = range(0, len(sequences), ranks.num_ranks)
        if ranks.rank == 0:
            name = f"validation after step {step}"
            starts = progress(starts, name=name, unit="round", leave=False)
        for first in starts:
            # past the end, a batch without targets: every rank must take part
            own = sequences[first + ranks.rank : first + ranks.rank + 1] or [[]]
            batch = held_out_batch(shards, own[0], block.loss_on)
            sums.add(batch, engine.evaluate(batch).cpu().numpy())
            if sum_over_ranks([int(stop_requested())], ranks.device)[0]:
                if ranks.rank == 0:
                    print(f"asked to stop: skipping the validation after step {step}", flush=True)
                return
        sums.values = sum_over_ranks(sums.values, ranks.device)
        metrics.write_validation(step, sums.means())

    return validate
