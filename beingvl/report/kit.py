"""Building blocks of all pages: templates (*.html) and their style (kit.css), pictures, charts.

Everything that is not `Markup` is text, and is escaped.
"""

from __future__ import annotations

import base64
import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text

from beingvl.images.pictures import to_png

INK, GREY, GRID, RIGHT, WRONG = "#1f2328", "#6e7781", "#e5e7eb", "#1a7f37", "#c62828"
THEME = {RIGHT: "right", WRONG: "wrong", INK: "ink", GREY: "soft", GRID: "line", "#ffffff": "paper"}
"""Colour in a chart -> name of the page colour that replaces it."""
SERIES_COLOURS = ("#4a8fd8", "#d97706", "#2fa34a", "#c2519c", "#0e9bb5", "#9370db")
"""Readable on white and on black."""


# ---- templates ----


def render(template: str, **values: Any) -> Markup:
    """A part of a page."""
    return Markup(_TEMPLATES.get_template(template).render(values))


def page(title: str, body: Markup, lead: str = "") -> str:
    """The whole page, in one self-contained file."""
    return render("page.html", title=title, body=body, lead=lead)


def _form(value: Any, spec: str) -> str | None:
    return None if value is None else format(value, spec)


def _data_url(pixels: np.ndarray) -> str:
    return "data:image/png;base64," + base64.b64encode(to_png(pixels)).decode()


_TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=StrictUndefined,
)
_TEMPLATES.filters |= {"form": _form, "data_url": _data_url}


# ---- charts ----


def chart(figure: Figure, name: str) -> Markup:
    """A figure as a part of a page, in the page's colours. Every panel is a separate picture, so
    that panels wrap on a narrow screen; `name` keeps their ids distinct.
    """
    for text in figure.findobj(Text):
        if text.get_color() == "black":
            text.set_color(INK)
    for axes in figure.axes:
        axes.tick_params(colors=INK)
        axes.spines[:].set_color(GREY)
    figure.draw_without_rendering()  # lay out the panels once
    figure.set_layout_engine("none")
    panels = Markup()
    for number, axes in enumerate(figure.axes):
        for other in figure.axes:
            other.set_visible(other is axes)
        panels += _panel(figure, axes, f"{name}-{number}")
    for axes in figure.axes:
        axes.set_visible(True)
    return Markup('<div class="charts">{}</div>').format(panels)


def _panel(figure: Figure, axes: Axes, name: str) -> Markup:
    """The part of a figure around its only visible axes."""
    box = axes.get_tightbbox()
    assert box is not None, "the panel is visible"
    inches = box.transformed(figure.dpi_scale_trans.inverted()).padded(0.05)
    buffer = io.StringIO()
    with rc_context({"svg.hashsalt": name, "svg.fonttype": "none"}), _unknown_letters():
        figure.savefig(
            buffer,
            format="svg",
            dpi=figure.dpi,
            facecolor="none",
            bbox_inches=inches,
            metadata={"Date": None},
        )
    svg = buffer.getvalue()
    no_names = r"<metadata>.*?</metadata>| xmlns(:xlink)?=\"[^\"]*\""
    svg = re.sub(no_names, "", svg[svg.index("<svg") :], flags=re.DOTALL)
    for colour, variable in THEME.items():
        svg = svg.replace(colour, f"var(--{variable})")
    return Markup(svg)


def chart_png(figure: Figure) -> bytes:
    """A figure as a PNG file, on white."""
    buffer = io.BytesIO()
    with _unknown_letters():
        figure.savefig(buffer, format="png", dpi=130, facecolor="white")
    return buffer.getvalue()


@contextmanager
def _unknown_letters() -> Iterator[None]:
    """Draw characters that the font lacks as boxes, without a warning."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        yield
