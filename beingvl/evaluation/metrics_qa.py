"""The field's question-answering metrics, each as its authors compute it. Pure functions of
answers and references.

    exact_match    equal to a reference after stripping and lower-casing
    vqa_accuracy   VQA (Antol et al. 2015): min(1, matches / 3), averaged over leaving out each
                   of ten answers
    pope           POPE (Li et al. 2023): accuracy, precision, recall, F1, share of "yes"
    mme            MME (Fu et al. 2023): accuracy + accuracy of image pairs, summed over
                   perception and cognition tasks
    scienceqa      ScienceQA (Lu et al. 2022) with the letter found as LLaVA's evaluation finds it
    anls           ST-VQA and DocVQA (Biten et al. 2019): normalised Levenshtein similarity,
                   threshold 0.5
    bleu           corpus BLEU of sacrebleu, 0 … 100
    cider          CIDEr-D (Vedantam et al. 2015) of pycocoevalcap, over words as the COCO
                   toolkit cuts them

A metric gets all rows at once and gives numbers for the whole, for its categories, and for every
row. `check` says, before the model answers anything, which row it cannot score. Only `bleu` and
`cider` need libraries (`pip install '.[evaluation]'`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from beingvl.errors import InputError


@dataclass(frozen=True)
class Reference:
    """What is known of a question: reference answers, its category and the keys of its images."""

    answers: tuple[str, ...]
    category: str | None = None
    images: tuple[str, ...] = ()


@dataclass(frozen=True)
class Scores:
    """`values` of all rows, `standard_errors` of those that are means, `categories`, and one
    score a row where there is one.
    """

    values: dict[str, float]
    standard_errors: dict[str, float] = field(default_factory=dict)
    categories: dict[str, dict[str, float]] = field(default_factory=dict)
    of_rows: list[float] | None = None


Problems = Iterator[tuple[int, str]]
"""(row, what is wrong with it)"""


@dataclass(frozen=True)
class Metric:
    """`score(predictions, references)`; `check(references)` names rows that `score` could not
    take.
    """

    score: Callable[[Sequence[str], Sequence[Reference]], Scores]
    check: Callable[[Sequence[Reference]], Problems]


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error (sample deviation / sqrt(n)); 0 error for fewer than two
    values.
    """
    mean = math.fsum(values) / len(values)
    if len(values) < 2:
        return mean, 0.0
    variance = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return mean, math.sqrt(variance / len(values))


def _mean_of_rows(name: str, of_rows: list[float], references: Sequence[Reference]) -> Scores:
    """Scores of a metric that is a mean over rows, also per category where rows have one."""
    mean, error = mean_and_error(of_rows)
    categories = {}
    for category, rows in _rows_by_category(references).items():
        part, part_error = mean_and_error([of_rows[row] for row in rows])
        categories[category] = {name: part, "standard_error": part_error, "rows": len(rows)}
    return Scores({name: mean}, {name: error}, categories, of_rows)


def _rows_by_category(references: Sequence[Reference]) -> dict[str, list[int]]:
    rows_of: dict[str, list[int]] = {}
    for row, reference in enumerate(references):
        if reference.category is not None:
            rows_of.setdefault(reference.category, []).append(row)
    return rows_of


def _no_problem(references: Sequence[Reference]) -> Problems:
    return iter(())


# ---- exact match ----


def is_correct(prediction: str, answers: Sequence[str]) -> bool:
    """Exact match with one of the answers after stripping and lower-casing."""
    return prediction.strip().lower() in {answer.strip().lower() for answer in answers}


def exact_match(predictions: Sequence[str], references: Sequence[Reference]) -> Scores:
    of_rows = [
        float(is_correct(prediction, reference.answers))
        for prediction, reference in zip(predictions, references, strict=True)
    ]
    return _mean_of_rows("accuracy", of_rows, references)


# ---- VQA accuracy ----

VQA_ANSWERS = 10
_ARTICLES = {"a", "an", "the"}
_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_NUMBER_OF = {**{word: str(number) for number, word in enumerate(_NUMBERS)}, "none": "0"}
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")
# What people mean when they leave one apostrophe out. Words that are others without it (she'll,
# were, its) are not among them.
_CONTRACTIONS = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've
    hasn't haven't he'd he'd've he's how'd how'll how's I'd've I'm I've isn't it'd it'd've it'll
    ma'am mightn't mightn't've might've mustn't must've needn't not've o'clock oughtn't 'ow's'at
    shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
    someone'd someone'd've someone'll someone's something'd something'd've something'll that's
    there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't
    we'd've we've weren't what'll what're what's what've when's where'd where's where've who'd
    who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've y'all
    y'all'll y'all'd've you'd you'd've you'll you're you've
"""


def _without_one_apostrophe(word: str) -> list[str]:
    return [word[:at] + word[at + 1 :] for at, letter in enumerate(word) if letter == "'"]


# "somebody'd" loses its apostrophe in the published table, the only word that does.
_CONTRACTION_OF = {
    short: word for word in _CONTRACTIONS.split() for short in _without_one_apostrophe(word)
} | {"somebody'd": "somebodyd"}


def normalise_vqa(text: str) -> str:
    """An answer as the VQA evaluation compares it.

    A punctuation mark goes where it stands at a word's edge anywhere in the text (or the text has a
    number with a comma), else it becomes a space; periods go unless a digit follows; number words
    become digits, articles go, apostrophes come back.
    """
    text = text.replace("\n", " ").replace("\t", " ").strip()
    has_comma_in_number = _COMMA_IN_NUMBER.search(text) is not None
    kept = text
    for mark in _PUNCTUATION:
        at_edge = f"{mark} " in text or f" {mark}" in text
        kept = kept.replace(mark, "" if at_edge or has_comma_in_number else " ")
    kept = _PERIOD.sub("", kept)
    words = [_NUMBER_OF.get(word, word) for word in kept.lower().split()]
    return " ".join(_CONTRACTION_OF.get(word, word) for word in words if word not in _ARTICLES)


def vqa_accuracy_of(prediction: str, answers: Sequence[str]) -> float:
    """Accuracy 0 … 1 of one prediction. Where all answers agree, they are compared as they are
    written.
    """
    prediction = prediction.replace("\n", " ").replace("\t", " ").strip()
    given = [answer.replace("\n", " ").replace("\t", " ").strip() for answer in answers]
    if len(set(given)) > 1:
        prediction, given = normalise_vqa(prediction), [normalise_vqa(answer) for answer in given]
    matches = given.count(prediction)
    return sum(min(1.0, (matches - (answer == prediction)) / 3) for answer in given) / len(given)


def vqa_accuracy(predictions: Sequence[str], references: Sequence[Reference]) -> Scores:
    of_rows = [
        vqa_accuracy_of(prediction, reference.answers)
        for prediction, reference in zip(predictions, references, strict=True)
    ]
    return _mean_of_rows("accuracy", of_rows, references)


def _check_ten_answers(references: Sequence[Reference]) -> Problems:
    for row, reference in enumerate(references):
        if len(reference.answers) != VQA_ANSWERS:
            yield (
                row,
                f"has {len(reference.answers)} answers, vqa_accuracy is defined for a list "
                f"`answers` of {VQA_ANSWERS}",
            )


# ---- yes and no: POPE, MME ----


def _check_yes_no(references: Sequence[Reference]) -> Problems:
    for row, reference in enumerate(references):
        if len(reference.answers) != 1 or reference.answers[0].strip().lower() not in ("yes", "no"):
            yield row, f"has the answer {' / '.join(reference.answers)!r}, expected yes or no"


def _is_yes(reference: Reference) -> bool:
    return reference.answers[0].strip().lower() == "yes"


def says_yes_pope(prediction: str) -> bool:
    """POPE takes the first sentence and counts everything as yes that has no word `No`, `no` or
    `not`.
    """
    words = prediction.split(".")[0].replace(",", "").split(" ")
    return not {"No", "no", "not"} & set(words)


def _yes_no_values(
    says_yes: Sequence[bool], is_yes: Sequence[bool]
) -> tuple[dict[str, float], dict[str, float]]:
    """Values and standard errors; "yes" is the positive class."""
    right = [float(said == truth) for said, truth in zip(says_yes, is_yes, strict=True)]
    groups = {
        "accuracy": right,
        "precision": [value for value, said in zip(right, says_yes, strict=True) if said],
        "recall": [value for value, truth in zip(right, is_yes, strict=True) if truth],
        "yes_ratio": [float(said) for said in says_yes],
    }
    found = {name: mean_and_error(group) if group else (0.0, 0.0) for name, group in groups.items()}
    values = {name: mean for name, (mean, _) in found.items()}
    together = values["precision"] + values["recall"]
    values["f1"] = 2 * values["precision"] * values["recall"] / together if together else 0.0
    return values, {name: error for name, (_, error) in found.items()}


def pope(predictions: Sequence[str], references: Sequence[Reference]) -> Scores:
    says_yes = [says_yes_pope(prediction) for prediction in predictions]
    is_yes = [_is_yes(reference) for reference in references]
    values, errors = _yes_no_values(says_yes, is_yes)
    categories = {}
    for category, rows in _rows_by_category(references).items():
        categories[category], _ = _yes_no_values(
            [says_yes[row] for row in rows], [is_yes[row] for row in rows]
        )
        categories[category]["rows"] = len(rows)
    of_rows = [float(said == truth) for said, truth in zip(says_yes, is_yes, strict=True)]
    return Scores(values, errors, categories, of_rows)


MME_PERCEPTION = (
    "existence",
    "count",
    "position",
    "color",
    "posters",
    "celebrity",
    "scene",
    "landmark",
    "artwork",
    "OCR",
)
MME_COGNITION = (
    "commonsense_reasoning",
    "numerical_calculation",
    "text_translation",
    "code_reasoning",
)


def read_mme(prediction: str) -> str:
    """`yes`, `no` or `other`, from the first four characters."""
    start = prediction.strip().lower()[:4]
    return "yes" if "yes" in start else "no" if "no" in start else "other"


def _mme_pairs(references: Sequence[Reference]) -> dict[str, dict[tuple[str, ...], list[int]]]:
    """Category -> images -> rows; MME asks two questions about every image of a category."""
    return {
        category: _group([(references[row].images, row) for row in rows])
        for category, rows in _rows_by_category(references).items()
    }


def _group(pairs: Sequence[tuple[tuple[str, ...], int]]) -> dict[tuple[str, ...], list[int]]:
    grouped: dict[tuple[str, ...], list[int]] = {}
    for key, row in pairs:
        grouped.setdefault(key, []).append(row)
    return grouped


def mme(predictions: Sequence[str], references: Sequence[Reference]) -> Scores:
    """A task's score is 100 x (share of right questions + share of images with both right), at
    most 200.
    """
    of_rows = [
        float(read_mme(prediction) == reference.answers[0].strip().lower())
        for prediction, reference in zip(predictions, references, strict=True)
    ]
    categories = {}
    for category, pairs in _mme_pairs(references).items():
        right = [[of_rows[row] for row in rows] for rows in pairs.values()]
        accuracy, error = mean_and_error([value for pair in right for value in pair])
        accuracy_plus, _ = mean_and_error([float(all(pair)) for pair in right])
        categories[category] = {
            "score": 100 * (accuracy + accuracy_plus),
            "accuracy": accuracy,
            "accuracy_plus": accuracy_plus,
            "standard_error": error,
            "rows": 2 * len(right),
        }
    totals = {
        f"{name}_score": math.fsum(
            categories[category]["score"] for category in tasks if category in categories
        )
        for name, tasks in (("perception", MME_PERCEPTION), ("cognition", MME_COGNITION))
    }
    accuracy, error = mean_and_error(of_rows)
    return Scores({**totals, "accuracy": accuracy}, {"accuracy": error}, categories, of_rows)


def _check_mme(references: Sequence[Reference]) -> Problems:
    yield from _check_yes_no(references)
    for row, reference in enumerate(references):
        if reference.category not in (*MME_PERCEPTION, *MME_COGNITION):
            yield (
                row,
                f"has the category {reference.category!r}, expected one of MME's: "
                f"{', '.join(MME_PERCEPTION + MME_COGNITION)}",
            )
    for category, pairs in _mme_pairs(references).items():
        for images, rows in pairs.items():
            if len(rows) != 2:
                yield (
                    rows[0],
                    f"is one of {len(rows)} questions about {', '.join(images) or 'no image'} "
                    f"in {category}, MME has two",
                )


# ---- multiple choice ----

LETTERS = "ABCDE"
_ANSWER_IS = re.compile(r"The answer is ([A-Z]).")


def find_letter(prediction: str) -> str | None:
    """The chosen letter: `B`, `B. text`, or one sentence `The answer is B.`; None where there is
    none or more than one.
    """
    text = prediction.strip()
    if len(text) == 1 and text in LETTERS:
        return text
    if text[:1] and text[0] in LETTERS and text[1:3] == ". ":
        return text[0]
    found = _ANSWER_IS.findall(text)
    return found[0] if len(found) == 1 else None


def scienceqa(predictions: Sequence[str], references: Sequence[Reference]) -> Scores:
    of_rows = [
        float(find_letter(prediction) == reference.answers[0])
        for prediction, reference in zip(predictions, references, strict=True)
    ]
    scores = _mean_of_rows("accuracy", of_rows, references)
    with_image = [
        value for value, reference in zip(of_rows, references, strict=True) if reference.images
    ]
    if with_image:
        mean, error = mean_and_error(with_image)
        scores.values["accuracy_with_image"], scores.standard_errors["accuracy_with_image"] = (
            mean,
            error,
        )
    return scores


def _check_letter(references: Sequence[Reference]) -> Problems:
    for row, reference in enumerate(references):
        answers = reference.answers
        if len(answers) != 1 or len(answers[0]) != 1 or answers[0] not in LETTERS:
            yield (
                row,
                f"has the answer {' / '.join(answers)!r}, expected one letter of {LETTERS} or "
                "a number into `choices`",
            )


# ---- ANLS ----

ANLS_THRESHOLD = 0.5


def levenshtein(one: str, other: str) -> int:
    """Insertions, deletions and substitutions that turn one text into the other."""
    row = list(range(len(other) + 1))
    for i, a in enumerate(one, 1):
        diagonal, row[0] = row[0], i
        for j, b in enumerate(other, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (a != b))
    return row[-1]


def anls_of(prediction: str, answers: Sequence[str]) -> float:
    """The best similarity with an answer, 0 below the threshold. Case and runs of spaces do not
    count.
    """
    said = " ".join(prediction.lower().split())
    best = 0.0
    for answer in answers:
        wanted = " ".join(answer.lower().split())
        longest = max(len(said), len(wanted))
        best = max(best, 1 - levenshtein(said, wanted) / longest if longest else 1.0)
    return best if best >= ANLS_THRESHOLD else 0.0


def anls(predictions: Sequence[str], references: Sequence[Reference]) -> Scores:
    of_rows = [
        anls_of(prediction, reference.answers)
        for prediction, reference in zip(predictions, references, strict=True)
    ]
    return _mean_of_rows("anls", of_rows, references)


# ---- captions ----

_CLITIC = re.compile(r"(?<=\w)(n't|'(?:s|re|ve|ll|d|m))\b")
_WORD = re.compile(
    # clitics, abbreviations, .5
    r"n't\b|'(?:s|re|ve|ll|d|m)\b|(?:[a-z]\.){2,}|(?:mr|mrs|ms|dr|st|ave|vs|jr)\.|\.\d+"
    # words, old-fashioned, bath/shower, 2,000; anything else
    r"|\w+(?:(?:-|(?<=[a-z])/(?=[a-z])|(?<=\d)[.,:](?=\d))\w+)*|\S"
)
_SPLIT_WORDS = {"cannot": "can not", "gonna": "gon na", "gotta": "got ta", "wanna": "wan na"}
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
_DROPPED = set(".?!,:;-'`\"…–—")


def caption_words(caption: str) -> str:
    """A caption as the COCO toolkit compares it: lower case, words cut as in the Penn Treebank,
    punctuation dropped.

    The toolkit runs Stanford's tokenizer in Java; on ordinary English captions this gives the same
    words (docs/log.md). Its brackets survive as `-lrb-` and `-rrb-`, because it lower-cases before
    it drops punctuation.
    """
    text = caption.lower().replace("\N{RIGHT SINGLE QUOTATION MARK}", "'")
    words = [
        _BRACKETS.get(word, _SPLIT_WORDS.get(word, word))
        for word in _WORD.findall(_CLITIC.sub(r" \1", text))
    ]
    return " ".join(word for word in words if word not in _DROPPED)


def bleu(predictions: Sequence[str], references: Sequence[Reference]) -> Scores:
    """Corpus BLEU with sacrebleu's own tokenizer and smoothing. Raises InputError where
    sacrebleu is not installed.
    """
    try:
        from sacrebleu.metrics import BLEU
    except ImportError as error:
        raise InputError("--metric bleu needs sacrebleu: pip install '.[evaluation]'") from error
    most = max(len(reference.answers) for reference in references)
    streams: list[Any] = [  # None where a question has fewer answers
        [dict(enumerate(reference.answers)).get(number) for reference in references]
        for number in range(most)
    ]
    found = BLEU().corpus_score(list(predictions), streams)
    return Scores({"bleu": found.score, "brevity_penalty": found.bp})


def cider(predictions: Sequence[str], references: Sequence[Reference]) -> Scores:
    """CIDEr-D; the document frequencies come from these references. Raises InputError where
    pycocoevalcap is not installed.
    """
    try:
        from pycocoevalcap.cider.cider import Cider
    except ImportError as error:
        raise InputError(
            "--metric cider needs pycocoevalcap: pip install '.[evaluation]'"
        ) from error
    said = {row: [caption_words(prediction)] for row, prediction in enumerate(predictions)}
    wanted = {
        row: [caption_words(answer) for answer in reference.answers]
        for row, reference in enumerate(references)
    }
    _, of_rows = Cider().compute_score(wanted, said)
    return _mean_of_rows("cider", [float(value) for value in of_rows], references)


def _check_two_rows(references: Sequence[Reference]) -> Problems:
    if len(references) < 2:
        yield (
            0,
            "is the only row: CIDEr weighs words by how many rows have them and needs two or more",
        )


METRICS: Mapping[str, Metric] = {
    "exact_match": Metric(exact_match, _no_problem),
    "vqa_accuracy": Metric(vqa_accuracy, _check_ten_answers),
    "pope": Metric(pope, _check_yes_no),
    "mme": Metric(mme, _check_mme),
    "scienceqa": Metric(scienceqa, _check_letter),
    "anls": Metric(anls, _no_problem),
    "bleu": Metric(bleu, _no_problem),
    "cider": Metric(cider, _check_two_rows),
}
