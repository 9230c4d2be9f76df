"""The page of a run, with one part for each of its pieces (run.html)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure

from beingvl.data.arrow_shards import ShardReader
from beingvl.report.data import data_section
from beingvl.report.kit import chart, page, render
from beingvl.report.run_charts import TOKENS_SIDE, pictures_of
from beingvl.report.run_pieces import Example, Run, choose_wrong, confusions
from beingvl.report.train import train_section
from beingvl.report.vbpe import measure_grids, vbpe_section
from beingvl.report.vbpe_pictures import draw_charts, draw_pictures

VARIANT_NAMES = {"vbpe": "vBPE tokens", "raw": "plain codes"}


def run_page(
    name: str,
    pieces: Run,
    summary: Mapping[str, Any],
    examples: Sequence[Example],
    charts: Mapping[str, Figure],
) -> str:
    """The HTML page of a run called `name`; of `charts` it needs "training"."""
    asked = f"{summary['test_questions']} questions about {summary['test_images']} images"
    body = render(
        "run.html",
        facts=run_facts(summary),
        summary=summary,
        examples=[(example, _shown(example)) for example in examples],
        wrong=[(example, _shown(example)) for example in choose_wrong(pieces)],
        confusions=confusions(pieces.predictions),
        training=chart(charts["training"], "training"),
        stages={name: train_section(stage, name, 3) for name, stage in pieces.stages.items()},
        settings={name: stage.settings for name, stage in pieces.stages.items() if stage.settings},
        vbpe=_vbpe_section(pieces),
        data={
            str(path): data_section(ShardReader(path), pieces.data_options, 4)
            for path in pieces.shards
        },
        missing=pieces.missing,
    )
    return page(f"Being-VL: {name}", body, asked if summary["test_accuracy"] else "")


def _shown(example: Example) -> dict[str, np.ndarray]:
    """An example's pictures, no larger than displayed."""
    steps = {title: -(-len(one) // TOKENS_SIDE) for title, one in pictures_of(example).items()}
    return {
        title: one[:: steps[title], :: steps[title]] for title, one in pictures_of(example).items()
    }


def run_facts(summary: Mapping[str, Any]) -> dict[str, str]:
    values = {}
    if summary["test_accuracy"]:
        last, chance = list(summary["test_accuracy"])[-1], summary["chance"].values()
        values[f"mean accuracy after {last}"] = f"{summary['test_accuracy_mean']:.1%}"
        values["chance"] = f"{sum(chance) / len(chance):.1%}"
    if summary["vbpe_compression"]:
        values["codes per token"] = f"{summary['vbpe_compression']:.2f}"
    for variant, value in summary["test_accuracy_mean_of_variant"].items():
        if variant != summary["variant"]:
            values[f"the same, trained on {VARIANT_NAMES[variant]}"] = f"{value:.1%}"
    if summary["wall_seconds"]:
        minutes, seconds = divmod(round(summary["wall_seconds"]), 60)
        values["wall time"] = f"{minutes} min {seconds:02d} s"
    if summary["peak_memory_bytes"]:
        values["peak memory"] = f"{summary['peak_memory_bytes'] / 1e9:.2f} GB"
    values["on disk"] = f"{summary['bytes_on_disk'] / 1e9:.2f} GB"
    if summary["made"]:
        values["newest artefact"] = summary["made"][-1]["finished"]
    return values


def _vbpe_section(pieces: Run) -> Markup | None:
    vbpe, codes = pieces.vbpe, pieces.codes
    if vbpe is None:
        return None
    sample = measure_grids(vbpe, codes) if codes is not None else None
    pictures = draw_pictures(vbpe, sample, pieces.data_options.vqgan)
    return vbpe_section(vbpe, sample, pictures, draw_charts(vbpe, sample), 3)
