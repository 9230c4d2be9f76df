"""What the loop calls to save: freezer check, probe logits, this rank's slices, and the
description of the whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from beingvl.train.checkpoint import (
    CheckpointState,
    CheckpointWriter,
    checkpoint_folder,
    delete_old_checkpoints,
)
from beingvl.train.engine import TrainingEngine
from beingvl.train.loop import Progress
from beingvl.train.probe import Probe, save_probe
from beingvl.train.ranks import gather_objects
from beingvl.train.stage_run import Stage


class Saver:
    """What the loop calls to save. `carried_steps`: Adam updates made before this stage.

    With `background_save` the state is copied and a thread writes it; the loop calls `commit` when
    all ranks have written.
    """

    def __init__(
        self, stage: Stage, engine: TrainingEngine, probe: Probe, carried_steps: Mapping[str, int]
    ) -> None:
        self._stage, self._engine, self._probe, self._carried_steps = (
            stage,
            engine,
            probe,
            carried_steps,
        )
        num_ranks = engine.ranks.num_ranks
        self._spans = gather_objects(
            {name: engine.span(name) for name in engine.trained_shapes}, num_ranks
        )
        gather = partial(gather_objects, num_ranks=num_ranks)
        self._writer = CheckpointWriter(engine.ranks.rank, gather, stage.phases.advance)

    @property
    def is_written(self) -> bool:
        """Whether this rank has written a checkpoint that is not committed yet."""
        return self._writer.is_written

    def save(self, progress: Progress) -> None:
        """Raises FreezerError when a frozen parameter changed, SaveError when a rank cannot
        write.
        """
        engine, probe, in_background = (
            self._engine,
            self._probe,
            self._stage.config.beingvl.background_save,
        )
        self.commit()
        engine.check_frozen()
        logits = engine.logits(probe.input_ids, probe.positions)
        self._writer.begin(
            checkpoint_folder(self._stage.output, progress.step),
            self._describe(progress),
            engine.local_state(copy=in_background),
            write_more=lambda folder: save_probe(folder, probe, logits),
        )
        if not in_background:
            self.commit()

    def commit(self) -> None:
        """Wait for what is being written and make it a checkpoint; all ranks call together."""
        self._writer.commit()
        if self._engine.ranks.rank == 0:
            block = self._stage.config.beingvl
            delete_old_checkpoints(self._stage.output, block.keep_last, block.keep_every)

    def _describe(self, progress: Progress) -> CheckpointState:
        parameters = {
            name: {
                "shape": list(shape),
                "spans": [list(of_rank[name]) for of_rank in self._spans],
                "adam_steps": self._carried_steps[name] + progress.num_applied_steps,
            }
            for name, shape in self._engine.trained_shapes.items()
        }
        num_ranks = self._engine.ranks.num_ranks
        return CheckpointState(
            progress.step, progress.num_applied_steps, num_ranks, self._stage.identity, parameters
        )
