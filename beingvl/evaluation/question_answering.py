"""Questions of a LLaVA JSON, a model's greedy answers, and their scores.

    read_questions          rows -> questions with reference answers, checked against the metric
    Answering.write_part    a range of rows: image tokens, prompts by the chat template, answers
                            in batches -> one part
    Answering.finish        all parts -> predictions.jsonl, and what scores.json says

Where a row keeps its reference answer: in `answers` (a list of texts, or of objects with `answer`),
else in `answer` (a text, or a number into the list `choices`), else in the gpt turn of
`conversations`.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from beingvl.artefact.files import printable, write_atomically
from beingvl.artefact.hashes import hash_bytes, hash_file
from beingvl.artefact.manifest import join_lineages
from beingvl.artefact.parts import Parts
from beingvl.data.conversation import IMAGE_PLACEHOLDER, parse_conversation
from beingvl.data.tokenize_dataset import image_keys, read_rows
from beingvl.errors import InputError
from beingvl.evaluation.metrics import METRICS, Reference, Scores
from beingvl.images.vq_codes import CodeFolder
from beingvl.inference.model import BeingVL

PREDICTIONS_FILE = "predictions.jsonl"
_PART_FILE, _IMAGES_FILE, _COUNTS_FILE = "answers.jsonl", "images.json", "counts.json"


@dataclass(frozen=True)
class Question:
    """One row: what is asked about which images, and what is known of the answer. `id` is the
    row's own, else its number.
    """

    id: Any
    prompt: str
    reference: Reference

    @property
    def images(self) -> tuple[str, ...]:
        return self.reference.images

    @property
    def text(self) -> str:
        """The question without image placeholders: what rows are grouped by."""
        return " ".join(self.prompt.replace(IMAGE_PLACEHOLDER, " ").split())


# ---- reading ----


def read_questions(
    path: Path, limit: int | None = None, metric: str = "exact_match"
) -> list[Question]:
    """Rows of a LLaVA JSON or JSONL.

    Raises InputError that names the row which is not one question with a reference answer, or which
    `metric` cannot score.
    """
    if limit is not None and limit < 1:
        raise InputError(f"--limit is {limit}, expected 1 or more")
    rows = read_rows(path)[:limit]
    questions = []
    for number, row in enumerate(rows):
        try:
            questions.append(_question(row, number))
        except InputError as error:
            raise InputError(f"{_place(path, number, row.get('id'))}: {error}") from error
    for number, problem in METRICS[metric].problems([question.reference for question in questions]):
        raise InputError(
            f"{_place(path, number, rows[number].get('id'))} {problem}; correct it or "
            "choose another --metric"
        )
    return questions


def _place(path: Path, number: int, id_: Any) -> str:
    return f"{path}, row {number} (id {id_!r})"


def _question(row: Mapping[str, Any], number: int) -> Question:
    answers = _given_answers(row)
    conversations = row.get("conversations")
    if (
        isinstance(conversations, list) and len(conversations) == 1
    ):  # the answer stands beside the conversation
        if not answers:
            raise InputError(
                "there is no reference answer; give `answer`, `answers` or a gpt turn in "
                "`conversations`"
            )
        conversations = [*conversations, {"from": "gpt", "value": answers[0] or "-"}]
    turns = parse_conversation(conversations)
    if len(turns) != 1:
        raise InputError(
            f"found {len(turns)} questions, expected one question a row; split it into rows"
        )
    ((prompt, spoken),) = turns
    category = row.get("category")
    reference = Reference(
        tuple(answers) or (spoken or "",),
        None if category is None else str(category),
        tuple(image_keys(dict(row))),
    )
    return Question(row.get("id", number), prompt, reference)


def _given_answers(row: Mapping[str, Any]) -> list[str]:
    """Texts of `answers` or `answer`; none when the row has neither. Raises InputError for what
    is no text.
    """
    if "answers" in row:
        entries = row["answers"] if isinstance(row["answers"], list) else []
        texts = [entry.get("answer") if isinstance(entry, dict) else entry for entry in entries]
        if not texts or not all(isinstance(text, str) for text in texts):
            raise InputError(
                f"`answers` is {str(row['answers'])[:60]!r}, expected a list of texts or of "
                "objects with `answer`"
            )
        return [str(text) for text in texts]
    if "answer" not in row:
        return []
    answer, choices = row["answer"], row.get("choices")
    if isinstance(answer, int) and choices is not None:
        if not isinstance(choices, list) or not 0 <= answer < len(choices):
            raise InputError(
                f"`answer` is {answer}, but `choices` is {str(choices)[:60]!r}; expected a "
                "number into that list"
            )
        return [chr(ord("A") + answer)]
    if not isinstance(answer, (str, int)):
        raise InputError(
            f"`answer` is {str(answer)[:60]!r}, expected a text, or a number into `choices`"
        )
    return [str(answer)]


def image_paths(questions: Sequence[Question], folder: Path | None) -> dict[str, Path]:
    """Image key -> file, each image once. Raises InputError without --image_path, for a key that
    leaves it or a missing file.
    """
    keys = sorted({key for question in questions for key in question.images})
    if keys and folder is None:
        raise InputError(
            "the questions name images: give --vq_codes, or --image_path to encode them now"
        )
    for key in keys:
        if Path(key).is_absolute() or ".." in Path(key).parts:
            raise InputError(f"image {key!r} leaves --image_path; expected a path below it")
        if folder and not (folder / key).is_file():
            raise InputError(
                f"the image {folder / key} does not exist; is --image_path the folder that the "
                "rows' paths start from?"
            )
    return {key: folder / key for key in keys} if folder else {}


def combined_hash(hashes: Mapping[str, str]) -> str | None:
    """One hash of all images' hashes; None when no question has an image."""
    return (
        hash_bytes("\n".join(f"{key} {hashes[key]}" for key in sorted(hashes)).encode())
        if hashes
        else None
    )


# ---- answering ----


class Answering:
    """The work of `beingvl evaluate --json_path`. Weights are read when the first part is
    answered.
    """

    unit = "question"

    def __init__(self, args: Any, device: str) -> None:
        self._args, self._device = args, device
        self.questions = read_questions(args.json_path, args.limit, args.metric)
        self._model = BeingVL(args.model, args.vbpe_path)
        self._is_loaded = False
        self._codes = CodeFolder(args.vq_codes) if args.vq_codes else None
        if self._codes:
            for key in {key for question in self.questions for key in question.images}:
                self._codes.row(key)
        else:
            image_paths(self.questions, args.image_path)
        lineages = {str(args.model): self._model.manifest.lineage}
        self.lineage = join_lineages(
            lineages | ({str(args.vq_codes): self._codes.manifest.lineage} if self._codes else {})
        )
        self.num_rows = len(self.questions)
        no_tokens = np.empty(0, np.int32)
        for number, question in enumerate(
            self.questions
        ):  # what is wrong with a text is told before anything is answered
            self._prompt(number, [no_tokens] * len(question.images))

    @property
    def parts_request(self) -> dict[str, Any]:
        """What decides the answers beside the images' bytes."""
        with_vbpe = self._model.vbpe if not self._args.raw else None
        return {
            "json": hash_file(self._args.json_path),
            "model": self._model.manifest.content_hash,
            "vbpe": with_vbpe.fingerprint() if with_vbpe else None,
            **{
                name: getattr(self._args, name)
                for name in ("raw", "limit", "max_new_tokens", "torch_dtype")
            },
        }

    def request(self, image_hashes: Mapping[str, str] | None = None) -> dict[str, Any]:
        """The whole request; images that no codes stand for are read and hashed here unless
        their hashes are given.
        """
        if image_hashes is None and not self._codes:
            paths = image_paths(self.questions, self._args.image_path)
            image_hashes = {key: hash_file(path) for key, path in paths.items()}
        images = (
            self._codes.manifest.content_hash if self._codes else combined_hash(image_hashes or {})
        )
        return {**self.parts_request, "images": images, "metric": self._args.metric}

    def write_part(self, rows: range, folder: Path, on_rows: Callable[[int], object]) -> None:
        """Answer `rows`; `on_rows` hears how many more are done."""
        started = time.perf_counter()
        if not self._is_loaded:
            self._model.load_model(self._args.torch_dtype, self._device)
            self._is_loaded = True
        questions = self.questions[rows.start : rows.stop]
        tokens = self._image_tokens(questions)
        prompts = [
            self._prompt(number, [tokens[key] for key in self.questions[number].images])
            for number in rows
        ]
        answers = self._model.answer_token_sequences(
            prompts,
            self._args.max_new_tokens,
            batch_size=self._args.batch_size,
            on_batch=lambda indices, token_ids: on_rows(len(indices)),
        )
        hashes = (
            {} if self._codes else {key: hash_file(self._args.image_path / key) for key in tokens}
        )
        (folder / _PART_FILE).write_text(
            "".join(json.dumps(answer) + "\n" for answer in answers), encoding="utf-8"
        )
        (folder / _IMAGES_FILE).write_text(json.dumps(hashes), encoding="utf-8")
        (folder / _COUNTS_FILE).write_text(
            json.dumps({"seconds": time.perf_counter() - started}), encoding="utf-8"
        )

    def _prompt(self, number: int, images: Sequence[np.ndarray]) -> list[int]:
        """Token ids of a row's prompt. Raises InputError that names the row."""
        question = self.questions[number]
        try:
            token_ids = self._model.tokenize_with_tokens(question.prompt, images)
            self._model.check_length(len(token_ids), self._args.max_new_tokens)
        except InputError as error:
            raise InputError(
                f"{_place(self._args.json_path, number, question.id)}: {error}"
            ) from error
        return token_ids

    def _image_tokens(self, questions: Sequence[Question]) -> dict[str, np.ndarray]:
        """Image key -> token ids `[n]` int32; every image of the part is encoded once, however
        many questions are about it.
        """
        keys = sorted({key for question in questions for key in question.images})
        if not keys:
            return {}
        if self._codes:
            grids = self._codes.codes[[self._codes.row(key) for key in keys]]
        else:
            grids = self._model.img2codes([self._args.image_path / key for key in keys])
        return dict(zip(keys, self._model.codes2tok(grids, not self._args.raw), strict=True))

    def finish(
        self, parts: Parts, num_parts: int, output: Path
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, float]]:
        """Write predictions.jsonl; returns what scores.json says beside the name, the request
        and the counts.
        """
        predictions = []
        for number in range(num_parts):
            with open(parts.path(number) / _PART_FILE, encoding="utf-8") as file:
                predictions += [json.loads(line) for line in file]
        hashes = {
            key: value
            for part in parts.read_json(num_parts, _IMAGES_FILE)
            for key, value in part.items()
        }
        seconds = sum(part["seconds"] for part in parts.read_json(num_parts, _COUNTS_FILE))
        scores = METRICS[self._args.metric].score(
            predictions, [question.reference for question in self.questions]
        )
        write_predictions(output / PREDICTIONS_FILE, self.questions, predictions, scores)
        found = {
            "variant": "raw" if self._args.raw else "vbpe",
            **summarize(self._args.metric, self.questions, predictions, scores),
        }
        return found, self.request(hashes), {"seconds": seconds}


# ---- what is written ----


def write_predictions(
    path: Path, questions: Sequence[Question], predictions: Sequence[str], scores: Scores
) -> None:
    """One JSON line a row, in the order of the questions."""
    lines = []
    for row, (question, prediction) in enumerate(zip(questions, predictions, strict=True)):
        fields: dict[str, Any] = {
            "id": question.id,
            "image": question.images[0] if len(question.images) == 1 else list(question.images),
            "question": question.text,
            "answer": question.reference.answers[0]
            if len(question.reference.answers) == 1
            else list(question.reference.answers),
            "prediction": prediction,
        }
        if question.reference.category is not None:
            fields["category"] = question.reference.category
        if scores.of_rows is not None:
            fields |= {"score": scores.of_rows[row], "correct": scores.of_rows[row] == 1}
        lines.append(json.dumps(fields, ensure_ascii=False) + "\n")
    write_atomically(
        path, printable("".join(lines))
    )  # half a surrogate pair stays the escape that it was in the input


def summarize(
    metric: str, questions: Sequence[Question], predictions: Sequence[str], scores: Scores
) -> dict[str, Any]:
    """`metric`, `rows`, `scores`, `standard_errors`, `categories`; exact match also says how
    every question text did.
    """
    found: dict[str, Any] = {
        "metric": metric,
        "rows": len(questions),
        "scores": scores.values,
        "standard_errors": scores.standard_errors,
        "categories": scores.categories,
    }
    if metric == "exact_match":
        assert scores.of_rows is not None
        per_question = by_question(questions, scores.of_rows)
        mean = sum(entry["accuracy"] for entry in per_question.values()) / len(per_question)
        found |= {
            "correct": int(sum(scores.of_rows)),
            "accuracy": scores.values["accuracy"],
            "accuracy_mean": mean,
        }
        found["questions"] = per_question
    return found


def by_question(
    questions: Sequence[Question], of_rows: Sequence[float]
) -> dict[str, dict[str, float]]:
    """Question text -> accuracy, chance (1 / number of distinct answers), majority (the most
    frequent answer's share), rows.
    """
    rows_of: dict[str, list[int]] = {}
    for index, question in enumerate(questions):
        rows_of.setdefault(question.text, []).append(index)
    table = {}
    for text, rows in rows_of.items():
        answers = Counter(questions[row].reference.answers[0].strip().lower() for row in rows)
        table[text] = {
            "accuracy": sum(of_rows[row] for row in rows) / len(rows),
            "chance": 1 / len(answers),
            "majority": max(answers.values()) / len(rows),
            "rows": len(rows),
            "distinct_answers": len(answers),
        }
    return table
