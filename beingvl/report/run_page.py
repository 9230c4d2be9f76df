"""The page of a run: what each of its pieces says, one part each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup
from matplotlib.figure import Figure

from beingvl.data.arrow_shards import ShardReader
from beingvl.report.data import folder_parts
from beingvl.report.kit import (
    Parts,
    chart,
    code,
    facts,
    folded,
    marked,
    page,
    sections,
    soft,
    table,
)
from beingvl.report.run_pieces import Example, Run
from beingvl.report.train import stage_parts
from beingvl.report.vbpe import measure_grids, vbpe_parts
from beingvl.report.vbpe_pictures import draw_charts, draw_pictures

VARIANT_NAMES = {"vbpe": "vBPE tokens", "raw": "plain codes"}
MAX_QUESTIONS = 20


def run_page(
    name: str,
    pieces: Run,
    summary: Mapping[str, Any],
    examples: Sequence[Example],
    charts: Mapping[str, Figure],
) -> str:
    """HTML text of a run called `name`; `charts`: training and, where there are examples,
    contact_sheet.
    """
    parts: Parts = {"": facts(run_facts(summary))}
    lead = ""
    if summary["test_accuracy"]:
        questions, images = summary["test_questions"], summary["test_images"]
        lead = f"{questions} questions about {images} held-out images"
        parts["Accuracy after each stage"] = accuracy_table(summary)
    if examples:
        drawn = chart(charts["contact_sheet"], "sheet")
        spread = soft("Spread evenly over the test images.")
        parts["Example answers"] = spread + drawn + examples_table(examples)
    if summary["evaluations"]:
        parts["Scores"] = scores_table(summary["evaluations"])
    if pieces.stages:
        parts["Training"] = chart(charts["training"], "training") + stages_section(pieces)
    if pieces.frozen:
        parts["Frozen and trained parameters"] = frozen_table(summary["frozen"])
    if pieces.vbpe is not None:
        parts["vBPE"] = vbpe_section(pieces)
    if pieces.shards:
        parts["Data"] = data_section(pieces)
    if pieces.missing:
        items = Markup("").join(Markup("<li>{}</li>").format(what) for what in pieces.missing)
        parts["Not in this report"] = Markup("<ul class='soft'>{}</ul>").format(items)
    return page(f"Being-VL: {name}", parts, lead, with_links=True)


# ---- numbers ----


def run_facts(summary: Mapping[str, Any]) -> dict[str, str]:
    values = {}
    if summary["test_accuracy"]:
        last, mean = list(summary["test_accuracy"])[-1], summary["test_accuracy_mean"]
        values[f"mean accuracy after {last}"] = f"{mean:.1%}"
        values["chance"] = f"{_mean(summary['chance']):.1%}"
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


def accuracy_table(summary: Mapping[str, Any]) -> Markup:
    """Of the first questions, and the mean over all."""
    accuracy, chance = summary["test_accuracy"], summary["chance"]
    columns = [chance, *accuracy.values()]
    rows = [
        [question, *(f"{scores[question]:.1%}" for scores in columns)]
        for question in list(chance)[:MAX_QUESTIONS]
    ]
    bold = Markup("<b>{}</b>")
    rows.append([bold.format("mean"), *(bold.format(f"{_mean(one):.1%}") for one in columns)])
    shown = table(["question", "chance", *accuracy], rows)
    more = len(chance) - MAX_QUESTIONS
    return shown + (soft(f"… and {more} more questions in summary.json") if more > 0 else "")


def _mean(values: Mapping[str, float]) -> float:
    return sum(values.values()) / len(values)


def scores_table(evaluations: Mapping[str, Mapping[str, Any]]) -> Markup:
    """Every score of every evaluation, text parity in words too."""
    rows = []
    for name, entry in evaluations.items():
        head = [name, entry["metric"], f"{entry['rows']:,}"]
        for score, value in entry["scores"].items():
            error = entry["standard_errors"].get(score)
            more = marked(f" ± {error:.2g}", "soft") if error is not None else ""
            rows.append([*head, score.replace("_", " "), Markup("{:.4g}{}").format(value, more)])
            head = ["", "", ""]
        if "equal" in entry:
            colour = (
                "right" if entry["equal"] else "wrong" if entry["equal_is_expected"] else "soft"
            )
            words = (
                "bit-identical to the base model's"
                if entry["equal"]
                else ("not equal to the base model's")
            )
            rows.append([*head, "text logits", marked(words, colour)])
    return table(["evaluation", "metric", "rows", "score", "value"], rows)


def frozen_table(groups: Sequence[Mapping[str, Any]]) -> Markup:
    rows = []
    for group in groups:
        before, after, base = group["before"], group["after"], group["base"]
        if before is None:
            verdict = marked("unknown", "soft")
        else:
            words = "unchanged" if before == after else "changed"
            verdict = marked(words, "right" if group["is_as_promised"] else "wrong")
        rows.append(
            [
                group["stage"],
                code(group["group"]),
                "trained" if group["is_trained"] else "frozen",
                f"{group['num_tensors']}",
                f"{group['num_parameters']:,}",
                code(before[:12]) if before else "not there",
                code(after[:12]),
                verdict,
                "" if base is None else "yes" if base == after else "no",
            ]
        )
    head = ["stage", "group", "was", "tensors", "parameters", "hash before", "hash after"]
    head += ["so it is", "equal to base"]
    words = (
        "BLAKE3 over all tensors of a group, before and after its stage: frozen must be "
        "unchanged, trained must be changed."
    )
    return soft(words) + table(head, rows, "words keep")


# ---- parts that other reports make ----


def stages_section(pieces: Run) -> Markup:
    return Markup("").join(
        folded(f"{name}: all curves, times, events", sections(stage_parts(stage, name)))
        for name, stage in pieces.stages.items()
    )


def vbpe_section(pieces: Run) -> Markup:
    assert pieces.vbpe is not None
    sample = measure_grids(pieces.vbpe, pieces.codes) if pieces.codes is not None else None
    pictures = draw_pictures(pieces.vbpe, sample, pieces.decoder)
    return sections(vbpe_parts(pieces.vbpe, sample, pictures, draw_charts(pieces.vbpe, sample)))


def data_section(pieces: Run) -> Markup:
    return sections(
        {
            str(path): sections(folder_parts(ShardReader(path), pieces.data_options), level=4)
            for path in pieces.shards
        }
    )


def examples_table(examples: Sequence[Example]) -> Markup:
    rows = [
        [
            example.key,
            example.question,
            marked(example.answer or "(nothing)", "right" if example.correct else "wrong"),
            example.truth,
        ]
        for example in examples
    ]
    return table(["image", "question", "answer", "truth"], rows, "words")
