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
from beingvl.report.kit import facts, table, whole_page
from beingvl.report.pictures import to_svg
from beingvl.report.run_pieces import Example, Run
from beingvl.report.train import section
from beingvl.report.vbpe import body, draw_charts, draw_pictures, measure_grids

VARIANT_NAMES = {"vbpe": "vBPE tokens", "raw": "plain codes"}
MAX_QUESTIONS = 20
DATA_EXAMPLES = 6


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
