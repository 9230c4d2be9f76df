"""The pictures of a run: a contact sheet of answers, and loss and accuracy over its stages."""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from beingvl.images.pictures import with_borders
from beingvl.report.kit import GREY, GRID, INK, RIGHT, SERIES_COLOURS, WRONG
from beingvl.report.run_pieces import Example
from beingvl.report.train import TrainedStage, running_mean, scale_by_range, set_title

LINE_STYLES = ("-", "--", "-.")
MARKERS = ("o", "s", "^", "D", "v", "P")
COLUMNS = 2
TOKENS_SIDE = 240  # pixels of a picture with token borders, which are two pixels wide

# ---- contact sheet ----


def contact_sheet(examples: Sequence[Example]) -> Figure:
    """Two columns of examples, each three pictures and a text."""
    num_rows = -(-len(examples) // COLUMNS)
    height = 1.45 * num_rows + 0.85
    figure = Figure(figsize=(12.5, height))
    top = 1 - 0.68 / height
    outer = figure.add_gridspec(
        num_rows, COLUMNS, left=0.015, right=0.99, top=top, bottom=0.015, wspace=0.04, hspace=0.12
    )
    title = "Images and the model's answers"
    figure.text(0.015, 1 - 0.32 / height, title, size=14, weight="bold", color=INK)
    for number, example in enumerate(examples):
        row, column = number % num_rows, number // num_rows
        inner = outer[row, column].subgridspec(1, 4, width_ratios=[1, 1, 1, 2.1], wspace=0.06)
        axes = [figure.add_subplot(inner[0, index]) for index in range(4)]
        for one in axes:
            one.set_axis_off()
        _show_pictures(axes[:3], example, with_titles=row == 0)
        _show_answer(axes[3], example)
    return figure


def pictures_of(example: Example) -> dict[str, np.ndarray]:
    """The pictures shown for an example: title -> `[H, W, 3]` uint8."""
    tokens = with_borders(example.reconstruction, example.owners, TOKENS_SIDE, thickness=2)
    return {
        "image": example.image,
        "after the VQ-GAN": example.reconstruction,
        "its tokens": tokens,
    }


def _show_pictures(axes: Sequence[Axes], example: Example, with_titles: bool) -> None:
    for one, (title, picture) in zip(axes, pictures_of(example).items(), strict=True):
        one.imshow(picture)
        if with_titles:
            one.set_title(title, size=9, color=GREY, pad=4)


def _show_answer(axes: Axes, example: Example) -> None:
    answer = textwrap.shorten(example.answer, 24, placeholder="…") or "(nothing)"
    verdict = f"{'✓' if example.correct else '✗'} {answer}"
    question = textwrap.fill(textwrap.shorten(example.question, 70, placeholder="…"), 30)
    colour = RIGHT if example.correct else WRONG
    axes.text(0.06, 0.92, question, size=11, color=INK, va="top")
    axes.text(0.06, 0.47, verdict, size=14, weight="bold", color=colour, va="center")
    if not example.correct:
        truth = f"truth: {textwrap.shorten(example.truth, 28, placeholder='…')}"
        axes.text(0.06, 0.24, truth, size=11, color=INK, va="center")
    num_tokens = int(example.owners.max()) + 1
    count = f"{example.owners.size} codes in {num_tokens} tokens"
    axes.text(0.06, 0.02, count, size=8.5, color=GREY, va="bottom")


# ---- training ----


def training_curves(stages: Mapping[str, TrainedStage], summary: Mapping[str, Any]) -> Figure:
    """Left: loss over the steps of all stages. Right: accuracy after each, for a few questions."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    if summary["test_accuracy"]:
        losses, scores = figure.subplots(1, 2, width_ratios=[1.2, 1])
        _draw_accuracy(scores, summary["test_accuracy"], summary["chance"])
    else:
        losses = figure.subplots()
    _draw_losses(losses, stages)
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color=GRID)
        axes.set_axisbelow(True)
    return figure


def _draw_losses(axes: Axes, stages: Mapping[str, TrainedStage]) -> None:
    set_title(axes, "Training loss")
    axes.set_xlabel("optimizer step, all stages one after another")
    axes.set_ylabel("loss (nats per target token)")
    first_step = 0
    for (name, stage), colour in zip(stages.items(), itertools.cycle(SERIES_COLOURS)):
        if first_step:
            axes.axvline(first_step, color=GREY, linewidth=0.8, linestyle=":")
        steps = first_step + np.array([row["step"] for row in stage.rows])
        values = np.array([row["loss"] for row in stage.rows], float)
        axes.plot(steps, values, color=colour, alpha=0.25, linewidth=1)
        axes.plot(steps, running_mean(values), color=colour, linewidth=2, label=name)
        first_step = int(steps[-1])
    axes.set_ylim(0)
    scale_by_range(axes, [row["loss"] for stage in stages.values() for row in stage.rows])
    axes.margins(x=0.01)
    if stages:
        axes.legend(fontsize=9, loc="upper right", frameon=False)


def _draw_accuracy(
    axes: Axes, accuracy: Mapping[str, Mapping[str, float]], chance: Mapping[str, float]
) -> None:
    set_title(axes, "Test accuracy after each stage")
    axes.set_ylabel("correct answers (%)")
    positions = np.arange(len(accuracy))
    looks = zip((INK, *SERIES_COLOURS[1:]), itertools.cycle(LINE_STYLES), MARKERS)
    for number, ((question, by_chance), (colour, line, marker)) in enumerate(
        zip(chance.items(), looks, strict=False)
    ):
        axes.plot(
            positions,
            [100 * scores[question] for scores in accuracy.values()],
            color=colour,
            linestyle=line,
            marker=marker,
            # If curves coincide, the lower one shows around the markers and between the dashes.
            markersize=max(10 - 2 * number, 3),
            linewidth=2,
            label=textwrap.shorten(question, 40, placeholder="…"),
        )
        axes.axhline(100 * by_chance, color=colour, linewidth=0.9, linestyle=":", alpha=0.6)
    axes.set_xticks(positions, list(accuracy))
    axes.set_ylim(-3, 103)
    axes.legend(
        fontsize=9,
        loc="upper left",
        title="thin, dotted: chance",
        title_fontsize=9,
        alignment="left",
        frameon=False,
    )
