"""Everything that a run produced, on one page.

read_run           the pieces that exist                      (run_pieces.py)
summarize          accuracy, chance, compression, scores, hashes, time, memory -> summary.json
choose_examples    answers of the last stage                  (run_pieces.py)
charts             contact_sheet.png, training.png            (run_charts.py)
run_page           index.html                                 (run_page.py)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from beingvl.artefact.files import to_json, write_atomically
from beingvl.artefact.manifest import start_folder, write_manifest
from beingvl.artefact.owner import owned
from beingvl.json_file import read_object
from beingvl.report.kit import chart_png
from beingvl.report.made import bytes_on_disk, read_made
from beingvl.report.run_charts import contact_sheet, training_curves
from beingvl.report.run_page import run_page
from beingvl.report.run_pieces import Example, Run, RunPaths, choose_examples, read_run

EQUAL_TIME_FILE = "equal_time.json"


def report_run(
    run_folder: Path | str,
    *,
    stages_path: Path | str | None = None,
    base_path: Path | str | None = None,
    data: Sequence[Path | str] = (),
    vbpe_path: Path | str | None = None,
    vq_codes: Path | str | None = None,
    image_path: Path | str | None = None,
    output_path: Path | str | None = None,
    wall_seconds: float | None = None,
    peak_memory_bytes: int | None = None,
) -> Path:
    """Write index.html, summary.json and two PNG files into `output_path`, by default report/
    beside the stages; returns the folder.

    The other paths are for pieces outside the run's folder. `wall_seconds` and `peak_memory_bytes`
    of the whole run go into the summary. Raises InputError if there is nothing to report.
    """
    paths = RunPaths(run_folder, stages_path, base_path, data, vbpe_path, vq_codes, image_path)
    pieces = read_run(paths)
    summary = summarize(pieces, wall_seconds, peak_memory_bytes)
    made = read_made(Path(run_folder), Path(stages_path or run_folder))
    summary["made"] = [one._asdict() for one in made]
    summary["bytes_on_disk"] = bytes_on_disk(Path(run_folder))
    summary |= equal_time_of(Path(run_folder) / EQUAL_TIME_FILE)
    examples = choose_examples(pieces)
    charts = {"contact_sheet": contact_sheet(examples)} if examples else {}
    charts["training"] = training_curves(pieces.stages, summary)
    folder = Path(output_path or Path(stages_path or run_folder) / "report")
    with owned(folder):
        start_folder(folder, "report")
        write_atomically(folder / "summary.json", to_json(summary))
        for name, figure in charts.items():
            write_atomically(folder / f"{name}.png", chart_png(figure))
        name = Path(run_folder).resolve().name
        write_atomically(folder / "index.html", run_page(name, pieces, summary, examples, charts))
        write_manifest(folder, "report", {"examples": len(examples)}, {})
    print_summary(summary)
    print_examples(examples)
    for what in pieces.missing:
        print(f"not in the report: {what}")
    files = ["summary.json", *(f"{name}.png" for name in charts), "index.html"]
    print(f"\n{folder}: {', '.join(files)}")
    return folder


def summarize(
    pieces: Run, wall_seconds: float | None, peak_memory_bytes: int | None
) -> dict[str, Any]:
    """Contents of summary.json; accuracies and chance are from 0 to 1."""
    last = list(pieces.asked_alike.values())[-1] if pieces.asked_alike else {"questions": {}}
    peaks = [row["peak_memory_bytes"] for stage in pieces.stages.values() for row in stage.rows]
    wanted = ("metric", "rows", "scores", "standard_errors", "equal", "equal_is_expected")
    return {
        "test_accuracy_mean": last.get("accuracy_mean"),
        "test_accuracy": {
            name: _of_questions(scores, "accuracy") for name, scores in pieces.asked_alike.items()
        },
        "chance": _of_questions(last, "chance"),
        "majority": _of_questions(last, "majority"),
        "variant": last.get("variant"),
        "test_accuracy_mean_of_variant": pieces.mean_of_variant,
        "test_questions": last.get("rows", 0),
        "test_images": len({str(row["image"]) for row in pieces.predictions if row["image"]}),
        "training_loss": {
            name: _first_and_last_loss(stage.rows) for name, stage in pieces.stages.items()
        },
        "vbpe_compression": _compression(pieces),
        "evaluations": {
            name: {key: scores[key] for key in wanted if key in scores}
            for name, scores in pieces.evaluations.items()
        },
        "frozen": [
            {**asdict(group), "is_as_promised": group.is_as_promised} for group in pieces.frozen
        ],
        "wall_seconds": wall_seconds,
        "peak_memory_bytes": peak_memory_bytes or max(peaks, default=None),
    }


def equal_time_of(path: Path) -> dict[str, Any]:
    """The comparison that a run may bring: the last line of `tests.benchmarks.positions
    --quickstart --cpu_seconds`. It is not of this run.
    """
    kinds = {"raw": "raw", "anchor_128": "vbpe"}
    found = read_object(path) if path.is_file() else {}
    rows = {kind: found[name] for name, kind in kinds.items() if kinds.keys() <= found.keys()}
    means = {f"accuracy_{kind}_equal_time": row["mean"] for kind, row in rows.items()}
    return {**means, "equal_time": rows}


def _of_questions(scores: Mapping[str, Any], key: str) -> dict[str, float]:
    return {question: entry[key] for question, entry in scores["questions"].items()}


def _first_and_last_loss(rows: Sequence[Mapping[str, Any]]) -> list[float]:
    """Means over the first and the last tenth of a stage's steps, nats per target token."""
    losses = [row["loss"] for row in rows if row["loss"] is not None]
    tenth = -(-len(losses) // 10)
    return [sum(part) / tenth for part in (losses[:tenth], losses[-tenth:])] if losses else []


def _compression(pieces: Run) -> float | None:
    """Codes per token."""
    if pieces.vbpe is None or pieces.codes is None:
        return None
    ids, _ = pieces.vbpe.encode_batch(pieces.codes)
    return pieces.codes.size / len(ids)


# ---- printing ----


def print_summary(summary: dict[str, Any]) -> None:
    if summary["test_accuracy"]:
        print_accuracy(summary)
    losses = {name: found for name, found in summary["training_loss"].items() if found}
    if losses:
        print("\nLoss in the first and the last tenth of a stage's steps (nats per target token)")
    for name, (first, last) in losses.items():
        print(f"  {name:<7} {first:.3f} -> {last:.3f}")
    if summary["vbpe_compression"]:
        print(f"\nvBPE: {summary['vbpe_compression']:.2f} codes per token on the test images")
    variants = summary["test_accuracy_mean_of_variant"]
    if len(variants) > 1:
        means = ", ".join(f"{name} {value:.3f}" for name, value in variants.items())
        print(f"Mean accuracy after stage 3: {means}")
    if rows := summary.get("equal_time"):
        raw = rows["raw"]
        print(
            f"\nSame time, raw codes and vBPE (stored figures: {raw['seeds']} seeds, "
            f"{raw['cpu_seconds']:.0f} s of training each)"
        )
        for kind, row in rows.items():
            print(f"  {kind:<7} {row['mean']:.3f}  {row['tokens_per_image']:g} tokens per image")
    for group in summary["frozen"]:
        if not group["is_as_promised"]:
            what = "trained, but unchanged" if group["is_trained"] else "frozen, but changed"
            print(f"WRONG: {group['stage']}, {group['group']}: {what}")


def print_accuracy(summary: dict[str, Any]) -> None:
    columns = {"chance": summary["chance"], **summary["test_accuracy"]}
    questions = list(summary["chance"])
    width = max(map(len, [*questions, "mean"]))
    print(
        f"Accuracy on {summary['test_questions']} questions about {summary['test_images']} images\n"
    )
    print(f"  {'question':<{width}}" + "".join(f"  {name:>7}" for name in columns))
    for question in questions:
        print(f"  {question:<{width}}" + "".join(_score(one[question]) for one in columns.values()))
    means = (sum(scores.values()) / len(questions) for scores in columns.values())
    print(f"  {'mean':<{width}}" + "".join(map(_score, means)))


def _score(value: float) -> str:
    """Wide as a column; "none" if no answer was right, as after a stage that trains only rows."""
    return f"  {value:7.3f}" if value else f"  {'none':>7}"


def print_examples(examples: Sequence[Example]) -> None:
    if not examples:
        return
    print(f"\n{len(examples)} of them, spread evenly:")
    width = max(len(example.question) for example in examples)
    for example in examples:
        verdict = "right" if example.correct else f"wrong, it is {example.truth!r}"
        answer = example.answer or "(nothing)"
        print(f"  {example.key:<20}  {example.question:<{width}}  {answer:<8}  {verdict}")
