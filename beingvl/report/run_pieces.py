"""The pieces of a run, as far as they exist, and example answers chosen from them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from beingvl.artefact.manifest import is_complete, read_manifest
from beingvl.errors import InputError
from beingvl.evaluation.results import KIND, read_predictions, read_summary
from beingvl.images.decode import read_image
from beingvl.images.preprocess import exif_of
from beingvl.images.vq_codes import CodeFolder
from beingvl.images.vqgan import VQGAN
from beingvl.inference.model import VQGAN_FOLDER
from beingvl.report.data import DataOptions
from beingvl.report.frozen import GroupHashes, hash_groups
from beingvl.report.train import TrainedStage, read_stage
from beingvl.report.vbpe import load_own_vbpe
from beingvl.train.metrics import METRICS_FILE
from beingvl.vbpe.visual_bpe import VisualBPE, owners

STAGES = ("stage-1", "stage-2", "stage-3")
RAW_FOLDER = "raw"
"""Folder of the stages that a run trained on plain codes."""
NUM_EXAMPLES = 10
MOST_CONFUSED = 12
"""Questions with more different answers get no table: it would be too large to read."""


@dataclass(frozen=True)
class RunPaths:
    """Where the pieces of a run are; None means in the run's folder."""

    run: Path | str
    stages: Path | str | None = None
    base: Path | str | None = None
    data: Sequence[Path | str] = ()
    vbpe: Path | str | None = None
    codes: Path | str | None = None
    images: Path | str | None = None


@dataclass(frozen=True)
class Run:
    """The pieces of a run that exist. `missing` describes the others.

    `evaluations` holds scores by name; `asked_alike` those of base and stages with the same
    questions, in order; `mean_of_variant` the mean accuracy after the last stage, with vBPE and
    with plain codes, for the variants that were trained.
    """

    stages: dict[str, TrainedStage]
    evaluations: dict[str, dict[str, Any]]
    asked_alike: dict[str, dict[str, Any]]
    predictions: list[dict[str, Any]]
    mean_of_variant: dict[str, float]
    frozen: list[GroupHashes]
    vbpe: VisualBPE | None
    codes: np.ndarray | None
    vqgan: VQGAN | None
    images: Path | None
    shards: list[Path]
    data_options: DataOptions
    missing: list[str]


@dataclass(frozen=True)
class Example:
    """One test question and its picture in three forms.

    `image`, as the encoder saw it, and `reconstruction` are `[H, W, 3]`; `owners` `[h, w]` is the
    token that covers each cell of the code grid.
    """

    question: str
    truth: str
    answer: str
    correct: bool
    key: str
    image: np.ndarray
    reconstruction: np.ndarray
    owners: np.ndarray


def read_run(paths: RunPaths) -> Run:
    """Raises InputError if there is no stage or evaluation, or if a given path does not exist."""
    folder, stages = Path(paths.run), Path(paths.stages or paths.run)
    if not folder.is_dir():
        raise InputError(
            f"{folder} is not a folder; give the folder that holds stage-1/, stage-2/ … and eval/"
        )
    missing: list[str] = []
    trained = _read_stages(stages, missing)
    evaluations = _read_evaluations(stages / "eval")
    if not trained and not evaluations:
        raise InputError(
            f"{stages} holds neither stage-1/{METRICS_FILE} nor a finished evaluation in eval/: "
            "nothing to report"
        )
    alike = _asked_alike(evaluations)
    if not alike:
        made_by = f"{stages / 'eval' / STAGES[-1]}, made by `beingvl evaluate`"
        missing.append(f"accuracy after each stage ({made_by})")

    def piece(option: str, given: Path | str | None, default: Path, what: str) -> Path | None:
        path = default if given is None else Path(given)
        if path.exists():
            return path
        if given is not None:
            raise InputError(f"--{option} {given} does not exist")
        missing.append(f"{what} ({default}, or --{option})")
        return None

    base = piece("base_path", paths.base, folder / "base", "the base model")
    vbpe_path = piece("vbpe_path", paths.vbpe, folder / "vbpe", "the vBPE")
    of_test = folder / "vq_codes" / "test"
    codes = piece("vq_codes", paths.codes, of_test, "codes to measure the vBPE on")
    images_folder = folder / "data" / "images"
    images = piece("image_path", paths.images, images_folder, "images of the examples")
    shards = list(map(Path, paths.data)) or sorted(filter(is_complete, folder.glob("shards*")))
    missing += [] if shards else [f"the data ({folder}/shards*, or --data)"]
    finals = {name: stages / name / "final" for name in STAGES}
    finals = {name: final for name, final in finals.items() if is_complete(final)}
    models = [*reversed(finals.values()), *([base] if base else [])]
    vbpe, vqgan = load_own_vbpe(vbpe_path) if vbpe_path else None, _read_vqgan(models)
    return Run(
        stages=trained,
        evaluations=evaluations,
        asked_alike=alike,
        predictions=read_predictions(stages / "eval" / list(alike)[-1]) if alike else [],
        mean_of_variant=_mean_of_variants(folder, alike),
        frozen=hash_groups(finals, base),
        vbpe=vbpe,
        codes=CodeFolder(codes).codes if codes else None,
        vqgan=vqgan,
        images=images,
        shards=shards,
        data_options=_data_options(models, vqgan, vbpe),
        missing=missing,
    )


def _read_stages(folder: Path, missing: list[str]) -> dict[str, TrainedStage]:
    found = {name: read_stage(folder / name) for name in STAGES}
    missing += [
        f"the curves of {name} ({folder / name / METRICS_FILE})"
        for name, stage in found.items()
        if not stage.rows
    ]
    return {name: stage for name, stage in found.items() if stage.rows}


def _read_evaluations(folder: Path) -> dict[str, dict[str, Any]]:
    """Scores of all finished evaluations, by folder name: base, the stages, then the others."""
    order = ("base", *STAGES)
    found = {
        path.name: read_summary(path)
        for path in sorted(folder.glob("*"))
        if is_complete(path) and read_manifest(path).kind == KIND
    }
    return {name: found[name] for name in order if name in found} | found


def _asked_alike(evaluations: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Evaluations of base and stages with the same questions as the last one; empty if none has
    scores per question.
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


def _mean_of_variants(folder: Path, alike: Mapping[str, dict[str, Any]]) -> dict[str, float]:
    paths = [path / "eval" / STAGES[-1] for path in (folder, folder / RAW_FOLDER)]
    known = [read_summary(path) for path in paths if is_complete(path)]
    known += list(alike.values())[-1:]
    return {
        scores["variant"]: scores["accuracy_mean"] for scores in known if "accuracy_mean" in scores
    }


def _read_vqgan(models: Sequence[Path]) -> VQGAN | None:
    """The VQ-GAN inside the first model folder that has one."""
    folders = (model / VQGAN_FOLDER for model in models)
    folder = next((folder for folder in folders if folder.is_dir()), None)
    if folder is None:
        return None
    return VQGAN.load(folder, exif=exif_of(read_manifest(folder.parent).lineage))


def _data_options(
    models: Sequence[Path], vqgan: VQGAN | None, vbpe: VisualBPE | None
) -> DataOptions:
    """Options for the section about the run's shards, with the last stage's sequence length."""
    decoder = vqgan if vqgan is not None and vqgan.has_decoder else None
    identity = read_manifest(models[0]).details.get("identity", {}) if models else {}
    return DataOptions(
        model_path=models[0] if models else None,
        vqgan=decoder,
        vbpe=vbpe,
        sequence_length=identity.get("sequence_length", DataOptions.sequence_length),
    )


# ---- examples ----


def choose_examples(pieces: Run) -> list[Example]:
    """Ten test images, evenly spread, with one question each, in turn."""
    rows_of_image: dict[str, list[dict[str, Any]]] = {}
    for row in pieces.predictions:
        if isinstance(row["image"], str):
            rows_of_image.setdefault(row["image"], []).append(row)
    asked = list(rows_of_image.values())
    spread = _spread(len(asked))
    rows = [asked[number][turn % len(asked[number])] for turn, number in enumerate(spread)]
    return _make_examples(pieces, rows)


def choose_wrong(pieces: Run) -> list[Example]:
    """Ten wrong answers, evenly spread over all of them."""
    wrong = [row for row in pieces.predictions if isinstance(row["image"], str)]
    wrong = [row for row in wrong if not row["correct"]]
    return _make_examples(pieces, [wrong[number] for number in _spread(len(wrong))])


def _spread(count: int) -> list[int]:
    return np.linspace(0, count - 1, min(NUM_EXAMPLES, count)).round().astype(int).tolist()


def confusions(predictions: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Counter[str]]]:
    """Question -> truth -> count of each answer; "…" counts answers that are no truth of the
    question.

    Only for questions with few truths, each a single text.
    """
    found: dict[str, dict[str, Counter[str]]] = {}
    for row in predictions:
        if isinstance(row["answer"], str):
            counts = found.setdefault(row["question"], {})
            answer = row["prediction"].strip().lower()
            counts.setdefault(row["answer"].strip().lower(), Counter())[answer] += 1
    return {
        question: {
            truth: Counter({answer: answers[answer] for answer in counts})
            + Counter(
                {"…": sum(count for answer, count in answers.items() if answer not in counts)}
            )
            for truth, answers in sorted(counts.items())
        }
        for question, counts in found.items()
        if 1 < len(counts) <= MOST_CONFUSED
    }


def _make_examples(pieces: Run, rows: list[dict[str, Any]]) -> list[Example]:
    """Encodes the rows' images; without a decoder, the reconstruction is the input."""
    if not rows or pieces.vqgan is None or pieces.images is None:
        return []
    oriented = pieces.vqgan.preprocessing.oriented
    images = [oriented(read_image(pieces.images / row["image"])) for row in rows]
    pixels = pieces.vqgan.preprocess(images)
    grids, seen = pieces.vqgan.encode(pixels), pieces.vqgan.to_uint8(pixels)
    decoder = pieces.data_options.vqgan
    pictures = decoder.decode(grids) if decoder else seen
    return [
        Example(
            question=row["question"],
            truth=row["answer"] if isinstance(row["answer"], str) else ", ".join(row["answer"]),
            answer=row["prediction"],
            correct=row["correct"],
            key=row["image"],
            image=image,
            reconstruction=picture,
            owners=_token_owners(pieces, grid),
        )
        for row, image, grid, picture in zip(rows, seen, grids, pictures, strict=True)
    ]


def _token_owners(pieces: Run, codes: np.ndarray) -> np.ndarray:
    """Codes `[h, w]` -> stream position of the token that covers each cell."""
    if pieces.vbpe is None or list(pieces.asked_alike.values())[-1]["variant"] == "raw":
        return np.arange(codes.size).reshape(codes.shape)
    return owners(pieces.vbpe, pieces.vbpe.encode(codes), *codes.shape)
