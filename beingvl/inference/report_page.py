"""The report of a run as one self-contained HTML page: no script, no second file, light and dark."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from beingvl.inference.report_quickstart import Example

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
table { border-collapse: collapse; width: 100% }
th, td { padding: .35rem .7rem; border-bottom: 1px solid var(--line); text-align: right; font-variant-numeric: tabular-nums }
th:first-child, td:first-child, .words td, .words th { text-align: left }
tr.total td { font-weight: 600; border-bottom: none }
.facts { display: flex; flex-wrap: wrap; gap: .6rem 2.2rem; margin: 1.2rem 0 }
.facts b { display: block; font-size: 1.45rem; line-height: 1.2 }
.right { color: var(--right); font-weight: 600 } .wrong { color: var(--wrong); font-weight: 600 }
img { width: 100%; height: auto; border-radius: 6px; background: #fff }
"""

VARIANT_NAMES = {"vbpe": "vBPE tokens", "raw": "plain codes"}


def page(summary: Mapping[str, Any], examples: Sequence[Example], sheet: bytes, curves: bytes) -> str:
    """HTML text; `sheet` and `curves` are PNG bytes."""
    images, questions = summary["test_images"], summary["test_questions"]
    parts = [
        "<!doctype html><html lang='en'><head><meta charset='utf-8'><title>Being-VL: report of a run</title>",
        "<meta name='viewport' content='width=device-width, initial-scale=1'>",
        f"<style>{STYLE}</style></head><body>",
        f"<h1>Being-VL: report of a run</h1><div class='soft'>{questions} questions about {images} held-out images</div>",
        facts(summary),
        f"<h2>Accuracy after each stage</h2>{accuracy_table(summary)}",
        f"<h2>Examples, spread evenly over the test images</h2>{picture(sheet, 'test images, their tokens, the answers')}",
        examples_table(examples),
        f"<h2>Training</h2>{picture(curves, 'loss over steps and accuracy after each stage')}",
        "</body></html>\n",
    ]
    return "\n".join(parts)


def facts(summary: Mapping[str, Any]) -> str:
    values = {
        "mean accuracy after stage 3": f"{summary['test_accuracy_mean']:.1%}",
        "chance": f"{sum(summary['chance'].values()) / len(summary['chance']):.1%}",
        "codes per token": f"{summary['vbpe_compression']:.2f}",
    }
    for variant, value in summary["test_accuracy_mean_of_variant"].items():
        if variant != summary["variant"]:
            values[f"the same, trained on {VARIANT_NAMES[variant]}"] = f"{value:.1%}"
    if summary["wall_seconds"]:
        minutes, seconds = divmod(round(summary["wall_seconds"]), 60)
        values["wall time"] = f"{minutes} min {seconds:02d} s"
    if summary["peak_memory_bytes"]:
        values["peak memory"] = f"{summary['peak_memory_bytes'] / 1e9:.2f} GB"
    cells = "".join(f"<div><b>{value}</b><span class='soft'>{name}</span></div>" for name, value in values.items())
    return f"<div class='facts'>{cells}</div>"


def accuracy_table(summary: Mapping[str, Any]) -> str:
    accuracy, chance = summary["test_accuracy"], summary["chance"]
    head = "".join(f"<th>{escape(name)}</th>" for name in ("chance", *accuracy))
    rows = []
    for question in chance:
        values = [chance[question], *(scores[question] for scores in accuracy.values())]
        rows.append(f"<tr><td>{escape(question)}</td>{number_cells(values)}</tr>")
    means = [sum(scores.values()) / len(scores) for scores in (chance, *accuracy.values())]
    rows.append(f"<tr class='total'><td>mean</td>{number_cells(means)}</tr>")
    return f"<table><tr><th>question</th>{head}</tr>{''.join(rows)}</table>"


def number_cells(values: Sequence[float]) -> str:
    return "".join(f"<td>{value:.1%}</td>" for value in values)


def examples_table(examples: Sequence[Example]) -> str:
    rows = []
    for example in examples:
        name = "right" if example.correct else "wrong"
        answer = escape(example.answer) or "(nothing)"
        cells = [escape(example.key), escape(example.question), f"<span class='{name}'>{answer}</span>", escape(example.truth)]
        rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    head = "".join(f"<th>{name}</th>" for name in ("image", "question", "answer", "truth"))
    return f"<table class='words'><tr>{head}</tr>{''.join(rows)}</table>"


def picture(png: bytes, description: str) -> str:
    return f"<img alt='{escape(description)}' src='data:image/png;base64,{base64.b64encode(png).decode()}'>"
