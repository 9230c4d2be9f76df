"""What the whole line did, on held-out images: numbers, pictures, one page.

Reads the pieces of RUN_FOLDER

    data/{images,test.json}  vqgan/  vq_codes/test/  vbpe/vbpe.json  stage-N/metrics.jsonl  eval/{base,stage-1,stage-2,stage-3}/

(the stages and eval/ from --stages_path, where they lie elsewhere: a run on plain codes keeps them in raw/) and writes

    summary.json         accuracy per question after each stage, chance, compression, time, memory
    contact_sheet.png    image, reconstruction, token borders, question, answer and truth of ten test images
    training.png         loss of each stage, accuracy after it
    index.html           all of it on one self-contained page
    manifest.json        last

The ten examples are spread evenly over the test questions; nothing is chosen by its answer.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    from beingvl.tokenizer.vbpe import VisualBPE
    from beingvl.tokenizer.vq_codes import CodeFolder

STAGES = ("stage-1", "stage-2", "stage-3")
EVALUATIONS = ("base", *STAGES)
NUM_EXAMPLES = 10
RAW_FOLDER = "raw"
"""Where a run keeps the stages that it trained on plain codes."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("run_folder", type=Path, help="folder of the run")
    add("--stages_path", type=Path, help="folder with stage-N/ and eval/; default: RUN_FOLDER")
    add("--output_path", type=Path, help="folder to write; default: report/ beside the stages")
    add("--wall_seconds", type=float, help="seconds the whole run took, for the summary")
    add("--peak_memory_bytes", type=int, help="of the whole run; default: the largest in the stages' metrics, which are rank 0's")


@dataclass(frozen=True)
class Run:
    """The pieces of a run. `evaluations` and `metrics` hold those stages that are there; stage 3's evaluation always is.

    `mean_of_variant` is the mean accuracy after stage 3 with vBPE and with plain codes, as far as both were trained.
    """

    folder: Path
    evaluations: dict[str, dict[str, Any]]
    predictions: list[dict[str, Any]]
    metrics: dict[str, list[dict[str, Any]]]
    codes: CodeFolder
    vbpe: VisualBPE
    mean_of_variant: dict[str, float]


@dataclass(frozen=True)
class Example:
    """One test question with its picture in three forms.

    `image` and `reconstruction` are `[H, W, 3]`, `owners` `[h, w]` says which token covers each cell of the code grid.
    """

    question: str
    truth: str
    answer: str
    correct: bool
    key: str
    image: np.ndarray
    reconstruction: np.ndarray
    owners: np.ndarray


def run(args: argparse.Namespace) -> None:
    from beingvl.inference.report_page import page
    from beingvl.inference.report_pictures import contact_sheet, training_curves
    from beingvl.manifest import start_folder, to_json, write_atomically, write_manifest

    stages = args.stages_path or args.run_folder
    pieces = read_run(args.run_folder, stages)
    summary = summarize(pieces, args.wall_seconds, args.peak_memory_bytes)
    examples = choose_examples(pieces)
    sheet = contact_sheet(examples)
    curves = training_curves(pieces.metrics, summary["test_accuracy"], summary["chance"])
    folder = start_folder(args.output_path or stages / "report")
    write_atomically(folder / "summary.json", to_json(summary))
    write_atomically(folder / "contact_sheet.png", sheet)
    write_atomically(folder / "training.png", curves)
    write_atomically(folder / "index.html", page(summary, examples, sheet, curves))
    write_manifest(folder, "report", {"examples": len(examples)}, pieces.codes.manifest.lineage)
    print_accuracy(summary)
    print_examples(examples)
    print(f"\n{folder}: summary.json, contact_sheet.png, training.png, index.html")


# ---- reading ----


def read_run(folder: Path, stages: Path) -> Run:
    """Raises InputError that names the piece which is missing."""
    from beingvl.errors import InputError
    from beingvl.inference.evaluate import read_predictions, read_summary
    from beingvl.manifest import is_complete
    from beingvl.tokenizer.vbpe import VisualBPE
    from beingvl.tokenizer.vq_codes import CodeFolder
    from beingvl.train.metrics import METRICS_FILE, read_metrics

    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder; make the run with `bash scripts/quickstart.sh`")
    last = STAGES[-1]
    evaluations = {name: read_summary(stages / "eval" / name) for name in EVALUATIONS if is_complete(stages / "eval" / name)}
    if last not in evaluations:
        raise InputError(f"{stages / 'eval' / last} is not a finished evaluation; make it with `beingvl evaluate`")
    for name, evaluation in evaluations.items():
        if set(evaluation["questions"]) != set(evaluations[last]["questions"]):
            raise InputError(f"{stages / 'eval'}: {name} and {last} were asked different questions; evaluate both on one JSON")
    vbpe = VisualBPE.load(folder / "vbpe")
    if not isinstance(vbpe, VisualBPE):
        raise InputError(f"{folder / 'vbpe'} is a published vocabulary, which gives no token its cells; use `beingvl train-vbpe`")
    finals = [read_summary(path / "eval" / last) for path in (folder, folder / RAW_FOLDER) if is_complete(path / "eval" / last)]
    return Run(
        folder=folder,
        evaluations=evaluations,
        predictions=read_predictions(stages / "eval" / last),
        metrics={name: read_metrics(stages / name) for name in STAGES if (stages / name / METRICS_FILE).is_file()},
        codes=CodeFolder(folder / "vq_codes" / "test"),
        vbpe=vbpe,
        mean_of_variant={final["variant"]: final["accuracy_mean"] for final in [*finals, evaluations[last]]},
    )


# ---- numbers ----


def summarize(pieces: Run, wall_seconds: float | None, peak_memory_bytes: int | None) -> dict[str, Any]:
    """What summary.json holds; accuracies and chance are shares 0 … 1."""
    last = pieces.evaluations[STAGES[-1]]
    peaks = [row["peak_memory_bytes"] for rows in pieces.metrics.values() for row in rows]
    ids, _ = pieces.vbpe.encode_batch(pieces.codes.codes)
    return {
        "test_accuracy_mean": last["accuracy_mean"],
        "test_accuracy": {
            name: {question: entry["accuracy"] for question, entry in summary["questions"].items()}
            for name, summary in pieces.evaluations.items()
        },
        "chance": {question: entry["chance"] for question, entry in last["questions"].items()},
        "majority": {question: entry["majority"] for question, entry in last["questions"].items()},
        "variant": last["variant"],
        "test_accuracy_mean_of_variant": pieces.mean_of_variant,
        "test_questions": last["rows"],
        "test_images": len(pieces.codes.codes),
        "vbpe_compression": pieces.codes.codes.size / len(ids),
        "wall_seconds": wall_seconds,
        "peak_memory_bytes": peak_memory_bytes or max(peaks, default=None),
    }


def mean(values: dict[str, float]) -> float:
    return sum(values.values()) / len(values)


# ---- examples ----


def choose_examples(pieces: Run) -> list[Example]:
    """Ten questions evenly over the test images, taking turns through the questions asked about each."""
    import numpy as np

    rows_of_image: dict[str, list[dict[str, Any]]] = {}
    for row in pieces.predictions:
        if isinstance(row["image"], str):
            rows_of_image.setdefault(row["image"], []).append(row)
    keys = list(rows_of_image)
    chosen = np.linspace(0, len(keys) - 1, min(NUM_EXAMPLES, len(keys))).round().astype(int)
    rows = [rows_of_image[keys[index]][turn % len(rows_of_image[keys[index]])] for turn, index in enumerate(chosen)]
    return make_examples(pieces, rows)


def make_examples(pieces: Run, rows: list[dict[str, Any]]) -> list[Example]:
    from matplotlib.image import imread

    from beingvl.tokenizer.vqgan import VQGAN

    if not rows:
        return []
    grids = pieces.codes.codes[[pieces.codes.row(row["image"]) for row in rows]]
    pictures = VQGAN.load(pieces.folder / "vqgan").decode(grids)
    return [
        Example(
            question=row["question"],
            truth=row["answer"],
            answer=row["prediction"],
            correct=row["correct"],
            key=row["image"],
            image=imread(pieces.folder / "data" / "images" / row["image"]),
            reconstruction=picture,
            owners=token_owners(pieces, grid),
        )
        for row, grid, picture in zip(rows, grids, pictures, strict=True)
    ]


def token_owners(pieces: Run, codes: np.ndarray) -> np.ndarray:
    """Codes `[h, w]` to the position in the stream of the token that covers each cell, `[h, w]` int."""
    import numpy as np

    from beingvl.tokenizer.report_vbpe import owners

    if pieces.evaluations[STAGES[-1]]["variant"] == "raw":
        return np.arange(codes.size).reshape(codes.shape)
    return owners(pieces.vbpe, pieces.vbpe.encode(codes), *codes.shape)


# ---- printing ----


def print_accuracy(summary: dict[str, Any]) -> None:
    accuracy, chance = summary["test_accuracy"], summary["chance"]
    width = max(map(len, [*chance, "mean"]))
    print(f"Accuracy on {summary['test_questions']} questions about {summary['test_images']} held-out images\n")
    print(f"  {'question':<{width}}  {'chance':>7}" + "".join(f"  {name:>7}" for name in accuracy))
    for question in chance:
        columns = "".join(f"  {accuracy[name][question]:7.3f}" for name in accuracy)
        print(f"  {question:<{width}}  {chance[question]:7.3f}{columns}")
    print(f"  {'mean':<{width}}  {mean(chance):7.3f}" + "".join(f"  {mean(accuracy[name]):7.3f}" for name in accuracy))
    print(f"\nvBPE: {summary['vbpe_compression']:.2f} codes per token on the test images")
    if len(summary["test_accuracy_mean_of_variant"]) > 1:
        variants = summary["test_accuracy_mean_of_variant"].items()
        print("Mean accuracy after stage 3: " + ", ".join(f"{name} {value:.3f}" for name, value in variants))


def print_examples(examples: list[Example]) -> None:
    print("\nTen of them, spread evenly:" if len(examples) == NUM_EXAMPLES else "\nExamples, spread evenly:")
    width = max((len(example.question) for example in examples), default=0)
    for example in examples:
        verdict = "right" if example.correct else f"wrong, it is {example.truth!r}"
        print(f"  {example.key:<20}  {example.question:<{width}}  {example.answer or '(nothing)':<8}  {verdict}")
