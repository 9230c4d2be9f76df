"""The page of one training stage: STAGE_FOLDER/report.html. Works while the stage is running.

read_stage      metrics, validation and plan, as far as they exist
train_section   curves, times, skipped steps and spikes, plan
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from beingvl.artefact.files import write_atomically
from beingvl.errors import InputError
from beingvl.report.kit import INK, SERIES_COLOURS, chart, page, render
from beingvl.train.metrics import METRICS_FILE, STAGE_FILE, VALIDATION_FILE, read_metrics
from beingvl.train.phases import STEP_PHASES

PHASES = (*STEP_PHASES, "validation", "save")
LOG_SCALE_FROM = 20
"""On a linear axis, a loss that falls by more than this factor would look flat."""


def report_train(stage_folder: Path | str, *, output_path: Path | str | None = None) -> Path:
    """Write the page of a stage's output folder, by default STAGE_FOLDER/report.html; returns its
    path. Raises InputError if the folder has no step.
    """
    stage_folder = Path(stage_folder)
    if not (stage_folder / METRICS_FILE).is_file():
        raise InputError(
            f"{stage_folder} has no {METRICS_FILE}; give the output folder of `beingvl train`"
        )
    stage = read_stage(stage_folder)
    if not stage.rows:
        raise InputError(f"{stage_folder / METRICS_FILE} holds no step yet")
    target = Path(output_path or stage_folder / "report.html")
    name = stage_folder.resolve().name
    write_atomically(target, page(f"{name}: training", train_section(stage, name)))
    print(f"{target}: {len(stage.rows)} steps")
    return target


@dataclass(frozen=True)
class TrainedStage:
    """The metrics files' records, the freezer's plan as a text table, and the stage's JSON."""

    rows: list[dict[str, Any]]
    validation: list[dict[str, Any]]
    plan: str
    settings: str = ""


def read_stage(folder: Path) -> TrainedStage:
    """The contents of a stage folder; empty where a file is missing."""
    rows, validation = (
        read_metrics(folder, name) if (folder / name).is_file() else []
        for name in (METRICS_FILE, VALIDATION_FILE)
    )
    plan, settings = (
        path.read_text() if path.is_file() else ""
        for path in (folder / "plan.txt", folder / STAGE_FILE)
    )
    return TrainedStage(rows, validation, plan, settings)


def train_section(stage: TrainedStage, name: str, level: int = 2) -> Markup:
    """The page's content, with headings of `level`."""
    rows = stage.rows
    return render(
        "train.html",
        level=level,
        stage=stage,
        curves=chart(curves(stage), f"curves-{name}"),
        tokens=sum(row.get("tokens", 0) for row in rows),
        speed=_median(rows, "tokens_per_second"),
        mfu=_median(rows, "mfu"),
        peak_memory_bytes=max(row["peak_memory_bytes"] for row in rows),
        seconds={phase: sum(row.get(f"seconds_{phase}", 0.0) for row in rows) for phase in PHASES},
        events=[row for row in rows if row.get("skipped") or row.get("spike")],
    )


def _median(rows: Sequence[Mapping[str, Any]], key: str) -> float | None:
    measured = [row[key] for row in rows if row.get(key)]
    return statistics.median(measured) if measured else None


# ---- curves ----


def curves(stage: TrainedStage) -> Figure:
    """Six panels over the optimizer steps; losses as thin lines, with their running means."""
    rows = stage.rows
    figure = Figure(figsize=(10, 8.5), layout="constrained")
    loss, losses, norm, rate, speed, memory = figure.subplots(3, 2).ravel()
    groups = sorted({key for row in rows for key in row if key.startswith("loss/")})
    rates = sorted({key for row in rows for key in row if key.startswith("learning_rate")})
    _draw_panel(loss, rows, ["loss"], "Loss", "nats per target token")
    _draw_panel(losses, rows, groups, "Loss per kind and source", "nats per target token")
    _draw_panel(norm, rows, ["gradient_norm"], "Gradient norm", "before clipping")
    _draw_panel(rate, rows, rates, "Learning rate", "of the step")
    _draw_panel(speed, rows, ["tokens_per_second"], "Speed", "tokens per second")
    in_gigabytes = [{**row, "memory": row["peak_memory_bytes"] / 1e9} for row in rows]
    _draw_panel(memory, in_gigabytes, ["memory"], "Peak memory of rank 0", "GB")
    checked = [row["validation/loss"] for row in stage.validation]
    if checked:
        steps = [row["step"] for row in stage.validation]
        loss.plot(steps, checked, "o-", label="validation", color=SERIES_COLOURS[1])
        loss.legend(fontsize=8)
    scale_by_range(loss, checked + [row["loss"] for row in rows])
    scale_by_range(losses, [row[key] for row in rows for key in groups if row.get(key) is not None])
    return figure


def _draw_panel(
    axes: Axes, rows: Sequence[Mapping[str, Any]], keys: Sequence[str], title: str, unit: str
) -> None:
    for key, colour in zip(keys, itertools.cycle(SERIES_COLOURS)):
        points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
        if points:
            steps, values = np.array(points, float).T
            if title.startswith("Loss"):
                axes.plot(steps, values, linewidth=1, color=colour, alpha=0.25)
                values = running_mean(values)
            look: dict[str, Any] = {
                "linewidth": 1.4,
                "color": colour,
                "marker": "o" if len(steps) < 3 else "",
            }
            axes.plot(steps, values, label=key.removeprefix("loss/"), **look)
    set_title(axes, title)
    axes.set(xlabel="optimizer step", ylabel=unit)
    if len(keys) > 1:
        axes.legend(fontsize=8)


def set_title(axes: Axes, text: str) -> None:
    axes.set_title(text, loc="left", size=12, weight="bold", color=INK)


def scale_by_range(axes: Axes, values: Sequence[float]) -> None:
    """A logarithmic axis if the largest value exceeds LOG_SCALE_FROM times the smallest (> 0)."""
    finite = np.array(values, float)
    finite = finite[np.isfinite(finite)]
    if len(finite) and finite.max() > LOG_SCALE_FROM * finite.min() > 0:
        axes.set_yscale("log")
        axes.set_ylim(finite.min() * 0.8, finite.max() * 1.25)
        ticks = (1, 2, 5) if finite.max() < 1000 * finite.min() else (1,)
        axes.yaxis.set_major_locator(LogLocator(subs=ticks))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("")


def running_mean(values: np.ndarray) -> np.ndarray:
    """Mean over a centred window of a twentieth of the curve; the window shrinks at the ends."""
    half = len(values) // 40
    windows = (values[max(0, n - half) : n + half + 1] for n in range(len(values)))
    return np.array(
        [np.nan if np.isnan(window).all() else np.nanmean(window) for window in windows]
    )
