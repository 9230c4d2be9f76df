"""Every metric against published values, or against the definition written down again in a few
lines; refusals.
"""

from __future__ import annotations

import math
import random
import sys
from collections import Counter

import pytest

from beingvl.errors import InputError
from beingvl.evaluation.metrics_qa import (
    METRICS,
    MME_COGNITION,
    Reference,
    anls_of,
    caption_words,
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
    return list(METRICS[metric].check(references))


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
    """Two questions an image, answered rightly but for the question numbers in `wrong`."""
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
    cognition = score("mme", mme_rows(MME_COGNITION[0], set(), 3))
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


def test_caption_words_are_those_of_the_coco_toolkit() -> None:
    """What Stanford's tokenizer and the toolkit's punctuation list gave for these."""
    for caption, expected in {
        "A woman's hand holding a cell phone, with a dog.": "a woman 's hand holding a cell "
        "phone with a dog",
        "Two dogs aren't playing; they're sleeping": "two dogs are n't playing they 're sleeping",
        'A sign (red) that reads "STOP"!': "a sign -lrb- red -rrb- that reads stop",
        "There are 2,000 people at 3:30 p.m.": "there are 2,000 people at 3:30 p.m.",
        "An old-fashioned house with a U.S. flag...": "an old-fashioned house with a u.s. flag",
        "a bath/shower combo on 5th Ave. & Main": "a bath/shower combo on 5th ave. & main",
        "People are gonna play": "people are gon na play",
    }.items():
        assert caption_words(caption) == expected


def test_bleu_of_the_published_example() -> None:
    """Papineni et al. 2002, example 1, candidate 1; NLTK's documentation gives 0.5045 for it."""
    candidate = (
        "It is a guide to action which ensures that the military always obeys the "
        "commands of the party"
    )
    references = (
        "It is a guide to action that ensures that the military will forever heed Party commands",
        "It is the guiding principle which guarantees the military forces always being "
        "under the command of the Party",
        "It is the practical guide for the army always to heed the directions of the party",
    )
    scores = score("bleu", [(candidate, Reference(references))])
    assert scores.values["bleu"] == pytest.approx(50.45666840058485) and scores.of_rows is None
    uneven = score(
        "bleu", [(candidate, Reference(references)), ("a b c d", Reference(("a b c d",)))]
    )
    assert 50 < uneven.values["bleu"] < 100


def cider_again(pairs: list[tuple[str, Reference]]) -> list[float]:
    """CIDEr-D from its definition: tf-idf vectors of 1- to 4-grams, clipped cosine, Gaussian
    length penalty, times 10.
    """

    def grams(text: str, n: int) -> Counter:
        words = text.split()
        return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))

    def similarity(one: str, other: str, n: int) -> float:
        frequency = Counter(
            gram for _, r in pairs for gram in set().union(*(grams(a, n) for a in r.answers))
        )
        weight = {
            g: math.log(len(pairs) / max(1, frequency[g]))
            for g in {*grams(one, n), *grams(other, n)}
        }
        a, b = (
            {g: count * weight[g] for g, count in grams(text, n).items()} for text in (one, other)
        )
        norm = math.sqrt(sum(v * v for v in a.values()) * sum(v * v for v in b.values()))
        dot = sum(min(value, b.get(g, 0)) * b.get(g, 0) for g, value in a.items())
        lengths = [
            max(0, len(text.split()) - 1) for text in (one, other)
        ]  # the toolkit counts bigrams
        return dot / norm * math.exp(-((lengths[0] - lengths[1]) ** 2) / 72) if norm else 0.0

    return [
        10
        * sum(similarity(said, answer, n) for answer in r.answers for n in (1, 2, 3, 4))
        / 4
        / len(r.answers)
        for said, r in pairs
    ]


def test_cider_against_its_definition() -> None:
    rows = [
        (
            "a man riding a wave",
            Reference(("a man riding a wave on a board", "the surfer rides a big wave")),
        ),
        (
            "two dogs play in the grass",
            Reference(("two dogs are playing in grass", "dogs play in the grass")),
        ),
        ("a red bus", Reference(("a double decker bus on the street", "a red bus on a street"))),
        ("a cat", Reference(("a red stop sign",))),
    ]
    scores = score("cider", rows)
    assert scores.of_rows == pytest.approx(cider_again(rows)) and scores.values["cider"] > 1
    assert problems("cider", Reference(("a",)))[0][1].startswith("is the only row")


@pytest.mark.parametrize("metric, library", [("bleu", "sacrebleu"), ("cider", "pycocoevalcap")])
def test_a_missing_library_is_named(
    metric: str, library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == library]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(InputError, match=f"needs {library}: pip install"):
        score(metric, [("a", Reference(("a",))), ("b", Reference(("b",)))])
