"""This process among the others of a run, and the two collectives that everything else is made of.

DeepSpeed makes the process group (train/engine.py); these use torch's own calls on it, so that who
only adds up or compares needs no DeepSpeed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike


@dataclass(frozen=True)
class Ranks:
    """This process among the others."""

    rank: int
    num_ranks: int
    device: torch.device


def sum_over_ranks(values: ArrayLike, device: torch.device) -> np.ndarray:
    """Element-wise sum over all ranks, in float64 (exact for counts up to 2**53)."""
    tensor = torch.as_tensor(np.asarray(values, np.float64)).to(device)
    torch.distributed.all_reduce(tensor)
    return tensor.cpu().numpy()


def gather_objects(value: Any, num_ranks: int) -> list[Any]:
    """`value` of every rank, in rank order, on every rank."""
    gathered: list[Any] = [None] * num_ranks
    torch.distributed.all_gather_object(gathered, value)
    return gathered
