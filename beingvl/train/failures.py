"""How a run ends: errors of exit code 1, neither wrong input nor a defect of the program."""

from __future__ import annotations

EXIT_REQUEUE = 85  # of a run that a signal stopped: start the same command again


class TrainingError(RuntimeError):
    """Training cannot go on; the message says why and what is still valid."""


class NonFiniteError(TrainingError):
    """Too many steps in a row had a loss or gradient that is not a finite number."""


class FreezerError(TrainingError):
    """A frozen parameter changed, or a trained one did not."""


class SaveError(TrainingError):
    """A checkpoint could not be written; older ones are untouched."""


class StallError(TrainingError):
    """A rank died or stands still."""


class ProbeMismatchError(TrainingError):
    """A written folder does not answer the checkpoint's probe as the trained model did."""
