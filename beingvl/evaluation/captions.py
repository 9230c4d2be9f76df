"""Caption metrics: tokenization, CIDEr-D, and sacrebleu's BLEU.

CIDEr-D (Vedantam, Zitnick and Parikh 2015, arXiv 1411.5726) weights a caption's 1- to 4-grams by
how few of the evaluated rows have them in a reference, and takes the cosine with each reference:

    g(gram)     = count * (log(rows) - log(max(1, rows with the gram in a reference)))
    sim_n(c, r) = sum of min(g_c, g_r) * g_r / (|g_c| |g_r|) * exp(-(len_c - len_r)² / (2 * 6²))
    CIDEr-D     = 10 * mean over n = 1 … 4 and over the references

As in the COCO toolkit, a caption's length is its number of bigrams. A test compares both with the
toolkit.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from beingvl.errors import InputError

LONGEST_GRAM = 4
SIGMA = 6.0

# ---- words ----

_CLITIC = re.compile(r"(?<=\w)(n't|'(?:s|re|ve|ll|d|m))\b")
_WORD = re.compile(
    # clitics, abbreviations, .5
    r"n't\b|'n'|y'(?=all\b)|'(?:s|re|ve|ll|d|m)\b|(?:[a-z]\.){2,}|(?:mr|mrs|ms|dr|st|ave|vs|jr)\.|\.\d+"
    # words, old-fashioned, bath/shower, 2,000; anything else
    r"|\w+(?:(?:-|(?<=[a-z])/(?=[a-z])|(?<=\d)[.,:](?=\d))\w+)*|\S"
)
_SPLIT_WORDS = {"cannot": "can not", "gonna": "gon na", "gotta": "got ta", "wanna": "wan na"}
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
_DROPPED = set(".?!,:;-'`\"…–—")


def caption_words(caption: str) -> list[str]:
    """A caption's words as the COCO toolkit compares them: lower case, split as in the Penn
    Treebank, without punctuation.

    The toolkit runs Stanford's tokenizer in Java; on ordinary English captions this gives the same
    words (docs/dev/log.md). Brackets stay as `-lrb-` and `-rrb-`, because the toolkit lower-cases
    before it drops punctuation.
    """
    text = caption.lower().replace("\N{RIGHT SINGLE QUOTATION MARK}", "'")
    words = [
        _BRACKETS.get(word, _SPLIT_WORDS.get(word, word))
        for word in _WORD.findall(_CLITIC.sub(r" \1", text))
    ]
    return " ".join(word for word in words if word not in _DROPPED).split()


# ---- CIDEr-D ----

Gram = tuple[str, ...]


@dataclass(frozen=True)
class _Vector:
    """A caption's weighted n-grams, their norm for each n, and its length in bigrams."""

    weights: dict[Gram, float]
    norms: list[float]
    length: int


def count_grams(words: Sequence[str]) -> Counter[Gram]:
    """All 1- to 4-grams of a caption."""
    return Counter(
        tuple(words[start : start + n])
        for n in range(1, LONGEST_GRAM + 1)
        for start in range(len(words) - n + 1)
    )


def cider_d(
    captions: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]]
) -> list[float]:
    """CIDEr-D, 0 … 10, of each caption's words against those of its row's references.

    Document frequencies come from `references`, so the scores are valid for this set of rows only.
    """
    grams_of_rows = [[count_grams(words) for words in row] for row in references]
    num_rows_with = Counter(gram for row in grams_of_rows for gram in set().union(*row))

    def weigh(grams: Counter[Gram]) -> _Vector:
        weights = {
            gram: count * (math.log(len(references)) - math.log(max(1, num_rows_with[gram])))
            for gram, count in grams.items()
        }
        squares = [0.0] * LONGEST_GRAM
        for gram, weight in weights.items():
            squares[len(gram) - 1] += weight**2
        length = sum(count for gram, count in grams.items() if len(gram) == 2)
        return _Vector(weights, [math.sqrt(square) for square in squares], length)

    scores = []
    for words, row in zip(captions, grams_of_rows, strict=True):
        caption = weigh(count_grams(words))
        similarities = [_similarity(caption, weigh(grams)) for grams in row]
        scores.append(10 * math.fsum(similarities) / len(similarities))
    return scores


def _similarity(caption: _Vector, reference: _Vector) -> float:
    """Mean over n of the clipped cosine, times the penalty for a different length."""
    products = [0.0] * LONGEST_GRAM
    for gram, weight in caption.weights.items():
        theirs = reference.weights.get(gram, 0.0)
        products[len(gram) - 1] += min(weight, theirs) * theirs
    cosines = [
        product / (ours * theirs) if ours and theirs else 0.0
        for product, ours, theirs in zip(products, caption.norms, reference.norms, strict=True)
    ]
    penalty = math.exp(-((caption.length - reference.length) ** 2) / (2 * SIGMA**2))
    return penalty * math.fsum(cosines) / LONGEST_GRAM


# ---- BLEU ----


def corpus_bleu(
    captions: Sequence[str], references: Sequence[Sequence[str]]
) -> tuple[float, float]:
    """sacrebleu's corpus BLEU, 0 … 100, with its default tokenizer and smoothing, and the brevity
    penalty. Raises InputError if sacrebleu, an optional extra, is not installed.
    """
    try:
        from sacrebleu.metrics import BLEU
    except ImportError as error:
        raise InputError("--metric bleu needs sacrebleu: pip install '.[evaluation]'") from error
    most = max(map(len, references))
    streams: list[Any] = [  # the first, second … reference of every row; None if a row has fewer
        [row[number] if number < len(row) else None for row in references] for number in range(most)
    ]
    found = BLEU().corpus_score(list(captions), streams)
    return found.score, found.bp
