"""What every page of a report is made of: style, facts, tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

STYLE = """
:root {
  color-scheme: light dark;
  --ink: #1f2328; --soft: #59636e; --line: #d1d9e0; --paper: #fff; --right: #1a7f37; --wrong: #c62828
}
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6edf3; --soft: #9198a1; --line: #3d444d; --paper: #0d1117; --right: #4ac26b; --wrong: #ff7b72 }
}
body {
  font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 62rem; margin: 2rem auto; padding: 0 1rem
}
h1 { font-size: 1.6rem; margin-bottom: .2rem } h2 { font-size: 1.15rem; margin-top: 2.2rem }
.soft { color: var(--soft) }
.wide { overflow-x: auto } table { border-collapse: collapse; width: 100% }
th, td { padding: .35rem .7rem; border-bottom: 1px solid var(--line); text-align: right; font-variant-numeric: tabular-nums }
th:first-child, td:first-child, .words td, .words th { text-align: left }
tr.total td { font-weight: 600; border-bottom: none }
.facts { display: flex; flex-wrap: wrap; gap: .6rem 2.2rem; margin: 1.2rem 0 }
.facts b { display: block; font-size: 1.45rem; line-height: 1.2 }
.right { color: var(--right); font-weight: 600 } .wrong { color: var(--wrong); font-weight: 600 }
h3 { font-size: 1rem; margin: 1.6rem 0 .5rem } pre { overflow-x: auto; font-size: .85rem } svg { width: 100%; height: auto }
code { font-size: .85rem } ul { padding-left: 1.2rem } nav a { margin-right: 1.2rem; color: inherit }
details { margin: .8rem 0; border-bottom: 1px solid var(--line) } summary { cursor: pointer; padding: .3rem 0; font-weight: 600 }
details svg, .part svg { max-width: 100% } .part { overflow-x: auto } .part img { max-width: 8rem; image-rendering: pixelated }
.part td, .part th { text-align: left; vertical-align: top } .keep td { white-space: nowrap }
.bar { background: #4a8fd8; height: .8rem; min-width: 1px }
figure { margin: 0 } figcaption { color: var(--soft); font-size: .8rem; line-height: 1.3 }
.tokens, .examples { display: flex; flex-wrap: wrap; gap: 1rem } .examples figure { flex: 1 1 16rem }
.examples img { width: 100%; max-width: 18rem }
"""


def whole_page(title: str, body: str) -> str:
    """HTML text around a body that starts below the title."""
    head = (
        f"<!doctype html><html lang='en'><head><meta charset='utf-8'><title>{escape(title)}</title>"
        "<meta name='viewport' content='width=device-width, "
        f"initial-scale=1'><style>{STYLE}</style></head>"
    )
    return f"{head}<body><h1>{escape(title)}</h1>{body}</body></html>\n"


def facts(values: Mapping[str, str]) -> str:
    """Large numbers (name -> text) side by side."""
    cells = "".join(
        f"<div><b>{value}</b><span class='soft'>{escape(name)}</span></div>"
        for name, value in values.items()
    )
    return f"<div class='facts'>{cells}</div>"


def table(head: Sequence[str], rows: Sequence[Sequence[str]], style: str = "") -> str:
    """Cells are HTML already."""
    top = "".join(f"<th>{name}</th>" for name in head)
    lines = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<div class='wide'><table class='{style}'><tr>{top}</tr>{lines}</table></div>"
