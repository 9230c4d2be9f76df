"""Metrics of a run: always metrics.jsonl; TensorBoard if the stage asks for it; Weights & Biases if
WANDB_PROJECT is set; a progress bar, or without a terminal a line now and then.

Only rank 0 writes. A resumed run truncates metrics.jsonl to the step it resumes from, so that no
step appears twice.
"""

from __future__ import annotations

import json
import math
import os
import resource
import statistics
import sys
import time
import uuid
from collections import deque
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TextIO

import torch
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams
from tqdm import tqdm

from beingvl.artefact.files import write_atomically
from beingvl.errors import InputError
from beingvl.json_file import parse_json
from beingvl.train.flops import ASSUMED_MFU
from beingvl.train.phases import STEP_PHASES
from beingvl.train.ranks import Ranks

METRICS_FILE = "metrics.jsonl"
VALIDATION_FILE = "validation.jsonl"
STAGE_FILE = "stage.json"
GROUP_OF = {
    **dict.fromkeys(("learning", "gradient"), "optim"),
    **dict.fromkeys(("skipped", "spike"), "health"),
    "seconds": "time",
    "peak": "memory",
}
"""First word of a metric's name -> its group in TensorBoard; all others are in `speed`."""
WANDB_VARIABLE = "WANDB_PROJECT"
SECONDS_BETWEEN_LINES = 30


def board_tag(name: str) -> str:
    """A metric's TensorBoard name: its group, then the metric."""
    if name == "loss":
        return "loss/all"
    if name == "validation/loss":
        return "validation/all"
    return name if "/" in name else f"{GROUP_OF.get(name.partition('_')[0], 'speed')}/{name}"


class MetricsWriter:
    """Writes one dictionary per step, from `first_step` + 1 to `num_steps`; only on rank 0.

    `board_folder`: for TensorBoard. `peak_flops`: of all devices together, if known.
    """

    def __init__(
        self,
        output: Path,
        ranks: Ranks,
        first_step: int,
        num_steps: int,
        board_folder: Path | None = None,
        peak_flops: float | None = None,
    ) -> None:
        self._is_writer, self._num_ranks = ranks.rank == 0, ranks.num_ranks
        self._peak_flops, self._flops, self._seconds = peak_flops, 0.0, 0.0
        if not self._is_writer:
            return
        self._file = _open_from(output / METRICS_FILE, first_step)
        self._validation_file = _open_from(output / VALIDATION_FILE, first_step)
        self._board = None
        if board_folder:
            self._board = SummaryWriter(str(board_folder), purge_step=first_step + 1)
            if (output / STAGE_FILE).is_file():
                _write_settings(self._board, (output / STAGE_FILE).read_text(), first_step)
        self._wandb = _start_wandb(output) if os.environ.get(WANDB_VARIABLE) else None
        self._first_step, self._num_steps = first_step, num_steps
        self._started_at, self._printed_at = time.monotonic(), -math.inf
        self._bar = tqdm(
            total=num_steps,
            initial=first_step,
            desc=output.name,
            unit="step",
            disable=None,
            smoothing=0.1,
        )

    def write_step(
        self,
        step: int,
        values: dict[str, Any],
        flops: float,
        seconds_of: dict[str, float],
        sample_ids: list[str],
    ) -> None:
        """`step` counts from 1; `flops` are this step's, on all devices. `seconds_of`: phase ->
        seconds in this step; `save`, `validation` and `start` count since the last line written.
        """
        if not self._is_writer:
            return
        seconds = sum(value for phase, value in seconds_of.items() if phase in STEP_PHASES)
        rate = values["tokens"] / seconds
        mfu = flops / seconds / self._peak_flops if self._peak_flops else None
        self._flops, self._seconds = self._flops + flops, self._seconds + seconds
        row = {
            **values,
            "tokens_per_second": rate,
            "tokens_per_second_per_device": rate / self._num_ranks,
            "mfu": mfu,
            "seconds": seconds,
            **{f"seconds_{phase}": value for phase, value in seconds_of.items()},
        }
        self._write(self._file, step, {**row, **({"sample_ids": sample_ids} if sample_ids else {})})
        shown = f"loss {values['loss']:.4f}, lr {values['learning_rate']:.2e}, {rate:,.0f} tokens/s"
        shown += f", MFU {mfu:.1%}" if mfu else ""
        if self._bar.disable:
            self._print_line(step, shown)
        self._bar.set_postfix_str(shown, refresh=False)
        self._bar.update(step - self._bar.n)
        if values["spike"]:
            self._bar.write(
                f"step {step}: loss {values['loss']:.4f} is far above the last steps'; its "
                f"samples are in {METRICS_FILE}"
            )

    def _print_line(self, step: int, shown: str) -> None:
        """Instead of the bar: a line now and then, for the log of a batch job."""
        now = time.monotonic()
        if now - self._printed_at < SECONDS_BETWEEN_LINES and step < self._num_steps:
            return
        left = (now - self._started_at) / (step - self._first_step) * (self._num_steps - step)
        self._printed_at = now
        print(
            f"step {step:,} of {self._num_steps:,}: {shown}, {tqdm.format_interval(left)} left",
            file=sys.stderr,
            flush=True,
        )

    def describe_time(self) -> str:
        """Time of the steps written so far; on a GPU, next to what `beingvl plan` predicts."""
        real = f"{self._seconds:.1f} s"
        if not self._peak_flops:
            return f"time of the logged steps: {real}"
        predicted = f"{self._flops / self._peak_flops / ASSUMED_MFU:.1f} s"
        return (
            f"time of the logged steps: predicted {predicted} at an MFU of {ASSUMED_MFU:.0%}, "
            f"real {real}"
        )

    def write_validation(self, step: int, values: dict[str, float]) -> None:
        """Write the validation after `step`; the names get a prefix."""
        if self._is_writer:
            row = {f"validation/{name}": value for name, value in values.items()}
            self._write(self._validation_file, step, row)

    def _write(self, file: TextIO, step: int, values: dict[str, Any]) -> None:
        file.write(json.dumps({"step": step, **values}) + "\n")
        numbers = {name: value for name, value in values.items() if isinstance(value, (int, float))}
        if self._board:
            for name, value in numbers.items():
                self._board.add_scalar(board_tag(name), value, step)
        if self._wandb:
            self._wandb.log(numbers, step=step)

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if self._is_writer:
            self._file.close()
            self._validation_file.close()
            self._bar.close()
            if self._board:
                self._board.close()
            if self._wandb:
                self._wandb.finish(exit_code=0 if kind is None else 1)


def _write_settings(board: SummaryWriter, settings: str, step: int) -> None:
    """The stage's JSON as text, and its keys as hyperparameters beside the loss."""
    board.add_text("stage.json", f"```json\n{settings}\n```", step)
    for summary in hparams(dict(_flat(json.loads(settings))), {"loss/all": 0}):
        board.file_writer.add_summary(summary)


def _flat(fields: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in fields.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        elif isinstance(value, (bool, int, float, str)):
            yield prefix + key, value


def refuse_missing_wandb() -> None:
    """Raises InputError before minutes are spent on loading a model."""
    if os.environ.get(WANDB_VARIABLE) and find_spec("wandb") is None:
        raise InputError(
            f"{WANDB_VARIABLE} is set, but wandb is not installed: pip install wandb, or unset it"
        )


def _start_wandb(output: Path) -> Any:
    import wandb  # an optional extra

    id_file = output / "wandb-run-id"  # a resumed stage continues its W&B run
    if not id_file.is_file():
        write_atomically(id_file, uuid.uuid4().hex[:12])
    project, run_id = os.environ[WANDB_VARIABLE], id_file.read_text()
    return wandb.init(project=project, name=output.name, id=run_id, dir=str(output), resume="allow")


def _open_from(path: Path, first_step: int) -> TextIO:
    """Open for appending, after removing the lines of steps after `first_step`."""
    if path.is_file():
        kept = [line for row, line in _whole_lines(path) if row["step"] <= first_step]
        write_atomically(path, "".join(kept))
    return path.open("a", encoding="utf-8", buffering=1)


def _whole_lines(path: Path) -> list[tuple[dict[str, Any], str]]:
    """(parsed, line) of every line, except one that a crash truncated."""
    found = []
    for line in path.read_text().splitlines(keepends=True):
        try:
            found.append((parse_json(line, path), line))
        except InputError:
            continue
    return found


def read_metrics(output: Path, file: str = METRICS_FILE) -> list[dict[str, Any]]:
    """All records of metrics.jsonl, or validation.jsonl, except one that a crash truncated."""
    return [row for row, _ in _whole_lines(output / file)]


class SpikeDetector:
    """Finds losses more than 6 standard deviations (and 10 %) above the mean of the last 50.

    Spikes are left out of these 50, and the first 20 steps are never spikes. The window is limited
    because the steep fall of the first steps would otherwise hide spikes for hundreds of steps.
    """

    def __init__(self, memory: int = 50, factor: float = 6.0, num_quiet: int = 20) -> None:
        self._factor, self._num_quiet = factor, num_quiet
        self._losses: deque[float] = deque(maxlen=memory)

    def add(self, loss: float) -> bool:
        is_spike = False
        if len(self._losses) >= self._num_quiet:
            mean = statistics.fmean(self._losses)
            threshold = max(self._factor * statistics.pstdev(self._losses, mean), 0.1 * abs(mean))
            is_spike = loss - mean > threshold
        if not is_spike:  # a spike would hide the next one
            self._losses.append(loss)
        return is_spike


def peak_memory_bytes(device: torch.device) -> int:
    """This process's peak: device memory on a GPU, resident memory on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
