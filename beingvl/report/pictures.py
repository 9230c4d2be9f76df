"""The pictures of a run's report, drawn with matplotlib's object interface: no global state,
figures out.

contact_sheet(examples)                         image, reconstruction, token borders, question
                                                and answer
training_curves(metrics, summary)               loss over steps, accuracy after each stage

to_png(figure)    a file, on white
to_svg(figure)    a part of a page, in the colours of the page's theme
"""

from __future__ import annotations

import io
import itertools
import textwrap
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import LogLocator

from beingvl.report.run_pieces import Example
from beingvl.report.vbpe import chart_svg

RIGHT, WRONG, INK, GREY, GRID, BORDER = (
    "#1a7f37",
    "#c62828",
    "#1f2328",
    "#6e7781",
    "#e5e7eb",
    "#ffb000",
)
THEME = {RIGHT: "right", WRONG: "wrong", INK: "ink", GREY: "soft", GRID: "line", "#ffffff": "paper"}
"""Colour in a figure -> name of the page's colour that replaces it."""
SERIES_COLOURS = (
    "#4a8fd8",
    "#d97706",
    "#2fa34a",
    "#c2519c",
    "#0e9bb5",
    "#9370db",
)  # readable on white and on black
LINE_STYLES = ("-", "--", "-.")
MARKERS = ("o", "s", "^", "D", "v", "P")
COLUMNS = 2
LOG_SCALE_FROM = 20  # a loss that falls by more than this factor would lie flat on its axis


def to_png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    with warnings.catch_warnings():  # an answer in a script that the font lacks is drawn as boxes
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        figure.savefig(buffer, format="png", dpi=130, facecolor="white")
    return buffer.getvalue()


def to_svg(figure: Figure, name: str) -> str:
    """SVG text to put into a page with the colours of `report_page.STYLE`; `name` makes the ids
    in it its own.
    """
    for text in figure.findobj(Text):
        if text.get_color() == "black":
            text.set_color(INK)
    for axes in figure.axes:
        axes.tick_params(colors=INK)
        axes.spines[:].set_color(GREY)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        svg = chart_svg(figure, name)
    for colour, variable in THEME.items():
        svg = svg.replace(colour, f"var(--{variable})")
    return svg


# ---- contact sheet ----


def contact_sheet(examples: Sequence[Example]) -> Figure:
    """Two columns of examples, each three pictures and a text."""
    num_rows = max(1, -(-len(examples) // COLUMNS))
    figure = Figure(figsize=(12.5, 1.45 * num_rows + 0.85))
    top = 1 - 0.68 / figure.get_figheight()
    outer = figure.add_gridspec(
        num_rows, COLUMNS, left=0.015, right=0.99, top=top, bottom=0.015, wspace=0.04, hspace=0.12
    )
    figure.text(
        0.015,
        1 - 0.32 / figure.get_figheight(),
        "Held-out images and the model's answers",
        size=14,
        weight="bold",
        color=INK,
    )
    for number, example in enumerate(examples):
        row, column = number % num_rows, number // num_rows
        inner = outer[row, column].subgridspec(1, 4, width_ratios=[1, 1, 1, 2.1], wspace=0.06)
        pictures = [figure.add_subplot(inner[0, index]) for index in range(3)]
        show_pictures(pictures, example, with_titles=row == 0)
        show_answer(figure.add_subplot(inner[0, 3]), example)
    return figure


def show_pictures(axes: Sequence[Axes], example: Example, with_titles: bool) -> None:
    for picture in axes:
        picture.set_axis_off()
    axes[0].imshow(example.image)
    axes[1].imshow(example.reconstruction)
    axes[2].imshow(example.reconstruction)
    axes[2].add_collection(
        LineCollection(token_borders(example), colors=BORDER, linewidths=0.9, capstyle="projecting")
    )
    if with_titles:
        for picture, title in zip(axes, ("image", "after the VQ-GAN", "its tokens"), strict=True):
            picture.set_title(title, size=9, color=GREY, pad=4)


def show_answer(axes: Axes, example: Example) -> None:
    axes.set_axis_off()
    colour = RIGHT if example.correct else WRONG
    answer = textwrap.shorten(example.answer, 24, placeholder="…") or "(nothing)"
    question = textwrap.fill(textwrap.shorten(example.question, 70, placeholder="…"), 30)
    axes.text(0.06, 0.92, question, size=11, color=INK, va="top")
    axes.text(
        0.06,
        0.47,
        f"{'✓' if example.correct else '✗'} {answer}",
        size=14,
        weight="bold",
        color=colour,
        va="center",
    )
    if not example.correct:
        axes.text(
            0.06,
            0.24,
            f"truth: {textwrap.shorten(example.truth, 28, placeholder='…')}",
            size=11,
            color=INK,
            va="center",
        )
    num_tokens = int(example.owners.max()) + 1
    axes.text(
        0.06,
        0.02,
        f"{example.owners.size} codes in {num_tokens} tokens",
        size=8.5,
        color=GREY,
        va="bottom",
    )


def token_borders(example: Example) -> list[list[tuple[float, float]]]:
    """Line segments, in pixels of the reconstruction, between cells of different tokens, and the
    frame.
    """
    height, width = example.owners.shape
    y_scale, x_scale = (
        example.reconstruction.shape[0] / height,
        example.reconstruction.shape[1] / width,
    )
    padded = np.pad(example.owners, 1, constant_values=-1)
    segments = []
    for y, x in np.argwhere(padded[1:-1, 1:] != padded[1:-1, :-1]):
        segments.append(
            [(x * x_scale - 0.5, y * y_scale - 0.5), (x * x_scale - 0.5, (y + 1) * y_scale - 0.5)]
        )
    for y, x in np.argwhere(padded[1:, 1:-1] != padded[:-1, 1:-1]):
        segments.append(
            [(x * x_scale - 0.5, y * y_scale - 0.5), ((x + 1) * x_scale - 0.5, y * y_scale - 0.5)]
        )
    return segments


# ---- training ----


def training_curves(
    metrics: Mapping[str, Sequence[Mapping[str, Any]]], summary: Mapping[str, Any]
) -> Figure:
    """Left: loss over the steps of all stages, one after another. Right: accuracy after each, of
    a few questions.
    """
    figure = Figure(figsize=(12, 4.2), layout="constrained")
    if summary["test_accuracy"]:
        losses, scores = figure.subplots(1, 2, width_ratios=[1.5, 1])
        draw_accuracy(scores, summary["test_accuracy"], summary["chance"])
    else:
        losses = figure.subplots()
    draw_losses(losses, metrics)
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color=GRID)
        axes.set_axisbelow(True)
    return figure


def set_title(axes: Axes, text: str) -> None:
    axes.set_title(text, loc="left", size=12, weight="bold", color=INK)


def draw_losses(axes: Axes, metrics: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    set_title(axes, "Training loss")
    axes.set_xlabel("optimizer step, all stages one after another")
    axes.set_ylabel("loss (nats per target token)")
    first_step = 0
    for (stage, rows), colour in zip(metrics.items(), itertools.cycle(SERIES_COLOURS)):
        steps = first_step + np.array([row["step"] for row in rows])
        values = np.array([row["loss"] for row in rows], float)
        axes.plot(steps, values, color=colour, alpha=0.25, linewidth=1)
        axes.plot(steps, running_mean(values), color=colour, linewidth=2, label=stage)
        first_step = int(steps[-1])
        if stage != list(metrics)[-1]:
            axes.axvline(first_step, color=GREY, linewidth=0.8, linestyle=":")
    axes.set_ylim(0)
    scale_by_range(axes, [row["loss"] for rows in metrics.values() for row in rows])
    axes.margins(x=0.01)
    if metrics:
        axes.legend(fontsize=9, loc="upper right", frameon=False)


def scale_by_range(axes: Axes, values: Sequence[float]) -> None:
    """A logarithmic axis for values, all positive, of which the largest is LOG_SCALE_FROM times
    the smallest.
    """
    finite = np.array(values, float)
    finite = finite[np.isfinite(finite)]
    if len(finite) and finite.max() > LOG_SCALE_FROM * finite.min() > 0:
        axes.set_yscale("log")
        axes.set_ylim(finite.min() * 0.8, finite.max() * 1.25)
        axes.yaxis.set_major_locator(
            LogLocator(subs=(1, 2, 5) if finite.max() < 1000 * finite.min() else (1,))
        )
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("")


def running_mean(values: np.ndarray) -> np.ndarray:
    """Mean over a centred window of a twentieth of the curve; shorter at its ends."""
    half = len(values) // 40
    windows = (values[max(0, n - half) : n + half + 1] for n in range(len(values)))
    return np.array(
        [np.nan if np.isnan(window).all() else np.nanmean(window) for window in windows]
    )


def draw_accuracy(
    axes: Axes, accuracy: Mapping[str, Mapping[str, float]], chance: Mapping[str, float]
) -> None:
    set_title(axes, "Test accuracy after each stage")
    axes.set_ylabel("share of right answers (%)")
    positions = np.arange(len(accuracy))
    looks = zip((INK, *SERIES_COLOURS[1:]), itertools.cycle(LINE_STYLES), MARKERS)
    for number, ((question, by_chance), (colour, line, marker)) in enumerate(
        zip(chance.items(), looks, strict=False)
    ):
        values = [100 * accuracy[stage][question] for stage in accuracy]
        label = textwrap.shorten(question, 40, placeholder="…")
        size = max(
            10 - 2 * number, 3
        )  # equal curves: the one below shows around the markers and between the dashes
        axes.plot(
            positions,
            values,
            color=colour,
            linestyle=line,
            marker=marker,
            markersize=size,
            linewidth=2,
            label=label,
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
