"""`--json_path`: a model's greedy answers to the questions in dataset rows, and their scores.

    read_questions             rows -> questions with reference answers, checked for the metric
    Answering.evaluate_rows    image tokens, prompts in the chat template, answers in batches
    Answering.combine          all answers -> predictions.jsonl and the scores

The reference answer of a row is in `answers` (a list of texts, or of objects with `answer`), else
in `answer` (a text, or an index into the list `choices`), else in the gpt turn of `conversations`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from string import ascii_uppercase
from typing import Any

import numpy as np

from beingvl.artefact.hashes import hash_bytes, hash_file
from beingvl.artefact.manifest import join_lineages
from beingvl.artefact.progress import progress
from beingvl.artefact.request import Request
from beingvl.data.collect_rows import Rows
from beingvl.data.conversation import IMAGE_PLACEHOLDER, parse_conversation
from beingvl.data.llava_json import image_keys, stream_rows
from beingvl.data.made_with import TEMPLATE
from beingvl.data.variant import MERGED, RAW
from beingvl.errors import InputError
from beingvl.evaluation.metrics import METRICS, Reference, Scores
from beingvl.evaluation.results import (
    PREDICTIONS_FILE,
    Evaluation,
    SharedOptions,
    write_lines,
)
from beingvl.images.decode import decode_image
from beingvl.images.image_source import ImageSource, open_images
from beingvl.images.table_images import NO_STAMP
from beingvl.images.vq_codes import CodeFolder
from beingvl.inference.model import BeingVL

IMAGES_AT_ONCE = 64  # encoded together


@dataclass(frozen=True, kw_only=True)
class Question(Reference):
    """One dataset row: reference and question. `id` is the row's own, or its number."""

    id: Any
    prompt: str

    @property
    def text(self) -> str:
        """The question without image placeholders; scores are grouped by it."""
        return " ".join(self.prompt.replace(IMAGE_PLACEHOLDER, " ").split())


# ---- reading ----


def read_questions(path: Path, limit: int | None, metric: str) -> list[Question]:
    """The first `limit` rows of a LLaVA JSON or JSONL.

    Raises InputError naming the first row that is not one question with a reference answer, or that
    `metric` cannot score.
    """
    rows = list(islice(stream_rows(path), limit))
    questions = []
    for number, row in enumerate(rows):
        try:
            questions.append(_question(row, number))
        except InputError as error:
            raise InputError(f"{_place(path, number, row.get('id'))}: {error}") from error
    for number, problem in METRICS[metric].problems(questions):
        place = _place(path, number, rows[number].get("id"))
        raise InputError(f"{place} {problem}; correct it or choose another --metric")
    return questions


def _place(path: Path, number: int, id_: Any) -> str:
    return f"{path}, row {number} (id {repr(id_)[:60]})"


def _question(row: dict[str, Any], number: int) -> Question:
    answers = _given_answers(row)
    conversations = row.get("conversations")
    if isinstance(conversations, list) and len(conversations) == 1:
        # The answer is outside the conversation; add a dummy turn so that it parses.
        if not answers:
            raise InputError(
                "there is no reference answer; give `answer`, `answers` or a gpt turn in "
                "`conversations`"
            )
        conversations = [*conversations, {"from": "gpt", "value": answers[0] or "-"}]
    turns = parse_conversation(conversations)
    if len(turns) != 1:
        raise InputError(
            f"found {len(turns)} questions, expected one question per row; split it into rows"
        )
    ((prompt, spoken),) = turns
    category = row.get("category")
    return Question(
        tuple(answers) or (spoken or "",),
        None if category is None else str(category),
        tuple(image_keys(row)),
        id=row.get("id", number),
        prompt=prompt,
    )


def _given_answers(row: Mapping[str, Any]) -> list[str]:
    """The texts in `answers` or `answer`; empty if the row has neither."""
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
        letters = ascii_uppercase[: len(choices)] if isinstance(choices, list) else ""
        if isinstance(answer, bool) or not 0 <= answer < len(letters):
            raise InputError(
                f"`answer` is {answer}, but `choices` is {str(choices)[:60]!r}; expected an "
                "index into the first 26 of that list"
            )
        return [letters[answer]]
    if not isinstance(answer, (str, int)):
        raise InputError(
            f"`answer` is {str(answer)[:60]!r}, expected text, or an index into `choices`"
        )
    return [str(answer)]


def open_named(keys: Sequence[str], places: Sequence[Path | str]) -> ImageSource | None:
    """The source of the images; None if there are no keys. Raises InputError without --image_path,
    for a key that points outside it, and for a missing image.
    """
    if not keys:
        return None
    if not places:
        raise InputError(
            "the questions name images: give --codes, or --image_path to encode them now"
        )
    images = open_images([Path(place) for place in places])
    for key in keys:
        if images.stamp(key) != NO_STAMP:
            continue
        try:
            images.read(key)
        except InputError as error:
            raise InputError(f"{error}; do the rows' paths start from --image_path?") from error
    return images


# ---- answering ----


@dataclass(frozen=True)
class AnswerOptions:
    """The options of `evaluate` that apply only to questions."""

    metric: str = "exact_match"
    image_path: Path | str | Sequence[Path | str] | None = None
    vq_codes: Path | str | None = None
    vbpe_path: Path | str | None = None
    raw: bool = False
    max_new_tokens: int = 16
    batch_size: int = 128


class Answering(Evaluation):
    """Greedy answers to the questions in a JSON, with scores."""

    unit = "question"

    def __init__(self, shared: SharedOptions, collected: Rows, options: AnswerOptions) -> None:
        super().__init__(shared)
        self._json_path, self._options = collected.path, options
        self.questions = read_questions(self._json_path, shared.limit, options.metric)
        self.num_rows = len(self.questions)
        self._image_keys = _keys_of(self.questions)
        self._model = BeingVL(shared.model, options.vbpe_path, template=shared.template)
        lineages = {str(shared.model): self._model.manifest.lineage}
        self._with_vbpe = self._model.uses_vbpe(False if options.raw else None)
        self._codes = CodeFolder(options.vq_codes) if options.vq_codes else None
        self._images = None
        if self._codes:
            lineages[str(options.vq_codes)] = self._codes.manifest.lineage
            for key in self._image_keys:
                self._codes.row(key)  # raises InputError if the image has no codes
        else:
            named = options.image_path or collected.containers
            places = [named] if isinstance(named, Path | str) else named
            self._images = open_named(self._image_keys, places)
        self.lineage = join_lineages(lineages)
        # report wrong texts before the model answers anything
        no_tokens = np.empty(0, np.int32)
        for number, question in enumerate(self.questions):
            self._prompt(number, [no_tokens] * len(question.images))

    def options(self) -> Request:
        with_vbpe = self._model.vbpe if self._with_vbpe else None
        return Request(
            json=hash_file(self._json_path),
            model=self._model.manifest.content_hash,
            vbpe=with_vbpe.fingerprint() if with_vbpe else None,
            raw=not self._with_vbpe,
            **TEMPLATE.in_request(self._model.template),
            limit=self.shared.limit,
            max_new_tokens=self._options.max_new_tokens,
            torch_dtype=self.shared.dtype_name,
        )

    def request(self) -> Request:
        return self._whole_request(self._hash_images(self._image_keys))

    def _hash_images(self, keys: Sequence[str]) -> dict[str, str]:
        """Hashes of image files; a code folder has one hash for all, in its manifest."""
        if self._images is None:
            return {}
        looked = progress(keys, name="hash images", unit="image", leave=False)
        return {key: hash_bytes(self._images.read(key)) for key in looked}

    def _whole_request(self, hashes: Mapping[str, str]) -> Request:
        listing = "\n".join(f"{key} {hashes[key]}" for key in sorted(hashes))
        images = hash_bytes(listing.encode()) if hashes else None
        if self._codes:
            images = self._codes.manifest.content_hash
        return Request({**self.options(), "images": images, "metric": self._options.metric})

    def prepare(self) -> None:
        self._model.load_model(self.shared.dtype, self.shared.device)

    def evaluate_rows(self, rows: range, advance: Callable[[int], object]) -> dict[str, Any]:
        """The answers, and hashes of the images that were encoded for them."""
        keys = _keys_of([self.questions[row] for row in rows])
        tokens = self._image_tokens(keys)
        prompts = [
            self._prompt(row, [tokens[key] for key in self.questions[row].images]) for row in rows
        ]
        answers = self._model.answer_token_sequences(
            prompts,
            self._options.max_new_tokens,
            batch_size=self._options.batch_size,
            on_batch=lambda indices, token_ids: advance(len(indices)),
        )
        return {"answers": answers, "images": self._hash_images(keys)}

    def _prompt(self, row: int, images: Sequence[np.ndarray]) -> list[int]:
        """Token ids of a row's prompt. Raises InputError naming the row."""
        question = self.questions[row]
        try:
            token_ids = self._model.tokenize_with_tokens(question.prompt, images)
            self._model.check_length(token_ids, self._options.max_new_tokens)
        except InputError as error:
            raise InputError(f"{_place(self._json_path, row, question.id)}: {error}") from error
        return token_ids

    def _image_tokens(self, keys: Sequence[str]) -> dict[str, np.ndarray]:
        """Image key -> token ids `[n]` int32; each image of the part is encoded once."""
        if not keys:
            return {}
        if self._images is None:
            assert self._codes
            grids = self._codes.grids({key: self._codes.row(key) for key in keys})
        else:
            starts = range(0, len(keys), IMAGES_AT_ONCE)
            batches = [keys[start : start + IMAGES_AT_ONCE] for start in starts]
            grids = np.concatenate([self._encoded(self._images, batch) for batch in batches])
        return dict(zip(keys, self._model.codes2tok(grids, self._with_vbpe), strict=True))

    def _encoded(self, images: ImageSource, keys: Sequence[str]) -> np.ndarray:
        """VQ codes `[N, h, w]`."""
        vqgan = self._model.vqgan
        crop = vqgan.preprocessing.crop
        cropped = [crop(decode_image(images.read(key), key), key) for key in keys]
        return vqgan.encode(vqgan.preprocessing.to_pixels(cropped))

    def combine(self, found: Sequence[dict[str, Any]]) -> tuple[dict[str, Any], Request]:
        predictions = [answer for part in found for answer in part["answers"]]
        hashes = {key: value for part in found for key, value in part["images"].items()}
        metric, variant = self._options.metric, MERGED if self._with_vbpe else RAW
        scores = METRICS[metric].score(predictions, self.questions)
        rows = prediction_rows(self.questions, predictions, scores)
        write_lines(self.output / PREDICTIONS_FILE, rows)
        found_scores = {"variant": variant, **summarize(metric, self.questions, scores)}
        return found_scores, self._whole_request(hashes)


def _keys_of(questions: Sequence[Question]) -> list[str]:
    return sorted({key for question in questions for key in question.images})


# ---- what is written ----


def prediction_rows(
    questions: Sequence[Question], predictions: Sequence[str], scores: Scores
) -> list[dict[str, Any]]:
    """The lines of predictions.jsonl, in the order of the questions."""
    rows = []
    for row, (question, prediction) in enumerate(zip(questions, predictions, strict=True)):
        fields: dict[str, Any] = {
            "id": question.id,
            "image": _one_or_list(question.images),
            "question": question.text,
            "answer": _one_or_list(question.answers),
            "prediction": prediction,
        }
        if question.category is not None:
            fields["category"] = question.category
        if scores.of_rows is not None:
            fields |= {"score": scores.of_rows[row], "correct": scores.of_rows[row] == 1}
        rows.append(fields)
    return rows


def _one_or_list(texts: Sequence[str]) -> str | list[str]:
    return texts[0] if len(texts) == 1 else list(texts)


def summarize(metric: str, questions: Sequence[Question], scores: Scores) -> dict[str, Any]:
    """Contents of scores.json; for exact match also a table per question text."""
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
            "questions": per_question,
        }
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
        answers = Counter(questions[row].answers[0].strip().lower() for row in rows)
        table[text] = {
            "accuracy": sum(of_rows[row] for row in rows) / len(rows),
            "chance": 1 / len(answers),
            "majority": max(answers.values()) / len(rows),
            "rows": len(rows),
            "distinct_answers": len(answers),
        }
    return table
