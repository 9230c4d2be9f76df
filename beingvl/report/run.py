"""All that a run left, gathered on one self-contained HTML page.

Reads what is there of RUN_FOLDER (each piece may lie elsewhere, see the options)

    stage-N/          metrics, validation, plan; final/ for the hashes of what was frozen
    eval/*/           every finished evaluation: accuracy after each stage, scores, text parity,
                      answers
    base/             the model that stage 1 started from
    shards*/          the data report
    vbpe/             the vBPE report, on the images of vq_codes/test/
    data/images/      the images of example answers

and writes

    summary.json         accuracy per question after each stage, chance, compression, scores,
                         hashes, time, memory
    contact_sheet.png    image, reconstruction, token borders, question, answer and truth of ten
                         test images
    training.png         loss of each stage, accuracy after it
    index.html           all of it, and what was not found, on one page
    manifest.json        last

The examples are answers of the last stage, spread evenly over the test questions; nothing is chosen
by its answer.
"""

from __future__ import annotations

import argparse
import importlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from beingvl.artefact.files import to_json, write_atomically
from beingvl.artefact.manifest import is_complete, read_manifest, start_folder, write_manifest
from beingvl.errors import InputError
from beingvl.evaluation.results import KIND, read_predictions, read_summary
from beingvl.images.vq_codes import CodeFolder
from beingvl.images.vqgan import VQGAN, as_array, read_image
from beingvl.inference.model import VQGAN_FOLDER
from beingvl.report.frozen import finished_models, hash_groups
from beingvl.report.page import page
from beingvl.report.pictures import contact_sheet, to_png, training_curves
from beingvl.report.run_pieces import Example, Run, Stage
from beingvl.report.train import read_stage
from beingvl.vbpe.visual_bpe import VisualBPE, owners

STAGES = ("stage-1", "stage-2", "stage-3")
NUM_EXAMPLES = 10
RAW_FOLDER = "raw"
"""Where a run keeps the stages that it trained on plain codes."""


def run(args: argparse.Namespace) -> None:
    pieces = read_run(args)
    summary = summarize(pieces, args.wall_seconds, args.peak_memory_bytes)
    examples = choose_examples(pieces)
    figures = {
        "training": training_curves(
            {name: stage.rows for name, stage in pieces.stages.items()}, summary
        )
    }
    if examples:
        figures["contact_sheet"] = contact_sheet(examples)
    folder = start_folder(args.output_path or stages_folder(args) / "report", "report")
    write_atomically(folder / "summary.json", to_json(summary))
    for name, figure in figures.items():
        write_atomically(folder / f"{name}.png", to_png(figure))
    write_atomically(
        folder / "index.html",
        page(args.run_folder.resolve().name, pieces, summary, examples, figures),
    )
    write_manifest(folder, "report", {"examples": len(examples)}, {})
    print_accuracy(summary)
    print_examples(examples)
    for what in pieces.missing:
        print(f"not in the report: {what}")
    print(
        f"\n{folder}: summary.json, "
        f"{''.join(f'{name}.png, ' for name in reversed(figures))}index.html"
    )


# ---- reading ----


def stages_folder(args: argparse.Namespace) -> Path:
    return args.stages_path or args.run_folder


def read_run(args: argparse.Namespace) -> Run:
    """Raises InputError when there is neither a stage nor an evaluation, or a piece that was
    named does not exist.
    """
    folder, stages = args.run_folder, stages_folder(args)
    if not folder.is_dir():
        raise InputError(
            f"{folder} is not a folder; give the folder that holds stage-1/, stage-2/ … and eval/"
        )
    missing: list[str] = []

    def piece(option: str, default: Path, what: str) -> Path | None:
        given = getattr(args, option)
        if given is not None and not given.exists():
            raise InputError(f"--{option} {given} does not exist")
        if given is None and not default.exists():
            missing.append(f"{what} ({default}, or --{option})")
        return given or (default if default.exists() else None)

    trained = read_stages(stages, missing)
    evaluations = read_evaluations(stages / "eval", missing)
    if not trained and not evaluations:
        raise InputError(
            f"{stages} holds neither stage-1/{METRICS_HINT} nor a finished evaluation in "
            "eval/: nothing to report"
        )
    alike = asked_alike(evaluations)
    if not alike:
        missing.append(
            f"accuracy after each stage ({stages / 'eval' / STAGES[-1]}, made by `beingvl "
            "evaluate`)"
        )
    base = piece("base_path", folder / "base", "the base model")
    finals = finished_models({name: stages / name / "final" for name in STAGES})
    vbpe_path = piece("vbpe_path", folder / "vbpe", "the vBPE")
    codes_path = piece("vq_codes", folder / "vq_codes" / "test", "codes to measure the vBPE on")
    shards = args.data or sorted(
        path for path in folder.glob("shards*") if (path / "manifest.json").is_file()
    )
    missing += [] if shards else [f"the data ({folder}/shards*, or --data)"]
    return Run(
        stages=trained,
        evaluations=evaluations,
        asked_alike=alike,
        predictions=read_last_predictions(stages / "eval", alike),
        mean_of_variant=mean_of_variants(folder, alike, missing),
        frozen=hash_groups(finals, base),
        vbpe=read_vbpe(vbpe_path) if vbpe_path else None,
        codes=read_codes(codes_path) if codes_path else None,
        vqgan=read_vqgan([*reversed(list(finals.values())), *([base] if base else [])]),
        images=piece("image_path", folder / "data" / "images", "images of the examples"),
        shards=shards,
        data_options=data_options(
            args, shards, [*finals.values(), *([base] if base else [])], vbpe_path
        ),
        missing=missing,
    )


METRICS_HINT = "metrics.jsonl"


def data_options(
    args: argparse.Namespace, shards: Sequence[Path], models: Sequence[Path], vbpe_path: Path | None
) -> argparse.Namespace:
    """What `beingvl report data` would be given for the run's shards; sequence length as the
    last stage's.
    """
    parser = argparse.ArgumentParser()
    importlib.import_module("beingvl.commands.report_data").add_arguments(parser)
    options = [str(path) for path in shards] or ["none"]
    if models:
        identity = read_manifest(models[0]).details.get("identity", {})
        options += [f"--model_path={models[0]}"]
        options += (
            [f"--sequence_length={identity['sequence_length']}"]
            if "sequence_length" in identity
            else []
        )
        vqgan = models[0] / VQGAN_FOLDER
        options += [f"--vq_path={vqgan}"] if has_decoder(vqgan) else []
    return parser.parse_args([*options, *([f"--vbpe_path={vbpe_path}"] if vbpe_path else [])])


def read_stages(folder: Path, missing: list[str]) -> dict[str, Stage]:
    found = {name: Stage(*read_stage(folder / name)) for name in STAGES}
    missing += [
        f"the curves of {name} ({folder / name / METRICS_HINT})"
        for name, stage in found.items()
        if not stage.rows
    ]
    return {name: stage for name, stage in found.items() if stage.rows}


def read_evaluations(folder: Path, missing: list[str]) -> dict[str, dict[str, Any]]:
    """Scores of every finished evaluation below `folder`, by folder name: base, the stages, then
    the others.
    """
    order = ("base", *STAGES)
    paths = [
        path for path in folder.glob("*") if is_complete(path) and read_manifest(path).kind == KIND
    ]
    paths.sort(
        key=lambda path: (order.index(path.name) if path.name in order else len(order), path.name)
    )
    found = {path.name: read_scores(path, missing) for path in paths}
    return {name: scores for name, scores in found.items() if scores}


def read_scores(folder: Path, missing: list[str]) -> dict[str, Any] | None:
    """Scores of a finished evaluation; None for one that an older version made, which `missing`
    then names.
    """
    try:
        return read_summary(folder)
    except InputError as error:
        missing += [] if str(error) in missing else [str(error)]
        return None


def asked_alike(evaluations: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Evaluations of base and stages that share the questions of the last stage's; empty without
    one by question.
    """
    named = {
        name: scores
        for name, scores in evaluations.items()
        if name in ("base", *STAGES) and scores.get("questions")
    }
    if not named:
        return {}
    questions = set(list(named.values())[-1]["questions"])
    return {name: scores for name, scores in named.items() if set(scores["questions"]) == questions}


def read_last_predictions(folder: Path, alike: Mapping[str, Any]) -> list[dict[str, Any]]:
    return read_predictions(folder / list(alike)[-1]) if alike else []


def mean_of_variants(
    folder: Path, alike: Mapping[str, dict[str, Any]], missing: list[str]
) -> dict[str, float]:
    paths = [path / "eval" / STAGES[-1] for path in (folder, folder / RAW_FOLDER)]
    finals = [read_scores(path, missing) for path in paths if is_complete(path)]
    known = [
        scores
        for scores in [*finals, *list(alike.values())[-1:]]
        if scores and "accuracy_mean" in scores
    ]
    return {scores["variant"]: scores["accuracy_mean"] for scores in known}


def read_vbpe(path: Path) -> VisualBPE:
    vbpe = VisualBPE.load(path)
    if not isinstance(vbpe, VisualBPE):
        raise InputError(
            f"{path} is a published vocabulary, which gives no token its cells; use "
            "`beingvl train-vbpe`"
        )
    return vbpe


def read_codes(path: Path) -> np.ndarray:
    return CodeFolder(path).codes


def has_decoder(vqgan: Path) -> bool:
    config = vqgan / "config.json"
    return config.is_file() and json.loads(config.read_text()).get("model_type") == "janus_vqgan"


def read_vqgan(models: Sequence[Path]) -> VQGAN | None:
    """The VQ-GAN inside the first model folder that has one."""
    folder = next(
        (model / VQGAN_FOLDER for model in models if (model / VQGAN_FOLDER).is_dir()), None
    )
    return VQGAN.load(folder) if folder else None


# ---- numbers ----


def summarize(
    pieces: Run, wall_seconds: float | None, peak_memory_bytes: int | None
) -> dict[str, Any]:
    """What summary.json holds; accuracies and chance are shares 0 … 1."""
    last = list(pieces.asked_alike.values())[-1] if pieces.asked_alike else {"questions": {}}
    peaks = [row["peak_memory_bytes"] for stage in pieces.stages.values() for row in stage.rows]
    return {
        "test_accuracy_mean": last.get("accuracy_mean"),
        "test_accuracy": {
            name: {question: entry["accuracy"] for question, entry in scores["questions"].items()}
            for name, scores in pieces.asked_alike.items()
        },
        "chance": {question: entry["chance"] for question, entry in last["questions"].items()},
        "majority": {question: entry["majority"] for question, entry in last["questions"].items()},
        "variant": last.get("variant"),
        "test_accuracy_mean_of_variant": pieces.mean_of_variant,
        "test_questions": last.get("rows", 0),
        "test_images": len({str(row["image"]) for row in pieces.predictions if row["image"]}),
        "vbpe_compression": compression(pieces),
        "evaluations": {name: scores_of(scores) for name, scores in pieces.evaluations.items()},
        "frozen": [
            {**asdict(group), "is_as_promised": group.is_as_promised} for group in pieces.frozen
        ],
        "wall_seconds": wall_seconds,
        "peak_memory_bytes": peak_memory_bytes or max(peaks, default=None),
    }


def compression(pieces: Run) -> float | None:
    """Codes per token."""
    if pieces.vbpe is None or pieces.codes is None:
        return None
    ids, _ = pieces.vbpe.encode_batch(pieces.codes)
    return pieces.codes.size / len(ids)


def scores_of(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """Metric, rows and single numbers of an evaluation."""
    wanted = ("metric", "rows", "scores", "standard_errors", "equal", "equal_is_expected")
    return {name: evaluation[name] for name in wanted if name in evaluation}


def mean(values: Mapping[str, float]) -> float:
    return sum(values.values()) / len(values)


# ---- examples ----


def choose_examples(pieces: Run) -> list[Example]:
    """Ten questions evenly over the test images, taking turns through the questions asked about
    each.
    """
    rows_of_image: dict[str, list[dict[str, Any]]] = {}
    for row in pieces.predictions:
        if isinstance(row["image"], str):
            rows_of_image.setdefault(row["image"], []).append(row)
    keys = list(rows_of_image)
    chosen = np.linspace(0, len(keys) - 1, min(NUM_EXAMPLES, len(keys))).round().astype(int)
    return make_examples(
        pieces,
        [
            rows_of_image[keys[n]][turn % len(rows_of_image[keys[n]])]
            for turn, n in enumerate(chosen)
        ],
    )


def make_examples(pieces: Run, rows: list[dict[str, Any]]) -> list[Example]:
    """Images are encoded here. A VQ-GAN without decoder shows what it was given instead of what
    it makes of it.
    """
    if not rows or pieces.vqgan is None or pieces.images is None:
        return []
    images = [read_image(pieces.images / row["image"]) for row in rows]
    pixels = pieces.vqgan.preprocess(images)
    grids = pieces.vqgan.encode(pixels)
    pictures = (
        pieces.vqgan.decode(grids) if pieces.vqgan.has_decoder else pieces.vqgan.to_uint8(pixels)
    )
    return [
        Example(
            question=row["question"],
            truth=row["answer"] if isinstance(row["answer"], str) else ", ".join(row["answer"]),
            answer=row["prediction"],
            correct=row["correct"],
            key=row["image"],
            image=as_array(image),
            reconstruction=picture,
            owners=token_owners(pieces, grid),
        )
        for row, image, grid, picture in zip(rows, images, grids, pictures, strict=True)
    ]


def token_owners(pieces: Run, codes: np.ndarray) -> np.ndarray:
    """Codes `[h, w]` to the position in the stream of the token that covers each cell, `[h, w]`
    int.
    """
    if pieces.vbpe is None or list(pieces.asked_alike.values())[-1]["variant"] == "raw":
        return np.arange(codes.size).reshape(codes.shape)
    return owners(pieces.vbpe, pieces.vbpe.encode(codes), *codes.shape)


# ---- printing ----


def print_accuracy(summary: dict[str, Any]) -> None:
    accuracy, chance = summary["test_accuracy"], summary["chance"]
    if accuracy:
        width = max(map(len, [*chance, "mean"]))
        print(
            f"Accuracy on {summary['test_questions']} questions about "
            f"{summary['test_images']} held-out images\n"
        )
        print(
            f"  {'question':<{width}}  {'chance':>7}" + "".join(f"  {name:>7}" for name in accuracy)
        )
        for question in chance:
            columns = "".join(f"  {accuracy[name][question]:7.3f}" for name in accuracy)
            print(f"  {question:<{width}}  {chance[question]:7.3f}{columns}")
        print(
            f"  {'mean':<{width}}  {mean(chance):7.3f}"
            + "".join(f"  {mean(accuracy[name]):7.3f}" for name in accuracy)
        )
    if summary["vbpe_compression"]:
        print(f"\nvBPE: {summary['vbpe_compression']:.2f} codes per token on the test images")
    if len(summary["test_accuracy_mean_of_variant"]) > 1:
        variants = summary["test_accuracy_mean_of_variant"].items()
        print(
            "Mean accuracy after stage 3: "
            + ", ".join(f"{name} {value:.3f}" for name, value in variants)
        )
    for group in summary["frozen"]:
        if not group["is_as_promised"]:
            what = "trained, but unchanged" if group["is_trained"] else "frozen, but changed"
            print(f"WRONG: {group['stage']}, {group['group']}: {what}")


def print_examples(examples: list[Example]) -> None:
    if not examples:
        return
    print(
        "\nTen of them, spread evenly:"
        if len(examples) == NUM_EXAMPLES
        else "\nExamples, spread evenly:"
    )
    width = max(len(example.question) for example in examples)
    for example in examples:
        verdict = "right" if example.correct else f"wrong, it is {example.truth!r}"
        print(
            f"  {example.key:<20}  {example.question:<{width}}  "
            f"{example.answer or '(nothing)':<8}  {verdict}"
        )
