"""The metrics of one training stage on one self-contained HTML page: STAGE_FOLDER/report.html.

Loss (with the losses per token kind and source, and of the validation set), gradient norm, learning rate, tokens per second,
MFU, memory, where the time of a step goes, skipped steps and spikes. Works while the stage is still running.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

PHASES = ("data", "communication", "forward", "backward", "optimizer", "check", "log", "validation", "save")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("stage_folder", type=Path, help="output folder of `beingvl train`")
    parser.add_argument("--output_path", type=Path, help="page to write; default: STAGE_FOLDER/report.html")


def run(args: argparse.Namespace) -> None:
    from beingvl.errors import InputError
    from beingvl.manifest import write_atomically
    from beingvl.train.metrics import METRICS_FILE, VALIDATION_FILE, read_metrics

    folder = args.stage_folder
    if not (folder / METRICS_FILE).is_file():
        raise InputError(f"{folder} has no {METRICS_FILE}; give the output folder of `beingvl train`")
    rows = read_metrics(folder)
    if not rows:
        raise InputError(f"{folder / METRICS_FILE} holds no step yet")
    validation = read_metrics(folder, VALIDATION_FILE) if (folder / VALIDATION_FILE).is_file() else []
    plan = (folder / "plan.txt").read_text() if (folder / "plan.txt").is_file() else ""
    target = args.output_path or folder / "report.html"
    write_atomically(target, page(folder.name, rows, validation, plan))
    print(f"{target}: {len(rows)} steps")


def page(name: str, rows: Sequence[Mapping[str, Any]], validation: Sequence[Mapping[str, Any]], plan: str) -> str:
    """HTML text of one stage; `rows` and `validation` are the lines of the metrics files."""
    from html import escape

    from beingvl.inference.report_page import STYLE, picture

    last = rows[-1]
    values = {"step": f"{last['step']}", "last loss": f"{last['loss']:.4f}", "tokens seen": f"{sum(r['tokens'] for r in rows):,}"}
    values["tokens/s (median)"] = f"{_median([row['tokens_per_second'] for row in rows]):,.0f}"
    utilisations = [row["mfu"] for row in rows if row.get("mfu")]
    if utilisations:
        values["MFU (median)"] = f"{_median(utilisations):.1%}"
    values["peak memory"] = f"{max(row['peak_memory_bytes'] for row in rows) / 1e9:.2f} GB"
    facts = "".join(f"<div><b>{value}</b><span class='soft'>{key}</span></div>" for key, value in values.items())
    parts = [
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>",
        f"<title>{escape(name)}: training</title><meta name='viewport' content='width=device-width, initial-scale=1'>",
        f"<style>{STYLE}</style></head><body><h1>{escape(name)}: training</h1><div class='facts'>{facts}</div>",
        f"<h2>Curves</h2>{picture(curves(rows, validation), 'loss, gradient norm, learning rate, speed, memory')}",
        f"<h2>Where the time goes</h2>{_time_table(rows)}",
        f"<h2>Skipped steps and spikes</h2>{_events_table(rows)}",
        f"<h2>What is trained</h2><pre style='overflow-x: auto'>{escape(plan)}</pre></body></html>\n",
    ]
    return "\n".join(parts)


def curves(rows: Sequence[Mapping[str, Any]], validation: Sequence[Mapping[str, Any]]) -> bytes:
    """PNG of six panels."""
    from matplotlib.figure import Figure

    from beingvl.inference.report_pictures import to_png

    figure = Figure(figsize=(12, 9), layout="constrained")
    panels = figure.subplots(3, 2).ravel()
    groups = sorted({key for row in rows for key in row if key.startswith("loss/")})
    contents: list[tuple[str, list[str]]] = [
        ("loss (nats per target token)", ["loss"]),
        ("loss per kind and source", groups),
        ("gradient norm", ["gradient_norm"]),
        ("learning rate", sorted({key for row in rows for key in row if key.startswith("learning_rate")})),
        ("tokens per second", ["tokens_per_second"]),
        ("peak memory (bytes)", ["peak_memory_bytes"]),
    ]
    for axes, (title, keys) in zip(panels, contents, strict=True):
        for key in keys:
            points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
            axes.plot(*zip(*points, strict=True), linewidth=1, label=key.removeprefix("loss/"))
        axes.set_title(title, loc="left", size=11)
        axes.set_xlabel("step")
        if len(keys) > 1:
            axes.legend(fontsize=8)
    if validation:
        panels[0].plot(
            [row["step"] for row in validation], [row["validation/loss"] for row in validation], "o-", label="validation"
        )
        panels[0].legend(fontsize=8)
    return to_png(figure)


def _time_table(rows: Sequence[Mapping[str, Any]]) -> str:
    totals = {phase: sum(row.get(f"seconds_{phase}", 0.0) for row in rows) for phase in PHASES}
    whole = sum(totals.values()) or 1.0
    cells = "".join(
        f"<tr><td>{phase}</td><td>{seconds:.1f} s</td><td>{seconds / whole:.1%}</td></tr>" for phase, seconds in totals.items()
    )
    return f"<table><tr><th>phase</th><th>all steps</th><th>share</th></tr>{cells}</table>"


def _events_table(rows: Sequence[Mapping[str, Any]]) -> str:
    from html import escape

    events = [row for row in rows if row.get("skipped") or row.get("spike")]
    if not events:
        return "<p class='soft'>None.</p>"
    cells = "".join(
        f"<tr><td>{row['step']}</td><td>{'skipped' if row['skipped'] else 'spike'}</td><td>{row['loss']:.4f}</td>"
        f"<td>{escape(', '.join(row.get('sample_ids', [])))}</td></tr>"
        for row in events
    )
    return f"<table class='words'><tr><th>step</th><th>what</th><th>loss</th><th>samples</th></tr>{cells}</table>"


def _median(values: Sequence[float]) -> float:
    import statistics

    return statistics.median(values)
