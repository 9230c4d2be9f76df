import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from beingvl.data.mixture import BLOCK, Mixture
from beingvl.errors import InputError

SOURCE_OF = np.repeat([0, 1, 2], [70, 20, 10]).astype(np.uint8)
NAMES = ["a", "b", "c"]
MEMBERS = np.split(np.arange(100), [70, 90])


def mixture(weights=None, seed=0) -> Mixture:
    return Mixture(MEMBERS, NAMES, weights or {"a": 0.5, "b": 0.3, "c": 0.2}, seed)


@settings(deadline=None)
@given(st.integers(0, 2000), st.integers(0, 500))
def test_the_order_is_a_function_of_the_position(start: int, length: int) -> None:
    whole = mixture().draw(0, 2500)
    assert mixture().draw(start, start + length).tolist() == whole[start : start + length].tolist()


def test_shares_are_exact_in_every_block() -> None:
    drawn = SOURCE_OF[mixture().draw(0, 10 * BLOCK)].reshape(10, BLOCK)
    for block in drawn:
        assert np.bincount(block).tolist() == [50, 30, 20]


def test_uneven_weights_are_exact_in_the_long_run() -> None:
    drawn = SOURCE_OF[mixture({"a": 1, "b": 1, "c": 1}).draw(0, 30 * BLOCK)]
    assert np.ptp(np.bincount(drawn)) <= 2


@pytest.mark.parametrize("weights", [[1] * 30, [1] * 51, [1] * 256, [1e-3] * 254 + [1e6, 3]])
def test_many_sources_have_their_shares(weights: list[float]) -> None:
    names = [f"s{number}" for number in range(len(weights))]
    many = Mixture(
        np.split(np.arange(10 * len(weights)), len(weights)),
        names,
        dict(zip(names, weights, strict=True)),
        0,
    )
    drawn = many.draw(0, 140_000)
    expected = np.array(weights) / sum(weights) * len(drawn)
    assert np.abs(np.bincount(drawn // 10, minlength=len(weights)) - expected).max() <= len(weights)
    assert many.draw(99_950, 100_150).tolist() == drawn[99_950:100_150].tolist()
    assert (
        list(many.counts(70_001).values())
        == np.bincount(drawn[:70_001] // 10, minlength=len(weights)).tolist()
    )


def test_nothing_repeats_within_a_pass() -> None:
    order = mixture().draw(0, 1000)
    of_c = order[SOURCE_OF[order] == 2]
    for start in range(0, len(of_c) - 10, 10):
        assert sorted(of_c[start : start + 10]) == list(range(90, 100))
    assert of_c[:10].tolist() != of_c[10:20].tolist()


def test_seed_and_missing_sources() -> None:
    assert mixture(seed=1).draw(0, 50).tolist() != mixture(seed=2).draw(0, 50).tolist()
    only = mixture({"b": 1, "c": 0})
    assert set(SOURCE_OF[only.draw(0, 200)]) == {1}
    assert only.num_samples == 20


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"x": 1}, "'x'"),
        ({"a": 0}, "at least one above 0"),
        ({"a": -1, "b": 1}, "negative"),
        *(
            ({"a": weight, "b": 1}, "expected numbers")
            for weight in (math.inf, math.nan, "1", True, None)
        ),
    ],
)
def test_bad_weights(weights, message) -> None:
    with pytest.raises(InputError, match=message):
        Mixture(MEMBERS, NAMES, weights, 0)
