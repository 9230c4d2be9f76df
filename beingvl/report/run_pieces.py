"""What the report of a run is made of."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from beingvl.images.vqgan import VQGAN
from beingvl.report.frozen import GroupHashes
from beingvl.vbpe.visual_bpe import VisualBPE


@dataclass(frozen=True)
class Stage:
    """What training wrote: lines of the metrics files, and the plan's table."""

    rows: list[dict[str, Any]]
    validation: list[dict[str, Any]]
    plan: str


@dataclass(frozen=True)
class Run:
    """The pieces of a run that are there. `missing` says in words which are not.

    `evaluations` holds scores by name; `asked_alike` are those of the stages that share their
    questions, in order; `mean_of_variant` is the mean accuracy after the last stage with vBPE and
    with plain codes, as far as both were trained.
    """

    stages: dict[str, Stage]
    evaluations: dict[str, dict[str, Any]]
    asked_alike: dict[str, dict[str, Any]]
    predictions: list[dict[str, Any]]
    mean_of_variant: dict[str, float]
    frozen: list[GroupHashes]
    vbpe: VisualBPE | None
    codes: np.ndarray | None
    vqgan: VQGAN | None
    images: Path | None
    shards: list[Path]
    data_options: argparse.Namespace
    missing: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Example:
    """One test question with its picture in three forms.

    `image` and `reconstruction` are `[H, W, 3]`, `owners` `[h, w]` says which token covers each
    cell of the code grid.
    """

    question: str
    truth: str
    answer: str
    correct: bool
    key: str
    image: np.ndarray
    reconstruction: np.ndarray
    owners: np.ndarray
