"""The metrics of one training stage on one self-contained HTML page: STAGE_FOLDER/report.html.

Loss (with the losses per token kind and source, and of the validation set), gradient norm, learning
rate, tokens per second, MFU, memory, where the time of a step goes, skipped steps and spikes. Works
while the stage is still running.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from beingvl.artefact.files import write_atomically
from beingvl.errors import InputError
from beingvl.report.kit import facts, whole_page
from beingvl.report.pictures import SERIES_COLOURS, running_mean, scale_by_range, set_title, to_svg
from beingvl.train.metrics import METRICS_FILE, VALIDATION_FILE, read_metrics

Row = Mapping[str, Any]
PHASES = (
    "data",
    "communication",
    "forward",
    "backward",
    "optimizer",
    "check",
    "log",
    "validation",
    "save",
)


def run(args: argparse.Namespace) -> None:
    folder = args.stage_folder
    if not (folder / METRICS_FILE).is_file():
        raise InputError(
            f"{folder} has no {METRICS_FILE}; give the output folder of `beingvl train`"
        )
    rows, validation, plan = read_stage(folder)
    if not rows:
        raise InputError(f"{folder / METRICS_FILE} holds no step yet")
    target = args.output_path or folder / "report.html"
    write_atomically(target, page(folder.name, rows, validation, plan))
    print(f"{target}: {len(rows)} steps")


def read_stage(folder: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]], str]:
    """Metrics, validation and the plan's table of a stage folder; empty where there is none."""
    rows, validation = (
        read_metrics(folder, name) if (folder / name).is_file() else []
        for name in (METRICS_FILE, VALIDATION_FILE)
    )
    plan = folder / "plan.txt"
    return rows, validation, plan.read_text() if plan.is_file() else ""


def page(name: str, rows: Sequence[Row], validation: Sequence[Row], plan: str) -> str:
    """HTML text of one stage; `rows` and `validation` are the lines of the metrics files."""
    return whole_page(f"{name}: training", section(name, rows, validation, plan))


def section(name: str, rows: Sequence[Row], validation: Sequence[Row], plan: str) -> str:
    """The same as a part of a page."""
    values = {"step": f"{rows[-1]['step']}", "last loss": f"{rows[-1]['loss']:.4f}"}
    values["tokens seen"] = f"{sum(row.get('tokens', 0) for row in rows):,}"
    for key, what, form in (
        ("tokens_per_second", "tokens/s (median)", ",.0f"),
        ("mfu", "MFU (median)", ".1%"),
    ):
        measured = [row[key] for row in rows if row.get(key)]
        if measured:
            values[what] = format(statistics.median(measured), form)
    values["peak memory"] = f"{max(row['peak_memory_bytes'] for row in rows) / 1e9:.2f} GB"
    parts = [
        facts(values),
        f"<h2>Curves</h2>{to_svg(curves(rows, validation), f'curves-{name}')}",
        f"<h2>Where the time goes</h2>{_time_table(rows)}",
        f"<h2>Skipped steps and spikes</h2>{_events_table(rows)}",
        f"<h2>What is trained</h2><pre>{escape(plan)}</pre>",
    ]
    return "\n".join(parts)


def curves(rows: Sequence[Row], validation: Sequence[Row]) -> Figure:
    """Six panels over the optimizer steps; losses thin, and their running means."""
    figure = Figure(figsize=(12, 9), layout="constrained")
    panels = figure.subplots(3, 2).ravel()
    groups = sorted({key for row in rows for key in row if key.startswith("loss/")})
    rates = sorted({key for row in rows for key in row if key.startswith("learning_rate")})
    contents: list[tuple[str, str, list[str], float]] = [
        ("Loss", "nats per target token", ["loss"], 1),
        ("Loss per kind and source", "nats per target token", groups, 1),
        ("Gradient norm", "before clipping", ["gradient_norm"], 1),
        ("Learning rate", "of the step", rates, 1),
        ("Speed", "tokens per second", ["tokens_per_second"], 1),
        ("Peak memory of rank 0", "GB", ["peak_memory_bytes"], 1e9),
    ]
    for axes, (title, unit, keys, divisor) in zip(panels, contents, strict=True):
        for key, colour in zip(keys, itertools.cycle(SERIES_COLOURS)):
            points = [(row["step"], row[key] / divisor) for row in rows if row.get(key) is not None]
            if points:
                steps, values = np.array(points, float).T
                if title.startswith("Loss"):
                    axes.plot(steps, values, linewidth=1, color=colour, alpha=0.25)
                    values = running_mean(values)
                axes.plot(
                    steps, values, linewidth=1.4, label=key.removeprefix("loss/"), color=colour
                )
        set_title(axes, title)
        axes.set(xlabel="optimizer step", ylabel=unit)
        if len(keys) > 1:
            axes.legend(fontsize=8)
        if title.startswith("Loss"):
            checked = [row["validation/loss"] for row in validation] if keys == ["loss"] else []
            scale_by_range(
                axes,
                checked + [row[key] for row in rows for key in keys if row.get(key) is not None],
            )
    if validation:
        steps, losses = (
            [row["step"] for row in validation],
            [row["validation/loss"] for row in validation],
        )
        panels[0].plot(steps, losses, "o-", label="validation", color=SERIES_COLOURS[1])
        panels[0].legend(fontsize=8)
    return figure


def _time_table(rows: Sequence[Row]) -> str:
    totals = {phase: sum(row.get(f"seconds_{phase}", 0.0) for row in rows) for phase in PHASES}
    whole = sum(totals.values()) or 1.0
    cells = "".join(
        f"<tr><td>{phase}</td><td>{seconds:.1f} s</td><td>{seconds / whole:.1%}</td></tr>"
        for phase, seconds in totals.items()
    )
    return f"<table><tr><th>phase</th><th>all steps</th><th>share</th></tr>{cells}</table>"


def _events_table(rows: Sequence[Row]) -> str:
    events = [row for row in rows if row.get("skipped") or row.get("spike")]
    if not events:
        return "<p class='soft'>None.</p>"
    cells = "".join(
        f"<tr><td>{row['step']}</td><td>{'skipped' if row.get('skipped') else 'spike'}</td><td>{row['loss']:.4f}</td>"
        f"<td>{escape(', '.join(row.get('sample_ids', [])))}</td></tr>"
        for row in events
    )
    return (
        "<table "
        f"class='words'><tr><th>step</th><th>what</th><th>loss</th><th>samples</th></tr>{cells}</table>"
    )
