"""Validation: the loss over held-out shards, per token kind and per source, by the code that
computes the training loss.

Nothing of the training state is touched: no gradient, no random number, no optimizer; a run is
bit-identical with and without it. `beingvl evaluate --data` takes the same batches
(data/held_out.py) and sums (`LossSums`) without DeepSpeed.
"""

from __future__ import annotations

from collections.abc import Callable

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
    """What the loop calls after a step, on all ranks. It gives up between two batches when any rank
    is asked to stop, and writes nothing then.
    """
    if shards is None:
        return lambda step: None
    ranks, block = engine.ranks, engine.config.beingvl
    sequences = pack_in_order(shards.lengths, block.sequence_length)

    def validate(step: int) -> None:
        sums = LossSums.zero(shards.layout, shards.sources)
        for first in range(0, len(sequences), ranks.num_ranks):
            # past the end: a batch without targets, because every rank must take part
            own = sequences[first + ranks.rank : first + ranks.rank + 1] or [[]]
            batch = held_out_batch(shards, own[0], block.loss_on)
            sums.add(batch, engine.evaluate(batch).cpu().numpy())
            if sum_over_ranks([int(stop_requested())], ranks.device)[0]:
                if ranks.rank == 0:
                    print(
                        f"asked to stop: the validation after step {step} is left out", flush=True
                    )
                return
        sums.values = sum_over_ranks(sums.values, ranks.device)
        metrics.write_validation(step, sums.means())

    return validate
