"""Every metric against published values, or against the definition written down again in a few
lines; refusals.
"""

from __future__ import annotations

import math
import random

import pytest

from beingvl.evaluation.captions import cider_d
from beingvl.evaluation.metrics import (
    METRICS,
    MME_TASKS,
    Reference,
    anls_of,
    find_letter,
    is_correct,
    levenshtein,
    mean_and_error,
    normalise_vqa,
    read_mme,
    says_yes_pope,
    vqa_accuracy_of,
)


def score(metric: str, pairs: list[tuple[str, Reference]]):
    return METRICS[metric].score(
        [prediction for prediction, _ in pairs], [reference for _, reference in pairs]
    )


def problems(metric: str, *references: Reference) -> list[tuple[int, str]]:
    return list(METRICS[metric].problems(references))


def test_mean_and_standard_error() -> None:
    assert mean_and_error([1.0]) == (1.0, 0.0)
    mean, error = mean_and_error([1.0, 0.0, 0.0, 1.0, 1.0])
    assert mean == 0.6 and error == pytest.approx(math.sqrt((2 * 0.6**2 + 3 * 0.4**2) / 4 / 5))


# ---- exact match ----


def test_exact_match_takes_any_reference_and_groups_by_category() -> None:
    scores = score(
        "exact_match",
        [
            (" Two", Reference(("two",), "count")),
            ("2", Reference(("two", "2"), "count")),
            ("two.", Reference(("two",), "other")),
        ],
    )
    assert scores.of_rows == [1, 1, 0] and scores.values == {"accuracy": pytest.approx(2 / 3)}
    assert {name: entry["accuracy"] for name, entry in scores.categories.items()} == {
        "count": 1,
        "other": 0,
    }
    assert not is_correct("one.", ["one"])


# ---- VQA accuracy ----


def test_vqa_accuracy_has_the_published_steps() -> None:
    """0, 1, 2, 3 and 4 people of ten said it: 0, 0.3, 0.6, 0.9 and 1."""
    for matches, expected in enumerate([0, 0.3, 0.6, 0.9, 1, 1]):
        answers = ["red"] * matches + [f"colour {number}" for number in range(10 - matches)]
        assert vqa_accuracy_of("red", answers) == pytest.approx(expected)


def test_vqa_normalisation_follows_the_published_rules() -> None:
    for text, expected in {
        "The Two dogs.": "2 dogs",
        "none": "0",
        "dont": "don't",
        "couldnt've": "couldn't've",
        "shell": "shell",
        "blue/green": "blue green",  # no mark at an edge: it becomes a space
        "blue/ green": "blue green",  # at an edge: it goes
        "x-ray - old": "xray old",  # one mark at an edge anywhere decides for all of its kind
        "1,000": "1000",
        "3.5": "3.5",
        "U.S.": "us",
        "what?": "what",
        "a\n man": "man",
        "(yes)": "yes",
    }.items():
        assert normalise_vqa(text) == expected, text


def test_vqa_answers_that_all_agree_are_compared_as_written() -> None:
    assert vqa_accuracy_of("Two", ["two"] * 10) == 0 and vqa_accuracy_of("two", ["two"] * 10) == 1
    assert vqa_accuracy_of("Two", ["two"] * 9 + ["three"]) == 1
    assert problems("vqa_accuracy", Reference(("two",) * 9))[0][1].startswith(
        "has 9 answers, vqa_accuracy is defined"
    )


def test_vqa_leave_one_out_against_its_definition() -> None:
    draw = random.Random(0)
    for _ in range(200):
        answers, prediction = (
            [draw.choice("abcd") + "x" for _ in range(10)],
            draw.choice("abcd") + "x",
        )
        subsets = [answers[:left] + answers[left + 1 :] for left in range(10)]
        expected = sum(min(1, subset.count(prediction) / 3) for subset in subsets) / 10
        assert vqa_accuracy_of(prediction, answers) == pytest.approx(expected)


# ---- yes and no ----


def test_pope_reads_answers_as_published() -> None:
    for text, expected in {
        "Yes": True,
        "yes, there is. No doubt": True,
        "No": False,
        "no, there is not": False,
        "There is not a cat": False,
        "NO": True,  # the published script knows `No`, `no` and `not` only
        "I see nothing": True,
        "": True,
    }.items():
        assert says_yes_pope(text) == expected, text


def test_pope_scores_by_hand() -> None:
    """3 true positives, 1 false positive, 2 true negatives, 2 false negatives."""
    said = ["yes", "yes", "yes", "yes", "no", "no", "no", "no"]
    true = ["yes", "yes", "yes", "no", "no", "no", "yes", "yes"]
    category = ["random"] * 4 + ["popular"] * 4
    rows = [
        (said_, Reference((true_,), kind))
        for said_, true_, kind in zip(said, true, category, strict=True)
    ]
    scores = score("pope", rows)
    expected = {
        "accuracy": 5 / 8,
        "precision": 3 / 4,
        "recall": 3 / 5,
        "f1": 2 * 0.75 * 0.6 / 1.35,
        "yes_ratio": 1 / 2,
    }
    assert scores.values == pytest.approx(expected)
    assert (
        scores.categories["random"]["accuracy"] == 3 / 4
        and scores.categories["popular"]["yes_ratio"] == 0
    )
    assert scores.categories["popular"]["precision"] == 0  # nothing was said to be there
    assert problems("pope", Reference(("maybe",))) == [
        (0, "has the answer 'maybe', expected yes or no")
    ]


def mme_rows(category: str, wrong: set[int], num_images: int) -> list[tuple[str, Reference]]:
    """Two questions per image, answered rightly but for the question numbers in `wrong`."""
    rows = []
    for number in range(2 * num_images):
        truth = ("Yes", "No")[number % 2]
        said = ("No.", "yes, it is")[number % 2] if number in wrong else f" {truth.lower()}"
        rows.append((said, Reference((truth,), category, (f"{number // 2}.jpg",))))
    return rows


def test_mme_reaches_published_task_scores() -> None:
    """InternLM-XComposer-VL's existence 190.0 (58 of 60 questions, 28 of 30 images) and count
    158.33 (51 of 60, 22 of 30).
    """
    assert score("mme", mme_rows("existence", {0, 7}, 30)).categories["existence"][
        "score"
    ] == pytest.approx(190.0)
    scores = score(
        "mme", mme_rows("existence", {0, 7}, 30) + mme_rows("count", {0, 1, *range(2, 16, 2)}, 30)
    )
    assert scores.categories["count"] == pytest.approx(
        {
            "score": 100 * (51 / 60 + 22 / 30),
            "accuracy": 51 / 60,
            "accuracy_plus": 22 / 30,
            "rows": 60,
        }
        | {"standard_error": scores.categories["count"]["standard_error"]}
    )
    assert scores.categories["count"]["score"] == pytest.approx(158.33, abs=0.005)
    assert (
        scores.values["perception_score"] == pytest.approx(190 + 158 + 1 / 3)
        and scores.values["cognition_score"] == 0
    )
    cognition = score("mme", mme_rows(MME_TASKS["cognition"].split()[0], set(), 3))
    assert cognition.values["cognition_score"] == 200 and cognition.values["perception_score"] == 0


def test_mme_reads_the_first_four_characters() -> None:
    found = [
        read_mme(text)
        for text in ("Yes, it is", "no", "Not at all", "I know", "The answer is yes", "")
    ]
    assert found == ["yes", "no", "no", "other", "other", "other"]


def test_mme_asks_for_its_tasks_and_pairs() -> None:
    pair = [reference for _, reference in mme_rows("count", set(), 1)]
    assert problems("mme", *pair) == []
    assert (
        "has the category 'cats', expected one of MME's"
        in problems("mme", *[Reference(("yes",), "cats", ("a",))] * 2)[0][1]
    )
    assert "is one of 3 questions about 0.jpg in count" in problems("mme", *pair, pair[0])[0][1]
    assert (
        "expected yes or no"
        in problems(
            "mme", Reference(("two",), "count", ("a",)), Reference(("yes",), "count", ("a",))
        )[0][1]
    )


# ---- multiple choice ----


def test_letters_are_found_where_llava_finds_them() -> None:
    found = {
        "B": "B",
        "B. a dog": "B",
        "The answer is C.": "C",
        "I think. The answer is D. Because": "D",
        "The answer is A. The answer is B.": None,
        "B) a dog": None,
        "b": None,
        "F": None,
        "AB": None,
        "": None,
        "a dog": None,
    }
    assert {text: find_letter(text) for text in found} == found


def test_scienceqa_tells_questions_with_an_image_apart() -> None:
    scores = score(
        "scienceqa",
        [
            ("B", Reference(("B",), None, ("a.png",))),
            ("A", Reference(("B",))),
            ("no", Reference(("C",))),
        ],
    )
    assert scores.values == {"accuracy": pytest.approx(1 / 3), "accuracy_with_image": 1}
    assert problems("scienceqa", Reference(("dog",)))[0][1].startswith(
        "has the answer 'dog', expected one letter of ABCDE"
    )


# ---- ANLS ----


def test_levenshtein_against_its_recursion() -> None:
    def slow(one: str, other: str) -> int:
        if not one or not other:
            return len(one) + len(other)
        edits = (
            slow(one[1:], other),
            slow(one, other[1:]),
            slow(one[1:], other[1:]) - (one[0] == other[0]),
        )
        return 1 + min(edits)

    assert levenshtein("kitten", "sitting") == 3
    draw = random.Random(0)
    for _ in range(100):
        one, other = ("".join(draw.choices("abc", k=draw.randint(0, 5))) for _ in range(2))
        assert levenshtein(one, other) == slow(one, other)


def test_anls_by_hand() -> None:
    assert anls_of("kitten", ["sitting", "dog"]) == pytest.approx(1 - 3 / 7)
    assert anls_of("  The  COCA Cola ", ["the coca cola"]) == 1
    assert (
        anls_of("abcd", ["abxy"]) == 0.5
    )  # the threshold itself counts, as in the published script
    assert anls_of("abc", ["axy"]) == 0 and anls_of("", ["a"]) == 0
    assert score("anls", [("abc", Reference(("abc",))), ("abcd", Reference(("abxy",)))]).values == {
        "anls": 0.75
    }


# ---- captions ----


def test_bleu_and_cider_are_those_of_the_captions() -> None:
    rows = [("a b c d", Reference(("a b c d", "a b"))), ("A cat!", Reference(("a cat", "dogs")))]
    bleu = score("bleu", rows)
    assert 50 < bleu.values["bleu"] < 100 and bleu.of_rows is None
    cider = score("cider", rows)
    references = [[["a", "b", "c", "d"], ["a", "b"]], [["a", "cat"], ["dogs"]]]
    assert cider.of_rows == cider_d([["a", "b", "c", "d"], ["a", "cat"]], references)
    assert cider.values["cider"] > 1
    assert problems("cider", Reference(("a",)))[0][1].startswith("is the only row")
