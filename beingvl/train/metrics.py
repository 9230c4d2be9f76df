"""Metrics of a run: metrics.jsonl always, TensorBoard when the stage asks for it, a progress bar on rank 0.

Only rank 0 writes. A resumed run cuts metrics.jsonl back to the step it resumes from, so that no step stands in it twice.
"""

from __future__ import annotations

import json
import resource
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from tqdm import tqdm

from beingvl.manifest import write_atomically

METRICS_FILE = "metrics.jsonl"


class MetricsWriter:
    """Writes one dictionary a step. On other ranks than 0 it does nothing."""

    def __init__(
        self, output: Path, rank: int, first_step: int, num_steps: int, tensorboard: bool, log_folder: Path | None
    ) -> None:
        self._is_writer = rank == 0
        if not self._is_writer:
            return
        path = output / METRICS_FILE
        if path.is_file():
            kept = [line for line in path.read_text().splitlines(keepends=True) if _step_of(line) <= first_step]
            write_atomically(path, "".join(kept))
        self._file = path.open("a", encoding="utf-8", buffering=1)
        self._board = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(log_folder or output / "tensorboard"), purge_step=first_step + 1)
        self._bar = tqdm(total=num_steps, initial=first_step, desc=output.name, unit="step", disable=None, smoothing=0.1)

    def write(self, step: int, values: dict[str, Any]) -> None:
        """`step` counts finished optimizer steps, from 1."""
        if not self._is_writer:
            return
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        if self._board:
            for name, value in values.items():
                if isinstance(value, (int, float)):
                    self._board.add_scalar(name, value, step)
        shown = f"loss {values['loss']:.4f}, lr {values['learning_rate']:.2e}, {values['tokens_per_second']:,.0f} tokens/s"
        self._bar.set_postfix_str(shown, refresh=False)
        self._bar.update(step - self._bar.n)

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._is_writer:
            self._file.close()
            self._bar.close()
            if self._board:
                self._board.close()


def _step_of(line: str) -> int:
    """The step of a metrics line; a line cut off by a crash counts as never written."""
    try:
        return int(json.loads(line)["step"])
    except (json.JSONDecodeError, KeyError):
        return 2**62


def read_metrics(output: Path) -> list[dict[str, Any]]:
    """All lines of a stage folder's metrics.jsonl."""
    return [json.loads(line) for line in (output / METRICS_FILE).read_text().splitlines()]


def peak_memory_bytes(device: torch.device) -> int:
    """Peak of this process: device memory on an accelerator, resident memory on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
