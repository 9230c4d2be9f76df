"""The report of a run as one self-contained HTML page: no script, no second file, light and
dark.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from matplotlib.figure import Figure

from beingvl.data.arrow_shards import ShardReader
from beingvl.report.data import folder_section
from beingvl.report.pictures import to_svg
from beingvl.report.run_pieces import Example, Run
from beingvl.report.train import section
from beingvl.report.vbpe import body, draw_charts, draw_pictures, measure_grids

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

VARIANT_NAMES = {"vbpe": "vBPE tokens", "raw": "plain codes"}
MAX_QUESTIONS = 20
DATA_EXAMPLES = 6


def whole_page(title: str, body: str) -> str:
    """HTML text around a body that starts below the title."""
    head = (
        f"<!doctype html><html lang='en'><head><meta charset='utf-8'><title>{escape(title)}</title>"
        "<meta name='viewport' content='width=device-width, "
        f"initial-scale=1'><style>{STYLE}</style></head>"
    )
    return f"{head}<body><h1>{escape(title)}</h1>{body}</body></html>\n"


def page(
    name: str,
    pieces: Run,
    summary: Mapping[str, Any],
    examples: Sequence[Example],
    figures: Mapping[str, Figure],
) -> str:
    """HTML text of a run called `name`; `figures`: training and, where there are examples,
    contact_sheet.
    """
    parts: dict[str, str] = {}
    if summary["test_accuracy"]:
        parts["Accuracy after each stage"] = accuracy_table(summary)
    if examples:
        drawn = to_svg(figures["contact_sheet"], "sheet")
        parts["Example answers"] = (
            "<p class='soft'>Spread evenly over the test "
            f"images.</p>{drawn}{examples_table(examples)}"
        )
    if summary["evaluations"]:
        parts["Scores"] = scores_table(summary["evaluations"])
    if pieces.stages:
        parts["Training"] = to_svg(figures["training"], "training") + stages_sections(pieces)
    if pieces.frozen:
        parts["Frozen and trained parameters"] = frozen_table(summary["frozen"])
    if pieces.vbpe is not None:
        parts["vBPE"] = vbpe_section(pieces)
    if pieces.shards:
        parts["Data"] = data_section(pieces)
    if pieces.missing:
        items = "".join(f"<li>{escape(what)}</li>" for what in pieces.missing)
        parts["Not in this report"] = f"<ul class='soft'>{items}</ul>"
    links = "".join(f"<a href='#part-{number}'>{title}</a>" for number, title in enumerate(parts))
    body = "".join(
        f"<h2 id='part-{number}'>{title}</h2>{part}"
        for number, (title, part) in enumerate(parts.items())
    )
    asked = f"{summary['test_questions']} questions about {summary['test_images']} held-out images"
    lead = (
        "<div "
        f"class='soft'>{asked if summary['test_accuracy'] else ''}</div>{facts(run_facts(summary))}<nav>{links}</nav>"
    )
    return whole_page(f"Being-VL: {name}", lead + body)


# ---- numbers ----


def facts(values: Mapping[str, str]) -> str:
    """Large numbers (name -> text) side by side."""
    cells = "".join(
        f"<div><b>{value}</b><span class='soft'>{escape(name)}</span></div>"
        for name, value in values.items()
    )
    return f"<div class='facts'>{cells}</div>"


def run_facts(summary: Mapping[str, Any]) -> dict[str, str]:
    values = {}
    if summary["test_accuracy"]:
        values[f"mean accuracy after {list(summary['test_accuracy'])[-1]}"] = (
            f"{summary['test_accuracy_mean']:.1%}"
        )
        values["chance"] = f"{sum(summary['chance'].values()) / len(summary['chance']):.1%}"
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
    return values


def table(head: Sequence[str], rows: Sequence[Sequence[str]], style: str = "") -> str:
    """Cells are HTML already."""
    top = "".join(f"<th>{name}</th>" for name in head)
    lines = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<div class='wide'><table class='{style}'><tr>{top}</tr>{lines}</table></div>"


def accuracy_table(summary: Mapping[str, Any]) -> str:
    """Of the first questions, and the mean over all."""
    accuracy, chance = summary["test_accuracy"], summary["chance"]
    columns = [chance, *accuracy.values()]
    rows = [
        [escape(question), *(f"{scores[question]:.1%}" for scores in columns)]
        for question in list(chance)[:MAX_QUESTIONS]
    ]
    rows.append(
        ["<b>mean</b>", *(f"<b>{sum(scores.values()) / len(scores):.1%}</b>" for scores in columns)]
    )
    more = len(chance) - MAX_QUESTIONS
    note = f"<p class='soft'>… and {more} more questions in summary.json</p>" if more > 0 else ""
    return table(["question", "chance", *map(escape, accuracy)], rows) + note


def scores_table(evaluations: Mapping[str, Mapping[str, Any]]) -> str:
    """Every score of every evaluation, text parity in words too."""
    rows = []
    for name, entry in evaluations.items():
        for number, (score, value) in enumerate(entry["scores"].items()):
            error = entry["standard_errors"].get(score)
            shown = f"{value:.4g}" + (
                f" <span class='soft'>± {error:.2g}</span>" if error is not None else ""
            )
            head = (
                [escape(name), escape(entry["metric"]), f"{entry['rows']:,}"]
                if number == 0
                else ["", "", ""]
            )
            rows.append([*head, escape(score.replace("_", " ")), shown])
        if "equal" in entry:
            colour = "right" if entry["equal"] else "wrong" if entry["equal_is_expected"] else ""
            verdict = (
                "equal to the base model's to the bit"
                if entry["equal"]
                else "not equal to the base model's"
            )
            rows.append(["", "", "", "text logits", f"<span class='{colour}'>{verdict}</span>"])
    return table(["evaluation", "metric", "rows", "score", "value"], rows)


def frozen_table(groups: Sequence[Mapping[str, Any]]) -> str:
    rows = []
    for group in groups:
        same = group["before"] == group["after"]
        verdict = "unknown" if group["before"] is None else "unchanged" if same else "changed"
        colour = (
            "soft" if group["before"] is None else "right" if group["is_as_promised"] else "wrong"
        )
        hashes = [
            f"<code>{group[key][:12]}</code>" if group[key] else "not there"
            for key in ("before", "after")
        ]
        base = "" if group["base"] is None else "yes" if group["base"] == group["after"] else "no"
        cells = [
            escape(group["stage"]),
            f"<code>{escape(group['group'])}</code>",
            "trained" if group["is_trained"] else "frozen",
        ]
        cells += [f"{group['num_tensors']}", f"{group['num_parameters']:,}", *hashes]
        rows.append([*cells, f"<span class='{colour}'>{verdict}</span>", base])
    head = [
        "stage",
        "group",
        "was",
        "tensors",
        "parameters",
        "hash before",
        "hash after",
        "so it is",
        "equal to base",
    ]
    words = (
        "BLAKE3 over all tensors of a group, before and after its stage: frozen must "
        "be unchanged, trained must be changed."
    )
    return f"<p class='soft'>{words}</p><div class='part'>{table(head, rows, 'keep')}</div>"


# ---- parts that other reports make ----


def stages_sections(pieces: Run) -> str:
    return "".join(
        f"<details><summary>{name}: all curves, times, events</summary>"
        f"{_below(section(name, stage.rows, stage.validation, stage.plan))}</details>"
        for name, stage in pieces.stages.items()
    )


def vbpe_section(pieces: Run) -> str:
    assert pieces.vbpe is not None
    sample = measure_grids(pieces.vbpe, pieces.codes) if pieces.codes is not None else None
    decoder = pieces.vqgan if pieces.vqgan is not None and pieces.vqgan.has_decoder else None
    pictures = draw_pictures(pieces.vbpe, sample, decoder)
    return (
        "<div "
        f"class='part'>{_below(body(pieces.vbpe, sample, pictures, draw_charts(pieces.vbpe, sample)))}</div>"
    )


def data_section(pieces: Run) -> str:
    sections = [folder_section(ShardReader(path), pieces.data_options) for path in pieces.shards]
    return f"<div class='part'>{''.join(map(_below, sections))}</div>"


def _below(section: str) -> str:
    """A section with its headings one level lower."""
    return section.replace("<h2>", "<h3>").replace("</h2>", "</h3>")


# ---- examples ----


def examples_table(examples: Sequence[Example]) -> str:
    rows = []
    for example in examples:
        name = "right" if example.correct else "wrong"
        answer = escape(example.answer) or "(nothing)"
        rows.append(
            [
                escape(example.key),
                escape(example.question),
                f"<span class='{name}'>{answer}</span>",
                escape(example.truth),
            ]
        )
    return table(["image", "question", "answer", "truth"], rows, "words")
