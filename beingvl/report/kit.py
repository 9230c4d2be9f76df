"""What every page is made of: facts, tables, bars, figures, charts, and the page around them.

kit.html holds the markup, kit.css the style. Whatever is not `Markup` is text, and is escaped. A
page is `Parts`: what stands below each heading, in order; what has the heading "" comes first.
"""

from __future__ import annotations

import base64
import io
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.text import Text

Parts: TypeAlias = dict[str, Markup]

INK, GREY, GRID, RIGHT, WRONG = "#1f2328", "#6e7781", "#e5e7eb", "#1a7f37", "#c62828"
THEME = {RIGHT: "right", WRONG: "wrong", INK: "ink", GREY: "soft", GRID: "line", "#ffffff": "paper"}
"""Colour in a chart -> name of the page's colour that replaces it."""
SERIES_COLOURS = ("#4a8fd8", "#d97706", "#2fa34a", "#c2519c", "#0e9bb5", "#9370db")
"""Readable on white and on black."""


def data_url(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()


_ENVIRONMENT = Environment(
    loader=FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=StrictUndefined,
)
_ENVIRONMENT.filters["data_url"] = data_url
_KIT: Any = _ENVIRONMENT.get_template("kit.html").module


# ---- markup ----


def page(title: str, parts: Parts, lead: str = "", with_links: bool = False) -> str:
    """The whole file. It needs no second one."""
    return str(_KIT.page(title, lead, parts, with_links)).lstrip()


def sections(parts: Parts, level: int = 3) -> Markup:
    """Parts inside a part: headings `level` deep."""
    return _KIT.sections(parts, level)


def facts(values: Mapping[str, str]) -> Markup:
    """Large numbers (name -> text) side by side."""
    return _KIT.facts(values)


def table(head: Sequence[str], rows: Sequence[Sequence[str]], style: str = "") -> Markup:
    """Numbers on the right; `words`: all on the left; `keep`: no cell breaks into lines."""
    return _KIT.table(head, rows, style)


def bars(counts: Mapping[str, int]) -> Markup:
    return _KIT.bars(counts)


def figures(pictures: Sequence[tuple[bytes, str]], style: str) -> Markup:
    """PNG files and their captions, side by side: small as `tiles`, or large as `pictures`."""
    return _KIT.figures(pictures, style)


def image(png: bytes) -> Markup:
    return Markup("<img alt='' src='{}'>").format(data_url(png))


def marked(text: str, look: str) -> Markup:
    """Words that are `right`, `wrong` or `soft`."""
    return Markup("<span class='{}'>{}</span>").format(look, text)


def soft(text: str) -> Markup:
    return Markup("<p class='soft'>{}</p>").format(text)


def code(text: str) -> Markup:
    return Markup("<code>{}</code>").format(text)


def folded(summary: str, content: str) -> Markup:
    return Markup("<details><summary>{}</summary>{}</details>").format(summary, content)


# ---- charts ----


def chart(figure: Figure, name: str) -> Markup:
    """A figure as a part of a page, in the colours of its theme. `name` makes the ids in it its
    own.
    """
    for text in figure.findobj(Text):
        if text.get_color() == "black":
            text.set_color(INK)
    for axes in figure.axes:
        axes.tick_params(colors=INK)
        axes.spines[:].set_color(GREY)
    buffer = io.StringIO()
    with rc_context({"svg.hashsalt": name, "svg.fonttype": "none"}), _unknown_letters():
        figure.savefig(buffer, format="svg", dpi=130, facecolor="none", metadata={"Date": None})
    svg = buffer.getvalue()
    no_names = r"<metadata>.*?</metadata>| xmlns(:xlink)?=\"[^\"]*\""
    svg = re.sub(no_names, "", svg[svg.index("<svg") :], flags=re.DOTALL)
    for colour, variable in THEME.items():
        svg = svg.replace(colour, f"var(--{variable})")
    return Markup(svg)


def chart_png(figure: Figure) -> bytes:
    """A figure as a file, on white."""
    buffer = io.BytesIO()
    with _unknown_letters():
        figure.savefig(buffer, format="png", dpi=130, facecolor="white")
    return buffer.getvalue()


@contextmanager
def _unknown_letters() -> Iterator[None]:
    """An answer in a script that the font lacks is drawn as boxes, without a warning."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        yield
