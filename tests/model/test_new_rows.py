"""Initial rows: what each method promises about mean, spread and likeness, and that a seed
decides them.
"""

import numpy as np
import pytest
import torch

from beingvl.commands.convert import INIT_METHODS
from beingvl.errors import InputError
from beingvl.model.new_rows import (
    METHODS,
    TextStatistics,
    VisualVocabulary,
    check_visual_vocabulary,
    make_rows,
)
from beingvl.vocab import VocabLayout

LAYOUT = VocabLayout(num_text=3000, num_vq=64, num_merges=32, bos_id=0, eos_id=1)
HIDDEN = 24


@pytest.fixture(scope="module")
def text_rows() -> torch.Tensor:
    random = torch.Generator().manual_seed(0)
    spread = torch.linspace(0.5, 1.5, HIDDEN)
    return (0.3 + torch.randn(LAYOUT.num_text, HIDDEN, generator=random) * spread).bfloat16()


@pytest.fixture(scope="module")
def visual() -> VisualVocabulary:
    random = np.random.default_rng(1)
    codebook = random.standard_normal((LAYOUT.num_vq, 8)).astype(np.float32)
    codebook[1] = codebook[0] + 0.01
    return VisualVocabulary(
        codebook,
        [random.integers(0, LAYOUT.num_vq, size) for size in range(2, 2 + LAYOUT.num_merges)],
    )


def rows(
    method: str, text_rows: torch.Tensor, visual: VisualVocabulary, seed: int = 0, stream: int = 0
) -> np.ndarray:
    blocks = list(make_rows(method, text_rows, LAYOUT, seed, stream, visual))
    assert all(block.dtype == np.float64 for block in blocks)
    return np.concatenate(blocks)


def test_the_command_offers_exactly_these_methods():
    assert INIT_METHODS == METHODS


@pytest.mark.parametrize("method", METHODS)
def test_every_method_gives_one_finite_row_a_new_id(method, text_rows, visual):
    made = rows(method, text_rows, visual)
    assert made.shape == (LAYOUT.num_visual, HIDDEN) and np.isfinite(made).all()
    assert np.array_equal(made, rows(method, text_rows, visual))


@pytest.mark.parametrize("method", ["he", "mean_cov", "codebook"])
def test_seed_and_stream_decide_the_draws(method, text_rows, visual):
    made = rows(method, text_rows, visual)
    assert not np.array_equal(made, rows(method, text_rows, visual, seed=1))
    assert not np.array_equal(made, rows(method, text_rows, visual, stream=1))


def test_text_statistics(text_rows):
    exact = text_rows.double().numpy()
    statistics = TextStatistics.measure(text_rows)
    assert statistics.mean == pytest.approx(exact.mean(0)) and statistics.spread == pytest.approx(
        (exact - exact.mean(0)).std()
    )


def test_he_has_its_standard_deviation(text_rows, visual):
    assert rows("he", text_rows, visual).std() == pytest.approx(np.sqrt(2 / HIDDEN), rel=0.05)


def test_mean_and_zero(text_rows, visual):
    assert np.allclose(
        rows("mean", text_rows, visual), text_rows.double().numpy().mean(0), rtol=0, atol=1e-12
    )
    assert not rows("zero", text_rows, visual).any()


def test_mean_cov_follows_the_text_rows_covariance(text_rows):
    layout = VocabLayout(LAYOUT.num_text, 20_000, 0, 0, 1)
    made = np.concatenate(list(make_rows("mean_cov", text_rows, layout, 0, 0)))
    expected = np.cov(text_rows.double().numpy().T, bias=True) * 1e-9
    assert np.abs(np.cov(made.T) - expected).max() < 0.05 * expected.max()
    assert made.mean(0) == pytest.approx(text_rows.double().numpy().mean(0), abs=1e-5)


def test_codebook_rows_look_alike_where_codes_do(text_rows, visual):
    made = rows("codebook", text_rows, visual)
    statistics = TextStatistics.measure(text_rows)
    specials, codes, merges = np.split(made - statistics.mean, [5, 5 + LAYOUT.num_vq])
    for group in (specials, codes, merges):
        assert np.sqrt(np.square(group).mean()) == pytest.approx(statistics.spread)
    distances = np.linalg.norm(codes[0] - codes, axis=1)
    assert distances[1] < 0.05 * np.median(distances)
    expected = np.stack([codes[members].mean(0) for members in visual.merge_codes])
    scale = merges / expected
    assert np.allclose(scale, scale[0, 0])


def test_codebook_needs_code_vectors_and_merges(visual):
    with pytest.raises(InputError, match="needs --vqgan"):
        check_visual_vocabulary(None, LAYOUT)
    with pytest.raises(InputError, match="needs --vbpe"):
        check_visual_vocabulary(VisualVocabulary(visual.codebook), LAYOUT)
    check_visual_vocabulary(visual, LAYOUT)
