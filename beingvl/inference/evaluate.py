"""Score a model on held-out questions: every row's question is answered and compared with the reference answer.

Steps, in order:
  1. read_questions      LLaVA JSON, one question a row                                  list of Question
  2. image tokens        from --vq_codes, or encoded now from --image_path; then vBPE    key -> token ids [n] int32
  3. answer              prompts by the chat template, sorted by length, in batches      list of text
  4. score               exact match of stripped, lower-cased text, per question text
  5. OUTPUT_PATH         predictions.jsonl, summary.json, manifest.json last

`chance` of a question is one over the number of its distinct reference answers; `majority` is the share of the most frequent
one: what a model that never looks at the image can reach. A finished evaluation with the same inputs is reused, an
interrupted one continued: answers are kept in predictions.jsonl.tmp, batch by batch.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    from beingvl.inference.model import BeingVL
    from beingvl.tokenizer.vq_codes import CodeFolder

KIND = "evaluation"
PREDICTIONS_FILE = "predictions.jsonl"
SUMMARY_FILE = "summary.json"
MAX_TABLE_ROWS = 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", type=Path, required=True, help="Being-VL model folder, e.g. stage-3/final")
    add("--vbpe_path", type=Path, help="vbpe.json; default: the one inside the model folder")
    add("--raw", action="store_true", help="plain VQ codes without vBPE, for a model trained on them")
    add("--json_path", type=Path, required=True, help="LLaVA-format JSON or JSONL, one question and its reference answer a row")
    add("--image_path", type=Path, help="folder that the rows' image paths start from")
    add("--vq_codes", type=Path, help="folder of encode-images; without it the images are encoded now")
    add("--output_path", type=Path, required=True, help="folder to write")
    add("--name", help="name in the summary and the table; default: the output folder's")
    add("--batch_size", type=int, default=128, help="prompts a batch; fewer for a large model")
    add("--max_new_tokens", type=int, default=16, help="longest answer, in tokens")
    add("--limit", type=int, help="take only the first so many rows")
    add("--torch_dtype", default="float32", choices=["float32", "bfloat16", "float16"], help="of the language model")
    add("--device", help="torch device; default: the accelerator, if there is one")
    add("--overwrite", action="store_true", help="replace a finished evaluation of other inputs")


@dataclass(frozen=True)
class Question:
    """One row: what is asked about which images, and the reference answer."""

    id: str
    images: tuple[str, ...]
    prompt: str
    reference: str

    @property
    def text(self) -> str:
        """The question without image placeholders: what rows are grouped by."""
        from beingvl.data.conversation import IMAGE_PLACEHOLDER

        return " ".join(self.prompt.replace(IMAGE_PLACEHOLDER, " ").split())


def run(args: argparse.Namespace) -> None:
    from beingvl.inference.model import BeingVL
    from beingvl.manifest import already_made, hash_file, join_lineages, start_folder

    questions = read_questions(args.json_path, args.limit)
    model = BeingVL(args.model, args.vbpe_path)
    codes = open_codes(args.vq_codes) if args.vq_codes else None
    lineages = {str(args.model): model.manifest.lineage, **({str(args.vq_codes): codes.manifest.lineage} if codes else {})}
    with_vbpe = not args.raw
    request = {
        "json": hash_file(args.json_path),
        "model": model.manifest.content_hash,
        "vbpe": model.vbpe.fingerprint() if model.vbpe and with_vbpe else None,
        "images": codes.manifest.content_hash if codes else hash_images(questions, args.image_path),
        **{name: getattr(args, name) for name in ("raw", "limit", "max_new_tokens", "torch_dtype")},
    }
    lineage = join_lineages(lineages)
    if already_made(args.output_path, KIND, request, args.overwrite):
        print_table(read_summary(args.output_path))
        return
    model.load_model(args.torch_dtype, args.device)
    prompts = tokenize_questions(questions, model, image_tokens(questions, model, codes, args.image_path, with_vbpe))
    partial = PartialAnswers(start_folder(args.output_path), request)
    predictions, seconds = answer(model, prompts, partial, args)
    summary = summarize(questions, predictions)
    summary = {"name": args.name or args.output_path.name, "variant": "raw" if args.raw else "vbpe", **summary}
    write_evaluation(args.output_path, questions, predictions, summary, lineage, {"request": request, "seconds": seconds})
    partial.path.unlink()
    print_table(summary)
    print(f"{args.output_path}: {len(questions)} questions answered in {seconds:.1f} s")


# ---- reading ----


def read_questions(path: Path, limit: int | None = None) -> list[Question]:
    """Rows of a LLaVA JSON or JSONL. Raises InputError that names the row which is not one question with one answer."""
    from beingvl.data.conversation import parse_conversation
    from beingvl.data.tokenize_dataset import image_keys, read_rows
    from beingvl.errors import InputError

    if limit is not None and limit < 1:
        raise InputError(f"--limit is {limit}, expected 1 or more")
    questions = []
    for number, row in enumerate(read_rows(path)[:limit]):
        where = f"{path}, row {number} (id {row.get('id')!r})"
        try:
            turns = parse_conversation(row.get("conversations"))
        except InputError as error:
            raise InputError(f"{where}: {error}") from error
        if len(turns) != 1:
            raise InputError(f"{where} has {len(turns)} questions, expected one question a row; split it into rows")
        (prompt, reference) = turns[0]
        questions.append(Question(str(row.get("id", number)), tuple(image_keys(row)), prompt, reference or ""))
    return questions


def open_codes(path: Path) -> CodeFolder:
    from beingvl.tokenizer.vq_codes import CodeFolder

    return CodeFolder(path)


def image_paths(questions: Sequence[Question], folder: Path | None) -> dict[str, Path]:
    """Image key -> file, each image once. Raises InputError without --image_path or for a key that leaves it."""
    from beingvl.errors import InputError

    keys = sorted({key for question in questions for key in question.images})
    if keys and folder is None:
        raise InputError("the questions name images: give --vq_codes, or --image_path to encode them now")
    for key in keys:
        if Path(key).is_absolute() or ".." in Path(key).parts:
            raise InputError(f"image {key!r} leaves --image_path; expected a path below it")
    return {key: folder / key for key in keys} if folder else {}


def hash_images(questions: Sequence[Question], folder: Path | None) -> str | None:
    """One hash of all images' bytes; None when no question has an image."""
    from beingvl.manifest import hash_bytes, hash_file

    paths = image_paths(questions, folder)
    return hash_bytes("\n".join(f"{key} {hash_file(path)}" for key, path in paths.items()).encode()) if paths else None


# ---- answering ----


def image_tokens(
    questions: Sequence[Question], model: BeingVL, codes: CodeFolder | None, folder: Path | None, with_vbpe: bool
) -> dict[str, np.ndarray]:
    """Image key -> token ids `[n]` int32; every image is encoded once, however many questions are about it."""
    keys = sorted({key for question in questions for key in question.images})
    if not keys:
        return {}
    if codes:
        grids = codes.codes[[codes.row(key) for key in keys]]
    else:
        grids = model.img2codes(list(image_paths(questions, folder).values()))
    return dict(zip(keys, model.codes2tok(grids, with_vbpe), strict=True))


def tokenize_questions(questions: Sequence[Question], model: BeingVL, tokens: dict[str, np.ndarray]) -> list[list[int]]:
    return [model.tokenize_with_tokens(question.prompt, [tokens[key] for key in question.images]) for question in questions]


class PartialAnswers:
    """Answers so far, on disk: the first line is the request, then a line an answer. Those of another request are dropped."""

    def __init__(self, folder: Path, request: dict[str, Any]) -> None:
        self.path = folder / f"{PREDICTIONS_FILE}.tmp"
        self.answers: dict[int, str] = {}
        head = json.dumps(request)
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.is_file() else []
        if not lines or lines[0] != head:
            self.path.write_text(head + "\n", encoding="utf-8")
            return
        for line in lines[1:]:
            try:
                index, text = json.loads(line)
            except ValueError:  # the line that the interruption cut off
                continue
            self.answers[index] = text

    def add(self, indices: Sequence[int], answers: Sequence[str]) -> None:
        self.answers.update(zip(indices, answers, strict=True))
        with open(self.path, "a", encoding="utf-8") as file:
            file.write("".join("\n" + json.dumps(pair) for pair in zip(indices, answers, strict=True)))


def answer(
    model: BeingVL, prompts: list[list[int]], partial: PartialAnswers, args: argparse.Namespace
) -> tuple[list[str], float]:
    """Greedy answers to all prompts, and the seconds that those not in `partial` yet took."""
    import time

    from tqdm import tqdm

    started = time.perf_counter()
    missing = [index for index in range(len(prompts)) if index not in partial.answers]
    with tqdm(total=len(prompts), initial=len(partial.answers), desc="evaluate", unit="question", disable=None) as bar:

        def keep(batch: list[int], token_ids: list[list[int]]) -> None:
            partial.add([missing[index] for index in batch], [model.decode_answer(ids) for ids in token_ids])
            bar.update(len(batch))

        model.continue_token_sequences(
            [prompts[index] for index in missing], args.max_new_tokens, batch_size=args.batch_size, on_batch=keep
        )
    return [partial.answers[index] for index in range(len(prompts))], time.perf_counter() - started


# ---- scoring ----


def is_correct(prediction: str, reference: str) -> bool:
    """Exact match after stripping and lower-casing."""
    return prediction.strip().lower() == reference.strip().lower()


def summarize(questions: Sequence[Question], predictions: Sequence[str]) -> dict[str, Any]:
    """Accuracy, chance, majority and counts per question text, and the mean over question texts."""
    rows_of: dict[str, list[int]] = {}
    for index, question in enumerate(questions):
        rows_of.setdefault(question.text, []).append(index)
    per_question = {}
    for text, rows in rows_of.items():
        references = Counter(questions[row].reference.strip().lower() for row in rows)
        per_question[text] = {
            "accuracy": sum(is_correct(predictions[row], questions[row].reference) for row in rows) / len(rows),
            "chance": 1 / len(references),
            "majority": max(references.values()) / len(rows),
            "rows": len(rows),
            "distinct_answers": len(references),
        }
    num_correct = sum(
        is_correct(prediction, question.reference) for question, prediction in zip(questions, predictions, strict=True)
    )
    return {
        "metric": "exact_match",
        "rows": len(questions),
        "correct": num_correct,
        "accuracy": num_correct / len(questions),
        "accuracy_mean": sum(entry["accuracy"] for entry in per_question.values()) / len(per_question),
        "questions": per_question,
    }


def write_evaluation(
    folder: Path,
    questions: Sequence[Question],
    predictions: Sequence[str],
    summary: dict[str, Any],
    lineage: dict[str, str],
    details: dict[str, Any],
) -> None:
    """Into a folder that `start_folder` made."""
    from beingvl.manifest import to_json, write_atomically, write_manifest

    lines = [
        json.dumps(
            {
                "id": question.id,
                "image": question.images[0] if len(question.images) == 1 else list(question.images),
                "question": question.text,
                "answer": question.reference,
                "prediction": prediction,
                "correct": is_correct(prediction, question.reference),
            },
            ensure_ascii=False,
        )
        for question, prediction in zip(questions, predictions, strict=True)
    ]
    write_atomically(folder / PREDICTIONS_FILE, "\n".join(lines) + "\n")
    write_atomically(folder / SUMMARY_FILE, to_json(summary))
    write_manifest(folder, KIND, {"rows": summary["rows"], "correct": summary["correct"]}, lineage, details)


def read_summary(folder: Path) -> dict[str, Any]:
    """summary.json of a finished evaluation. Raises InputError when the folder is none."""
    from beingvl.manifest import read_manifest

    read_manifest(folder, KIND)
    return json.loads((folder / SUMMARY_FILE).read_text(encoding="utf-8"))


def read_predictions(folder: Path) -> list[dict[str, Any]]:
    """All lines of a finished evaluation's predictions.jsonl."""
    from beingvl.manifest import read_manifest

    read_manifest(folder, KIND)
    with open(folder / PREDICTIONS_FILE, encoding="utf-8") as file:  # str.splitlines would also break at U+2028 in an answer
        return [json.loads(line) for line in file]


def print_table(summary: dict[str, Any]) -> None:
    """Question, accuracy, chance, majority, rows; the most frequent questions only, when there are many."""
    entries = sorted(summary["questions"].items(), key=lambda item: -item[1]["rows"])
    width = max(len(text[:60]) for text, _ in entries)
    print(f"{summary['name']} ({summary['variant']}), {summary['metric']}")
    print(f"  {'question':<{width}}  accuracy  chance  majority    rows")
    for text, entry in entries[:MAX_TABLE_ROWS]:
        columns = f"{entry['accuracy']:8.3f}  {entry['chance']:6.3f}  {entry['majority']:8.3f}  {entry['rows']:6d}"
        print(f"  {text[:60]:<{width}}  {columns}")
    if len(entries) > MAX_TABLE_ROWS:
        print(f"  … and {len(entries) - MAX_TABLE_ROWS} more questions in {SUMMARY_FILE}")
    print(f"  {'mean over questions':<{width}}  {summary['accuracy_mean']:8.3f}  {'':6}  {'':8}  {summary['rows']:6d}")


if __name__ == "__main__":
    import sys

    from beingvl.cli import main

    sys.exit(main(["evaluate", *sys.argv[1:]]))
