"""This process's place in a run, and the two collectives that everything else is built from.

DeepSpeed creates the process group (train/engine.py). The collectives use torch's own calls on it,
so code that only sums or compares needs no DeepSpeed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike


@dataclass(frozen=True)
class Ranks:
    """This process's rank, the number of ranks, and this rank's device."""

    rank: int
    num_ranks: int
    device: torch.device


def sum_over_ranks(values: ArrayLike, device: torch.device) -> np.ndarray:
    """Element-wise sum over all ranks, in float64 (exact for counts up to 2**53)."""
    tensor = torch.as_tensor(np.asarray(values, np.float64)).to(device)
    torch.distributed.all_reduce(tensor)
    return tensor.cpu().numpy()


def gather_objects(value: Any, num_ranks: int) -> list[Any]:
    """Every rank's `value`, in rank order, on every rank."""
    gathered: list[Any] = [None] * num_ranks
    torch.distributed.all_gather_object(gathered, value)
    return gathered
