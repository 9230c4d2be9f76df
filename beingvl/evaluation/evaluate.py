"""Score a model: answers to held-out questions, loss on held-out shards, or its text logits
against the base model's.

One of three, each into a folder of its own:
  --json_path FILE      answer every row's question greedily and score the answers by --metric
  --data SHARDS         loss and perplexity per source and token kind, computed as in training
  --text_parity BASE    do-no-harm check on a fixed text: after stage 1 the logits of all text
                        ids equal the base model's bit for
                        bit (a difference is exit code 1); after stages 2 and 3 the KL divergence is
                        printed

Rows of --json_path: LLaVA format, one question a row. Its reference answer is `answers` (a list of
texts, or of objects with `answer`), else `answer` (a text, or a number into the list `choices`),
else the gpt turn. `category` groups scores.
  exact_match    equal to a reference after stripping and lower-casing
  vqa_accuracy   VQAv2, VizWiz, TextVQA: ten `answers` a row, official normalisation
  pope           answer yes or no; accuracy, precision, recall, F1, share of yes; `category`
                 random, popular, adversarial
  mme            answer yes or no; `category` is the MME task, two questions an image;
                 perception and cognition score
  scienceqa      answer is a letter A … E, or a number into `choices`
  anls           DocVQA, ST-VQA: similarity with the best of `answers`, 0 below 0.5
  bleu, cider    captions; pip install '.[evaluation]'

OUTPUT_PATH gets scores.json (with standard errors), predictions.jsonl or samples.jsonl, and
manifest.json last. The work is cut into parts of --rows_per_part (beingvl/artefact/parts.py):
started by a launcher or as a Slurm array, every rank makes its share; killed, it is started again
with any number of ranks and makes what is missing. A finished evaluation with the same inputs is
reused.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from beingvl.artefact.files import to_json, write_atomically
from beingvl.artefact.manifest import (
    already_made,
    is_complete,
    read_manifest,
    start_folder,
    write_manifest,
)
from beingvl.artefact.parts import (
    OvertakenError,
    Parts,
    locked,
    ranks_of,
    refuse_overwrite_of_many,
    remove_parts,
)
from beingvl.errors import InputError
from beingvl.evaluation.held_out_loss import HeldOutLoss
from beingvl.evaluation.question_answering import Answering
from beingvl.evaluation.text_parity import check_base, text_parity
from beingvl.images.vqgan import usable_device

KIND = "evaluation"
PREDICTIONS_FILE = "predictions.jsonl"
SCORES_FILE = "scores.json"
MAX_TABLE_ROWS = 20
_ANSWER_OPTIONS = (
    "metric",
    "image_path",
    "vq_codes",
    "vbpe_path",
    "raw",
    "max_new_tokens",
    "batch_size",
)
UNUSED_OPTIONS = {
    "json_path": ("loss_on",),
    "data": _ANSWER_OPTIONS,
    "text_parity": (*_ANSWER_OPTIONS, "loss_on", "limit"),
}
"""What is evaluated -> the options that say nothing about it."""


def run(args: argparse.Namespace) -> int:
    for name in ("rows_per_part", "batch_size", "max_new_tokens", "limit"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise InputError(f"--{name} is {getattr(args, name)}, expected 1 or more")
    refuse_unused_options(args)
    rank, num_ranks = ranks_of(args)
    refuse_overwrite_of_many(args.overwrite, num_ranks, args.output_path)
    if args.text_parity:
        return evaluate_text_parity(args)
    if args.json_path:
        evaluate_in_parts(Answering(args, device_of(args)), args, rank, num_ranks)
    else:
        evaluate_in_parts(HeldOutLoss(args, device_of(args)), args, rank, num_ranks)
    return 0


def refuse_unused_options(args: argparse.Namespace) -> None:
    """An option that has no effect on what was asked for, and is not at its default, was meant
    for something else.
    """
    parser = argparse.ArgumentParser()
    importlib.import_module("beingvl.commands.evaluate").add_arguments(parser)
    what = next(name for name in UNUSED_OPTIONS if getattr(args, name) is not None)
    for name in UNUSED_OPTIONS[what]:
        if getattr(args, name) != parser.get_default(name):
            raise InputError(f"--{name} has no effect on --{what}; leave it out")


def device_of(args: argparse.Namespace) -> str:
    """The launcher sets LOCAL_RANK, the number of this rank's accelerator on its machine."""
    own = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"
    return str(usable_device(args.device or own))


# ---- questions and loss: in parts ----


def evaluate_in_parts(
    work: Answering | HeldOutLoss, args: argparse.Namespace, rank: int, num_ranks: int
) -> None:
    """Make this rank's missing parts; the rank that finds all of them finished joins them."""
    output = args.output_path
    with locked(output):
        if args.overwrite:
            start_folder(output, KIND)
            remove_parts(output)
        if is_complete(output):
            already_made(output, KIND, work.request())
            remove_parts(output)
            print_scores(read_summary(output))
            return
        parts = Parts(output, {**work.parts_request, "rows_per_part": args.rows_per_part})
        num_parts = -(-work.num_rows // args.rows_per_part)
        mine = [number for number in parts.missing(num_parts) if number % num_ranks == rank]
    with suppress(OvertakenError):
        _make_parts(work, parts, mine, args.rows_per_part)
    with locked(output):
        if not parts.are_to_be_joined(num_parts, is_complete(output), rank, num_ranks):
            return
        found, request, counts = work.finish(parts, num_parts, output)
        write_scores(args, found, work.lineage, {"request": request, **counts})
        parts.remove()
    print(
        f"{output}: {work.num_rows} {work.unit}s in {counts['seconds']:.1f} s of all ranks together"
    )


def _make_parts(
    work: Answering | HeldOutLoss, parts: Any, numbers: list[int], rows_per_part: int
) -> None:
    ranges = [
        range(number * rows_per_part, min((number + 1) * rows_per_part, work.num_rows))
        for number in numbers
    ]
    with tqdm(total=sum(map(len, ranges)), desc="evaluate", unit=work.unit, disable=None) as bar:
        for number, rows in zip(numbers, ranges, strict=True):
            with parts.writing(number) as folder:
                work.write_part(rows, folder, bar.update)


# ---- text parity ----


def evaluate_text_parity(args: argparse.Namespace) -> int:
    """Exit code 1 when the text logits should be the base model's and are not."""
    device = str(usable_device(args.device or "cpu"))
    request = {**check_base(args.model, args.text_parity), "torch_dtype": args.torch_dtype}
    if not already_made(args.output_path, KIND, request, args.overwrite):
        found = text_parity(args.model, args.text_parity, args.torch_dtype, device)
        start_folder(args.output_path, KIND)
        write_scores(args, found, read_manifest(args.model).lineage, {"request": request})
    else:
        print_scores(read_summary(args.output_path))
    scores = read_summary(args.output_path)
    if scores["equal_is_expected"] and not scores["equal"]:
        difference = scores["scores"]["max_logit_difference"]
        print(
            "DIFFERENT: only new rows were trained, but text logits differ from "
            f"{args.text_parity} by up to {difference:.3g}"
        )
        return 1
    return 0


# ---- what is written and read ----


def write_scores(
    args: argparse.Namespace,
    found: Mapping[str, Any],
    lineage: Mapping[str, str],
    details: Mapping[str, Any],
) -> None:
    """scores.json, then the manifest; prints the table."""
    scores = {"name": args.name or args.output_path.name, **found}
    write_atomically(args.output_path / SCORES_FILE, to_json(scores))
    write_manifest(args.output_path, KIND, {"rows": scores["rows"]}, lineage, details)
    print_scores(scores)


def read_summary(folder: Path) -> dict[str, Any]:
    """scores.json of a finished evaluation. Raises InputError when the folder is none."""
    read_manifest(folder, KIND)
    if not (folder / SCORES_FILE).is_file():
        raise InputError(
            f"{folder} has no {SCORES_FILE}: an older version made it; evaluate again with "
            "--overwrite"
        )
    return json.loads((folder / SCORES_FILE).read_text(encoding="utf-8"))


def read_predictions(folder: Path) -> list[dict[str, Any]]:
    """All lines of a finished evaluation's predictions.jsonl."""
    read_manifest(folder, KIND)
    with open(
        folder / PREDICTIONS_FILE, encoding="utf-8"
    ) as file:  # str.splitlines would also break at U+2028 in an answer
        return [json.loads(line) for line in file]


def print_scores(scores: Mapping[str, Any]) -> None:
    """Every score with its standard error, then categories, sources or questions."""
    print(
        f"{scores['name']}: {scores['metric']}, {scores['rows']} rows"
        + (f" ({scores['variant']})" if "variant" in scores else "")
    )
    for name, value in scores["scores"].items():
        error = scores["standard_errors"].get(name)
        print(f"  {name:<22} {value:12.6g}" + (f"  ± {error:.2g}" if error is not None else ""))
    for group in ("categories", "sources", "kinds"):
        for name, entry in scores.get(group, {}).items():
            print(
                f"  {name:<22} " + "  ".join(f"{key} {value:.4g}" for key, value in entry.items())
            )
    if "equal" in scores:
        print(f"  text logits are {'equal to the bit' if scores['equal'] else 'not equal'}")
    if "questions" in scores:
        print_questions(scores)


def print_questions(scores: Mapping[str, Any]) -> None:
    """Question, accuracy, chance, majority, rows; the most frequent questions only, when there
    are many.
    """
    entries = sorted(scores["questions"].items(), key=lambda item: -item[1]["rows"])
    width = max(len(text[:60]) for text, _ in entries)
    print(f"  {'question':<{width}}  accuracy  chance  majority    rows")
    for text, entry in entries[:MAX_TABLE_ROWS]:
        columns = (
            f"{entry['accuracy']:8.3f}  {entry['chance']:6.3f}  {entry['majority']:8.3f} "
            f" {entry['rows']:6d}"
        )
        print(f"  {text[:60]:<{width}}  {columns}")
    if len(entries) > MAX_TABLE_ROWS:
        print(f"  … and {len(entries) - MAX_TABLE_ROWS} more questions in {SCORES_FILE}")
    print(
        f"  {'mean over questions':<{width}}  {scores['accuracy_mean']:8.3f}  {'':6}  "
        f"{'':8}  {scores['rows']:6d}"
    )
