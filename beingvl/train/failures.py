"""Errors that end a run with exit code 1: neither wrong input nor a bug."""

from __future__ import annotations

EXIT_REQUEUE = 85  # a signal stopped the run: start the same command again


class TrainingError(RuntimeError):
    """Training cannot continue; the message says why, and what is still valid."""


class NonFiniteError(TrainingError):
    """Too many steps in a row had a loss or gradient that is not finite."""


class FreezerError(TrainingError):
    """A frozen parameter changed, or a trained one did not."""


class SaveError(TrainingError):
    """A checkpoint could not be written; older ones are untouched."""


class StallError(TrainingError):
    """A rank died or stalled."""


class ProbeMismatchError(TrainingError):
    """A written folder's probe logits differ from those of the trained model."""
