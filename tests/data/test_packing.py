import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from beingvl.data.packing import pack_window, plan_packing, plan_unpacked
from beingvl.errors import InputError


def test_the_documented_example() -> None:
    assert pack_window(np.array([6, 3, 4, 5, 2]), 8) == [[0, 4], [1, 3], [2]]


@given(st.lists(st.integers(1, 50), max_size=200), st.integers(1, 40))
def test_every_sample_once_and_nothing_overflows(lengths: list[int], window: int) -> None:
    lengths_array = np.array(lengths, np.int64)
    plan = plan_packing(lengths_array, 50, window)
    assert sorted(plan.order) == list(range(len(lengths)))
    for number in range(plan.num_sequences):
        members = plan.sequence(number)
        assert lengths_array[members].sum() <= 50
        assert len({int(member) // window for member in members}) == 1


def test_realistic_lengths_fill_98_percent() -> None:
    lengths = np.random.default_rng(0).lognormal(5.5, 0.6, 20_000).clip(20, 4096).astype(int)
    assert plan_packing(lengths, 4096).efficiency > 0.98


@pytest.mark.parametrize("plan", [plan_packing, plan_unpacked])
def test_too_long_a_sample_is_named(plan) -> None:
    with pytest.raises(InputError, match=r"1 of 2 samples are longer than sequence_length 8 \(the longest has 9"):
        plan(np.array([3, 9]), 8)


def test_unpacked_is_one_sample_a_sequence() -> None:
    plan = plan_unpacked(np.array([3, 5]), 8)
    assert [plan.sequence(n).tolist() for n in range(plan.num_sequences)] == [[0], [1]]
