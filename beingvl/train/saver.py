"""Saving, as the loop calls it: freezer check, probe logits, this rank's slices, manifest."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from beingvl.train.checkpoint import CheckpointState, CheckpointWriter
from beingvl.train.checkpoint_folders import checkpoint_folder, delete_old_checkpoints
from beingvl.train.engine import TrainingEngine
from beingvl.train.loop import Progress
from beingvl.train.probe import Probe, save_probe
from beingvl.train.ranks import gather_objects
from beingvl.train.stage_run import Stage


class Saver:
    """With `background_save`, a thread writes a copy, and the loop calls `commit` once all ranks
    have written. `carried_steps`: Adam updates made before this stage.
    """

    def __init__(
        self, stage: Stage, engine: TrainingEngine, probe: Probe, carried_steps: Mapping[str, int]
    ) -> None:
        self._output, self._identity = stage.output, stage.identity
        self._engine, self._probe, self._carried_steps = engine, probe, carried_steps
        self._block, ranks = stage.config.beingvl, engine.ranks
        gather = partial(gather_objects, num_ranks=ranks.num_ranks)
        self._spans = gather({name: engine.span(name) for name in engine.trained_shapes})
        self._writer = CheckpointWriter(ranks.rank, gather, engine.advance)

    @property
    def is_written(self) -> bool:
        """Whether this rank has written its part of a checkpoint that is not yet committed."""
        return self._writer.is_written

    def save(self, progress: Progress) -> None:
        """Raises FreezerError if a frozen parameter changed, SaveError if a rank cannot write."""
        engine, probe, in_background = self._engine, self._probe, self._block.background_save
        self.commit()
        engine.check_frozen()
        logits = engine.logits(probe)
        self._writer.begin(
            checkpoint_folder(self._output, progress.step),
            self._describe(progress),
            engine.local_state(copy=in_background),
            write_more=lambda folder: save_probe(folder, probe, logits),
        )
        if not in_background:
            self.commit()

    def commit(self) -> None:
        """Wait for a save in progress and finish its checkpoint; all ranks call together."""
        self._writer.commit()
        if self._engine.ranks.rank == 0:
            delete_old_checkpoints(self._output, self._block.keep_last, self._block.keep_every)

    def _describe(self, progress: Progress) -> CheckpointState:
        parameters = {
            name: {
                "shape": list(shape),
                "spans": [list(of_rank[name]) for of_rank in self._spans],
                "adam_steps": self._carried_steps[name] + progress.num_applied_steps,
            }
            for name, shape in self._engine.trained_shapes.items()
        }
        return CheckpointState(
            progress.step, progress.num_applied_steps, len(self._spans), self._identity, parameters
        )
