"""Standard metrics for answers, each computed as its authors do. Pure functions of answers and
references.

    exact_match    equal to a reference after stripping and lower-casing
    vqa_accuracy   VQA (Antol et al. 2015): min(1, matches / 3), averaged over leaving out each
                   of ten answers
    pope           POPE (Li et al. 2023): accuracy, precision, recall, F1, share of "yes"
    mme            MME (Fu et al. 2023): accuracy + accuracy of image pairs, summed over
                   perception and cognition tasks
    scienceqa      ScienceQA (Lu et al. 2022), with LLaVA's rule for finding the letter
    anls           ST-VQA and DocVQA (Biten et al. 2019): normalised Levenshtein similarity,
                   threshold 0.5
    bleu, cider    captions.py: corpus BLEU, 0 … 100, and CIDEr-D, 0 … 10

A metric takes all rows at once and returns scores for the whole set, for its categories, and for
every row. `problems` lists, before the model answers anything, the rows that it cannot score.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from beingvl.evaluation.captions import caption_words, cider_d, corpus_bleu


@dataclass(frozen=True)
class Reference:
    """A question's reference answers, its category and the keys of its images."""

    answers: tuple[str, ...]
    category: str | None = None
    images: tuple[str, ...] = ()


@dataclass(frozen=True)
class Scores:
    """`values` over all rows, `standard_errors` of those that are means, `categories`, and one
    score per row if the metric has one.
    """

    values: dict[str, float]
    standard_errors: dict[str, float] = field(default_factory=dict)
    categories: dict[str, dict[str, float]] = field(default_factory=dict)
    of_rows: list[float] | None = None


Problems = Iterator[tuple[int, str]]
"""(row, what is wrong with it)"""


def no_problems(references: Sequence[Reference]) -> Problems:
    return iter(())


@dataclass(frozen=True)
class Metric:
    score: Callable[[Sequence[str], Sequence[Reference]], Scores]
    problems: Callable[[Sequence[Reference]], Problems] = no_problems


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error (sample deviation / sqrt(n)); error 0 below two values."""
    mean = math.fsum(values) / len(values)
    if len(values) < 2:
        return mean, 0.0
    variance = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return mean, math.sqrt(variance / len(values))


def mean_of_rows(name: str, of_rows: list[float], references: Sequence[Reference]) -> Scores:
    """Scores of a metric that is a mean over rows; also per category, if rows have one."""
    mean, error = mean_and_error(of_rows)
    categories = {}
    for category, rows in rows_by_category(references).items():
        part, part_error = mean_and_error([of_rows[row] for row in rows])
        categories[category] = {name: part, "standard_error": part_error, "rows": len(rows)}
    return Scores({name: mean}, {name: error}, categories, of_rows)


def rows_by_category(references: Sequence[Reference]) -> dict[str, list[int]]:
    rows_of: dict[str, list[int]] = {}
    for row, reference in enumerate(references):
        if reference.category is not None:
            rows_of.setdefault(reference.category, []).append(row)
    return rows_of


def scored_by_row(
    name: str, score_row: Callable[[str, Sequence[str]], float]
) -> Callable[[Sequence[str], Sequence[Reference]], Scores]:
    """The metric whose value `name` is the mean of `score_row(prediction, answers)`."""

    def score(predictions: Sequence[str], references: Sequence[Reference]) -> Scores:
        of_rows = [
            float(score_row(prediction, reference.answers))
            for prediction, reference in zip(predictions, references, strict=True)
        ]
        return mean_of_rows(name, of_rows, references)

    return score


# ---- exact match ----


def is_correct(prediction: str, answers: Sequence[str]) -> bool:
    """Exact match with one of the answers after stripping and lower-casing."""
    return prediction.strip().lower() in {answer.strip().lower() for answer in answers}


# ---- VQA accuracy ----

VQA_ANSWERS = 10
_ARTICLES = {"a", "an", "the"}
_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_NUMBER_OF = {**{word: str(number) for number, word in enumerate(_NUMBERS)}, "none": "0"}
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")
# Contractions that people write without one apostrophe. Left out are those that become a different
# word without it (she'll, we're, it's).
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


# In the published table, "somebody'd" is the only word that loses its apostrophe.
_CONTRACTION_OF = {
    short: word for word in _CONTRACTIONS.split() for short in _without_one_apostrophe(word)
} | {"somebody'd": "somebodyd"}


def normalise_vqa(text: str) -> str:
    """Normalise an answer as the VQA evaluation does.

    A punctuation mark is removed if it is at a word's edge anywhere in the text (or if the text has
    a number with a comma), else it becomes a space. Periods are removed unless a digit follows.
    Number words become digits, articles are removed, apostrophes are restored.
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
    """Accuracy 0 … 1. If all answers agree, they are compared without normalisation."""
    prediction, *given = (
        text.replace("\n", " ").replace("\t", " ").strip() for text in (prediction, *answers)
    )
    if len(set(given)) > 1:
        prediction, given = normalise_vqa(prediction), [normalise_vqa(answer) for answer in given]
    matches = given.count(prediction)
    return sum(min(1.0, (matches - (answer == prediction)) / 3) for answer in given) / len(given)


def _not_ten_answers(references: Sequence[Reference]) -> Problems:
    for row, reference in enumerate(references):
        if len(reference.answers) != VQA_ANSWERS:
            found = f"has {len(reference.answers)} answers"
            yield row, f"{found}, vqa_accuracy is defined for a list `answers` of {VQA_ANSWERS}"


# ---- yes and no: POPE, MME ----


def _not_yes_or_no(references: Sequence[Reference]) -> Problems:
    for row, reference in enumerate(references):
        if len(reference.answers) != 1 or reference.answers[0].strip().lower() not in ("yes", "no"):
            yield row, f"has the answer {' / '.join(reference.answers)!r}, expected yes or no"


def says_yes_pope(prediction: str) -> bool:
    """POPE's rule: the first sentence is a yes unless it has the word `No`, `no` or `not`."""
    words = prediction.split(".")[0].replace(",", "").split(" ")
    return not {"No", "no", "not"} & set(words)


def _agreement(says_yes: Sequence[bool], is_yes: Sequence[bool]) -> list[float]:
    return [float(said == truth) for said, truth in zip(says_yes, is_yes, strict=True)]


def _yes_no_values(
    says_yes: Sequence[bool], is_yes: Sequence[bool]
) -> tuple[dict[str, float], dict[str, float]]:
    """Values and standard errors; "yes" is the positive class."""
    right = _agreement(says_yes, is_yes)
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
    is_yes = [reference.answers[0].strip().lower() == "yes" for reference in references]
    values, errors = _yes_no_values(says_yes, is_yes)
    categories = {}
    for category, rows in rows_by_category(references).items():
        categories[category], _ = _yes_no_values(
            [says_yes[row] for row in rows], [is_yes[row] for row in rows]
        )
        categories[category]["rows"] = len(rows)
    return Scores(values, errors, categories, _agreement(says_yes, is_yes))


MME_TASKS = {
    "perception": "existence count position color posters celebrity scene landmark artwork OCR",
    "cognition": "commonsense_reasoning numerical_calculation text_translation code_reasoning",
}
"""Group -> its tasks, which are the rows' categories."""


def read_mme(prediction: str) -> str:
    """`yes`, `no` or `other`, from the first four characters."""
    start = prediction.strip().lower()[:4]
    return "yes" if "yes" in start else "no" if "no" in start else "other"


def _mme_pairs(references: Sequence[Reference]) -> dict[str, dict[tuple[str, ...], list[int]]]:
    """Category -> images -> rows; MME asks two questions about every image of a category."""
    pairs: dict[str, dict[tuple[str, ...], list[int]]] = {}
    for category, rows in rows_by_category(references).items():
        rows_of_images = pairs.setdefault(category, {})
        for row in rows:
            rows_of_images.setdefault(references[row].images, []).append(row)
    return pairs


def mme(predictions: Sequence[str], references: Sequence[Reference]) -> Scores:
    """100 x (share of correct answers + share of images with both correct), at most 200."""
    by_row = scored_by_row("accuracy", lambda said, answers: is_correct(read_mme(said), answers))
    scores = by_row(predictions, references)
    assert scores.of_rows is not None
    categories = {}
    for category, pairs in _mme_pairs(references).items():
        right = [[scores.of_rows[row] for row in rows] for rows in pairs.values()]
        accuracy, error = mean_and_error([value for pair in right for value in pair])
        accuracy_plus, _ = mean_and_error([float(all(pair)) for pair in right])
        categories[category] = {
            "score": 100 * (accuracy + accuracy_plus),
            "accuracy": accuracy,
            "accuracy_plus": accuracy_plus,
            "standard_error": error,
            "rows": 2 * len(right),
        }
    totals = {}
    for group, tasks in MME_TASKS.items():
        own = [categories[task]["score"] for task in tasks.split() if task in categories]
        totals[f"{group}_score"] = math.fsum(own)
    return Scores({**totals, **scores.values}, scores.standard_errors, categories, scores.of_rows)


def _not_mme(references: Sequence[Reference]) -> Problems:
    yield from _not_yes_or_no(references)
    tasks = " ".join(MME_TASKS.values()).split()
    for row, reference in enumerate(references):
        if reference.category not in tasks:
            found = f"has the category {reference.category!r}"
            yield row, f"{found}, expected one of MME's: {', '.join(tasks)}"
    for category, pairs in _mme_pairs(references).items():
        for images, rows in pairs.items():
            if len(rows) != 2:
                about = f"about {', '.join(images) or 'no image'} in {category}"
                yield rows[0], f"is one of {len(rows)} questions {about}, MME has two"


# ---- multiple choice ----

LETTERS = "ABCDE"
_LETTER_FIRST = re.compile(r"[A-E](\. |$)")
_ANSWER_IS = re.compile(r"The answer is ([A-Z]).")


def find_letter(prediction: str) -> str | None:
    """The letter in `B`, `B. text` or one `The answer is B.`; None if there is none or several."""
    text = prediction.strip()
    if _LETTER_FIRST.match(text):
        return text[0]
    found = _ANSWER_IS.findall(text)
    return found[0] if len(found) == 1 else None


def scienceqa(predictions: Sequence[str], references: Sequence[Reference]) -> Scores:
    """Accuracy over all rows, and over those with an image."""
    by_row = scored_by_row("accuracy", lambda said, answers: find_letter(said) == answers[0])
    scores = by_row(predictions, references)
    assert scores.of_rows is not None
    with_image = [row for row, reference in enumerate(references) if reference.images]
    if with_image:
        mean, error = mean_and_error([scores.of_rows[row] for row in with_image])
        scores.values["accuracy_with_image"] = mean
        scores.standard_errors["accuracy_with_image"] = error
    return scores


def _not_a_letter(references: Sequence[Reference]) -> Problems:
    expected = f"expected one letter of {LETTERS} or an index into `choices`"
    for row, reference in enumerate(references):
        if len(reference.answers) != 1 or reference.answers[0] not in tuple(LETTERS):
            yield row, f"has the answer {' / '.join(reference.answers)!r}, {expected}"


# ---- ANLS ----

ANLS_THRESHOLD = 0.5


def levenshtein(one: str, other: str) -> int:
    """Number of insertions, deletions and substitutions that turn one text into the other."""
    row = list(range(len(other) + 1))
    for i, a in enumerate(one, 1):
        diagonal, row[0] = row[0], i
        for j, b in enumerate(other, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (a != b))
    return row[-1]


def anls_of(prediction: str, answers: Sequence[str]) -> float:
    """The best similarity with an answer, 0 below the threshold; ignores case and extra spaces."""
    said = " ".join(prediction.lower().split())
    best = 0.0
    for answer in answers:
        wanted = " ".join(answer.lower().split())
        longest = max(len(said), len(wanted))
        best = max(best, 1 - levenshtein(said, wanted) / longest if longest else 1.0)
    return best if best >= ANLS_THRESHOLD else 0.0


# ---- captions ----


def bleu(predictions: Sequence[str], references: Sequence[Reference]) -> Scores:
    score, penalty = corpus_bleu(predictions, [reference.answers for reference in references])
    return Scores({"bleu": score, "brevity_penalty": penalty})


def cider(predictions: Sequence[str], references: Sequence[Reference]) -> Scores:
    captions = [caption_words(prediction) for prediction in predictions]
    wanted = [[caption_words(answer) for answer in each.answers] for each in references]
    return mean_of_rows("cider", cider_d(captions, wanted), references)


def _only_row(references: Sequence[Reference]) -> Problems:
    if len(references) < 2:
        yield 0, "is the only row: CIDEr weighs words by how many rows have them, so it needs two"


METRICS: Mapping[str, Metric] = {
    "exact_match": Metric(scored_by_row("accuracy", is_correct)),
    "vqa_accuracy": Metric(scored_by_row("accuracy", vqa_accuracy_of), _not_ten_answers),
    "pope": Metric(pope, _not_yes_or_no),
    "mme": Metric(mme, _not_mme),
    "scienceqa": Metric(scienceqa, _not_a_letter),
    "anls": Metric(scored_by_row("anls", anls_of)),
    "bleu": Metric(bleu),
    "cider": Metric(cider, _only_row),
}
