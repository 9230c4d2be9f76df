"""Initial values of new embedding and head rows: `--init he | mean | mean_cov | codebook | zero`.

    text rows [num_text, hidden]   ──TextStatistics.measure──>  mean [hidden], spread
    method, statistics, vocabulary ──make_rows──>  blocks [n, hidden] float64, num_visual rows in
                                                   all, in id order

Random numbers are numpy's PCG64 normals in float64, rounded to the model's dtype at the very end.
The same seed gives the same bytes on every machine with the same numpy version (NEP 19 allows later
versions to change the normals).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch

from beingvl.errors import InputError
from beingvl.vocab import SPECIAL_TOKENS, VocabLayout

METHODS = ("he", "mean", "mean_cov", "codebook", "zero")
_BLOCK_ROWS = 128  # a few MB; the kernel maps larger arrays anew, page by page, each time
# As in transformers' resize_token_embeddings(mean_resizing=True), to stay close to the mean.
_COVARIANCE_SCALE = 1e-9


@dataclass(frozen=True)
class TextStatistics:
    """Mean row `[hidden]`, and the standard deviation of single elements from it, both float64."""

    mean: np.ndarray
    spread: float

    @classmethod
    def measure(cls, text_rows: torch.Tensor) -> TextStatistics:
        total = np.zeros(text_rows.shape[1])
        for block in _blocks_of(text_rows):
            total += block.sum(0)
        mean = total / len(text_rows)
        squares = sum(float(np.square(block - mean).sum()) for block in _blocks_of(text_rows))
        return cls(mean, float(np.sqrt(squares / text_rows.numel())))


@dataclass(frozen=True)
class VisualVocabulary:
    """For `codebook`: code vectors `[num_vq, dim]` and the codes in each merge."""

    codebook: np.ndarray
    merge_codes: list[np.ndarray] = field(default_factory=list)


def make_rows(
    method: str,
    text_rows: torch.Tensor,
    layout: VocabLayout,
    seed: int,
    stream: int,
    visual: VisualVocabulary | None = None,
) -> Iterator[np.ndarray]:
    """Blocks `[n, hidden]` float64 of the `layout.num_visual` new rows, in id order.

    Args:
        text_rows: `[num_text, hidden]`, any floating dtype; only read, in blocks.
        stream: 0 for the input embedding, 1 for the output head, which draw different numbers.
        visual: needed only by `codebook`.
    """
    random = np.random.Generator(np.random.PCG64([seed, stream]))
    num_rows, hidden = layout.num_visual, text_rows.shape[1]
    if method == "he":
        return _normal_blocks(random, num_rows, hidden, np.sqrt(2 / hidden))
    if method == "zero":
        return (np.zeros((stop - start, hidden)) for start, stop in _ranges(num_rows))
    if method == "mean":
        mean = TextStatistics.measure(text_rows).mean
        return (np.broadcast_to(mean, (stop - start, hidden)) for start, stop in _ranges(num_rows))
    if method == "mean_cov":
        return _mean_cov_blocks(random, text_rows, num_rows)
    assert method == "codebook" and visual is not None, method
    return _codebook_blocks(random, TextStatistics.measure(text_rows), layout, visual)


def check_visual_vocabulary(visual: VisualVocabulary | None, layout: VocabLayout) -> None:
    """Raises InputError if `codebook` rows cannot be made for this layout."""
    if visual is None:
        raise InputError("--init codebook needs --vqgan: rows come from its code vectors")
    if len(visual.merge_codes) != layout.num_merges:
        raise InputError("--init codebook needs --vbpe: a merge's row comes from the codes in it")


def _normal_blocks(
    random: np.random.Generator, num_rows: int, hidden: int, std: float
) -> Iterator[np.ndarray]:
    for start, stop in _ranges(num_rows):
        yield random.standard_normal((stop - start, hidden)) * std


def _mean_cov_blocks(
    random: np.random.Generator, text_rows: torch.Tensor, num_rows: int
) -> Iterator[np.ndarray]:
    """Samples around the mean row with a small multiple of the text rows' covariance."""
    mean = TextStatistics.measure(text_rows).mean
    hidden = len(mean)
    covariance = np.zeros((hidden, hidden))
    for block in _blocks_of(text_rows):
        centred = (block - mean).astype(np.float32)
        covariance += centred.T @ centred
    covariance /= len(text_rows)
    ridge = 1e-6 * np.trace(covariance) / hidden  # it is singular with fewer rows than columns
    factor = np.linalg.cholesky(covariance + (ridge or 1e-30) * np.eye(hidden))
    factor *= np.sqrt(_COVARIANCE_SCALE)
    for start, stop in _ranges(num_rows):
        yield mean + random.standard_normal((stop - start, hidden)) @ factor.T


def _codebook_blocks(
    random: np.random.Generator,
    statistics: TextStatistics,
    layout: VocabLayout,
    visual: VisualVocabulary,
) -> Iterator[np.ndarray]:
    """Specials: random rows like text rows. Codes: their vectors under one random projection.
    Merges: the mean of their cells' rows.

    So similar codes get similar rows, and a merge's row has the mean direction of its codes. Each
    of the three kinds is scaled to the text rows' spread around their mean, because a mean is
    shorter than its parts.
    """
    hidden = len(statistics.mean)
    vectors = visual.codebook.astype(np.float64)
    vectors -= vectors.mean(0)
    projection = random.standard_normal((vectors.shape[1], hidden))
    specials = random.standard_normal((len(SPECIAL_TOKENS), hidden))
    codes = vectors @ projection
    merges = codes[:0]
    if visual.merge_codes:
        merges = np.stack([codes[members].mean(0) for members in visual.merge_codes])
    for rows in (specials, codes, merges):
        scale = statistics.spread / (np.sqrt(np.square(rows).mean()) or 1.0) if len(rows) else 1.0
        for start, stop in _ranges(len(rows)):
            yield statistics.mean + rows[start:stop] * scale


def _blocks_of(rows: torch.Tensor) -> Iterator[np.ndarray]:
    for start, stop in _ranges(len(rows)):
        yield rows[start:stop].double().numpy()


def _ranges(num_rows: int) -> Iterator[tuple[int, int]]:
    for start in range(0, num_rows, _BLOCK_ROWS):
        yield start, min(start + _BLOCK_ROWS, num_rows)
