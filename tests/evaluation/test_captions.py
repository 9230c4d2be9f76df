"""Words of captions as the COCO toolkit cuts them, CIDEr-D against pycocoevalcap, BLEU against a
published example.
"""

import random
import sys

import pytest
from pycocoevalcap.cider.cider_scorer import CiderScorer

from beingvl.errors import InputError
from beingvl.evaluation.captions import caption_words, cider_d, corpus_bleu


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
        "Y'all like a rock 'n' roll shirt": "y' all like a rock 'n' roll shirt",
    }.items():
        assert caption_words(caption) == expected.split()


# ---- CIDEr-D ----


def published_cider(captions: list[list[str]], references: list[list[list[str]]]) -> list[float]:
    """The COCO toolkit's, on the same words."""
    scorer = CiderScorer(n=4, sigma=6.0)
    for words, row in zip(captions, references, strict=True):
        scorer += (" ".join(words), [" ".join(reference) for reference in row])
    return scorer.compute_score()[1].tolist()


def test_cider_of_captions_equals_the_coco_toolkit() -> None:
    rows = [
        ("A man riding a wave.", ["A man riding a wave on a board", "the surfer rides a big wave"]),
        ("two dogs play in the grass", ["Two dogs are playing in grass", "dogs play in the grass"]),
        (
            "a red bus",
            ["a double-decker bus on the street", "a red bus on a street", "the red bus"],
        ),
        ("cats", ["A red stop sign!"]),
    ]
    captions = [caption_words(caption) for caption, _ in rows]
    references = [[caption_words(reference) for reference in row] for _, row in rows]
    scores = cider_d(captions, references)
    assert scores == pytest.approx(published_cider(captions, references), rel=1e-12)
    assert scores[0] > 1 and scores[3] == 0


@pytest.mark.parametrize("seed", range(20))
def test_cider_of_random_words_equals_the_coco_toolkit(seed: int) -> None:
    """Repeated words and grams, lengths from 0 to 30, one to five references."""
    draw = random.Random(seed)
    words = [f"word{number}" for number in range(draw.randint(2, 10))]

    def caption() -> list[str]:
        return draw.choices(words, k=draw.randint(0, 30))

    captions = [caption() for _ in range(draw.randint(1, 12))]
    references = [[caption() for _ in range(draw.randint(1, 5))] for _ in captions]
    for row in range(0, len(captions), 3):
        captions[row] = list(references[row][0])
    expected = published_cider(captions, references)
    assert cider_d(captions, references) == pytest.approx(expected, rel=1e-12, abs=1e-12)


# ---- BLEU ----


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
    score, _ = corpus_bleu([candidate], [references])
    assert score == pytest.approx(50.45666840858485)
    uneven, _ = corpus_bleu([candidate, "a b c d"], [references, ("a b c d",)])
    assert 50 < uneven < 100


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "sacrebleu"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    with pytest.raises(InputError, match="needs sacrebleu: pip install"):
        corpus_bleu(["a"], [["a"]])
