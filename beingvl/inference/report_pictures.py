"""The pictures of a run's report, drawn with matplotlib's object interface: no global state, PNG bytes out.

contact_sheet(examples)                         image, reconstruction, token borders, question and answer
training_curves(metrics, accuracy, chance)      loss over steps, accuracy after each stage
"""

from __future__ import annotations

import io
import textwrap
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from beingvl.inference.report_quickstart import Example

RIGHT, WRONG, INK, GREY, BORDER = "#1a7f37", "#c62828", "#1f2328", "#6e7781", "#ffb000"
STAGE_COLOURS = ("#4477aa", "#228833", "#aa3377")
QUESTION_COLOURS = ("#1f2328", "#d97706", "#0891b2", "#9333ea", "#65a30d")
COLUMNS = 2


def to_png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    with warnings.catch_warnings():  # an answer in a script that the font lacks is drawn as boxes
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        figure.savefig(buffer, format="png", dpi=130, facecolor="white")
    return buffer.getvalue()


# ---- contact sheet ----


def contact_sheet(examples: Sequence[Example]) -> bytes:
    """Two columns of examples, each three pictures and a text."""
    num_rows = max(1, -(-len(examples) // COLUMNS))
    figure = Figure(figsize=(12.5, 1.45 * num_rows + 0.85))
    top = 1 - 0.68 / figure.get_figheight()
    outer = figure.add_gridspec(num_rows, COLUMNS, left=0.015, right=0.99, top=top, bottom=0.015, wspace=0.04, hspace=0.12)
    figure.text(
        0.015, 1 - 0.32 / figure.get_figheight(), "Held-out images and the model's answers", size=14, weight="bold", color=INK
    )
    for number, example in enumerate(examples):
        row, column = number % num_rows, number // num_rows
        inner = outer[row, column].subgridspec(1, 4, width_ratios=[1, 1, 1, 2.1], wspace=0.06)
        pictures = [figure.add_subplot(inner[0, index]) for index in range(3)]
        show_pictures(pictures, example, with_titles=row == 0)
        show_answer(figure.add_subplot(inner[0, 3]), example)
    return to_png(figure)


def show_pictures(axes: Sequence[Axes], example: Example, with_titles: bool) -> None:
    for picture in axes:
        picture.set_axis_off()
    axes[0].imshow(example.image, cmap="gray")
    axes[1].imshow(example.reconstruction)
    axes[2].imshow(example.reconstruction)
    axes[2].add_collection(LineCollection(token_borders(example), colors=BORDER, linewidths=0.9, capstyle="projecting"))
    if with_titles:
        for picture, title in zip(axes, ("image", "after the VQ-GAN", "its tokens"), strict=True):
            picture.set_title(title, size=9, color=GREY, pad=4)


def show_answer(axes: Axes, example: Example) -> None:
    axes.set_axis_off()
    colour = RIGHT if example.correct else WRONG
    answer = textwrap.shorten(example.answer, 24, placeholder="…") or "(nothing)"
    question = textwrap.fill(textwrap.shorten(example.question, 70, placeholder="…"), 30)
    axes.text(0.06, 0.92, question, size=11, color=INK, va="top")
    axes.text(0.06, 0.47, f"{'✓' if example.correct else '✗'} {answer}", size=14, weight="bold", color=colour, va="center")
    if not example.correct:
        axes.text(0.06, 0.24, f"truth: {textwrap.shorten(example.truth, 28, placeholder='…')}", size=11, color=INK, va="center")
    num_tokens = int(example.owners.max()) + 1
    axes.text(0.06, 0.02, f"{example.owners.size} codes in {num_tokens} tokens", size=8.5, color=GREY, va="bottom")


def token_borders(example: Example) -> list[list[tuple[float, float]]]:
    """Line segments, in pixels of the reconstruction, between cells of different tokens, and the frame."""
    height, width = example.owners.shape
    y_scale, x_scale = example.reconstruction.shape[0] / height, example.reconstruction.shape[1] / width
    padded = np.pad(example.owners, 1, constant_values=-1)
    segments = []
    for y, x in np.argwhere(padded[1:-1, 1:] != padded[1:-1, :-1]):
        segments.append([(x * x_scale - 0.5, y * y_scale - 0.5), (x * x_scale - 0.5, (y + 1) * y_scale - 0.5)])
    for y, x in np.argwhere(padded[1:, 1:-1] != padded[:-1, 1:-1]):
        segments.append([(x * x_scale - 0.5, y * y_scale - 0.5), ((x + 1) * x_scale - 0.5, y * y_scale - 0.5)])
    return segments


# ---- training ----


def training_curves(
    metrics: Mapping[str, Sequence[Mapping[str, Any]]], accuracy: Mapping[str, Mapping[str, float]], chance: Mapping[str, float]
) -> bytes:
    """Left: loss over the steps of all stages, one after another. Right: accuracy of each question after each stage."""
    figure = Figure(figsize=(12, 4.2), layout="constrained")
    losses, scores = figure.subplots(1, 2, width_ratios=[1.5, 1])
    draw_losses(losses, metrics)
    draw_accuracy(scores, accuracy, chance)
    for axes in (losses, scores):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#e5e7eb")
        axes.set_axisbelow(True)
    return to_png(figure)


def set_title(axes: Axes, text: str) -> None:
    axes.set_title(text, loc="left", size=12, weight="bold", color=INK)


def draw_losses(axes: Axes, metrics: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    set_title(axes, "Training loss")
    axes.set_xlabel("optimizer step, all stages one after another")
    axes.set_ylabel("loss (nats per target token)")
    first_step = 0
    for (stage, rows), colour in zip(metrics.items(), STAGE_COLOURS, strict=False):
        steps = first_step + np.array([row["step"] for row in rows])
        values = np.array([row["loss"] for row in rows], float)
        axes.plot(steps, values, color=colour, alpha=0.25, linewidth=1)
        axes.plot(steps, running_mean(values), color=colour, linewidth=2)
        axes.text(
            steps.mean(), 0.97, stage, color=colour, weight="bold", ha="center", va="top", transform=axes.get_xaxis_transform()
        )
        first_step = int(steps[-1])
        if stage != list(metrics)[-1]:
            axes.axvline(first_step, color=GREY, linewidth=0.8, linestyle=":")
    axes.set_ylim(0, 1.1 * axes.get_ylim()[1])  # room for the stages' names
    axes.margins(x=0.01)


def running_mean(values: np.ndarray) -> np.ndarray:
    """Mean over a centred window of a twentieth of the curve; shorter at its ends."""
    half = len(values) // 40
    return np.array([np.nanmean(values[max(0, n - half) : n + half + 1]) for n in range(len(values))])


def draw_accuracy(axes: Axes, accuracy: Mapping[str, Mapping[str, float]], chance: Mapping[str, float]) -> None:
    set_title(axes, "Test accuracy after each stage")
    axes.set_ylabel("share of right answers (%)")
    positions = np.arange(len(accuracy))
    for (question, by_chance), colour in zip(chance.items(), QUESTION_COLOURS, strict=False):
        values = [100 * accuracy[stage][question] for stage in accuracy]
        axes.plot(positions, values, color=colour, marker="o", linewidth=2, label=question)
        axes.axhline(100 * by_chance, color=colour, linewidth=0.9, linestyle="--", alpha=0.6)
    axes.set_xticks(positions, list(accuracy))
    axes.set_ylim(-3, 103)
    legend = axes.legend(fontsize=9, loc="upper left", title="dashed: chance", title_fontsize=9, alignment="left")
    legend.get_frame().set(edgecolor="none", alpha=1)
