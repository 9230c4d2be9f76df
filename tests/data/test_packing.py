import time
from threading import Event

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from beingvl.data import packing
from beingvl.data.packing import WINDOW, WINDOWS_AT_ONCE, PackingPlan, count_sequences, pack_window
from beingvl.errors import InputError


def plan(lengths, sequence_length, packing=True):
    lengths = np.array(lengths)
    return PackingPlan(
        lambda start, stop: lengths[start:stop], len(lengths), sequence_length, packing
    )


def test_a_long_plan_shows_life_with_every_window() -> None:
    life: list[None] = []
    lengths = np.full(3 * WINDOW + 1, 5)
    made = PackingPlan(
        lambda start, stop: lengths[start:stop],
        len(lengths),
        64,
        advance=lambda: life.append(None),
    )
    assert made.num_sequences and len(life) == 4


def test_the_documented_example() -> None:
    assert pack_window(np.array([6, 3, 4, 5, 2]), 8) == [[0, 4], [2], [1, 3]]


@given(st.lists(st.integers(1, 50), max_size=200), st.integers(50, 70))
def test_every_sample_once_and_nothing_overflows(lengths: list[int], capacity: int) -> None:
    sequences = pack_window(np.array(lengths, np.int64), capacity)
    assert sorted(position for sequence in sequences for position in sequence) == list(
        range(len(lengths))
    )
    assert all(
        sum(lengths[position] for position in sequence) <= capacity for sequence in sequences
    )


def test_a_window_does_not_go_from_short_samples_to_long_ones() -> None:
    lengths = np.random.default_rng(0).lognormal(5.5, 0.6, (20, WINDOW)).clip(20, 1500).astype(int)
    packed = [[len(sequence) for sequence in pack_window(window, 2048)] for window in lengths]
    eighths = np.array(
        [[np.mean(part) for part in np.array_split(sizes, 8)] for sizes in packed]
    ).mean(0)
    assert eighths.std() < 0.03 * eighths.mean(), eighths


@given(st.lists(st.integers(1, 50), max_size=300), st.integers(50, 130))
def test_counting_is_packing(lengths: list[int], capacity: int) -> None:
    array = np.array(lengths, np.int64)
    assert count_sequences(array, capacity) == len(pack_window(array, capacity))


@pytest.mark.parametrize("sequence_length", [4096, 8192, 1500])
def test_realistic_lengths_fill_98_percent_and_are_counted_right(sequence_length: int) -> None:
    lengths = (
        np.random.default_rng(0).lognormal(5.5, 0.6, 5 * WINDOW + 100).clip(20, 1500).astype(int)
    )
    found = plan(lengths, sequence_length)
    assert found.efficiency > 0.98
    for window in range(6):
        packed = pack_window(lengths[window * WINDOW : (window + 1) * WINDOW], sequence_length)
        assert found.starts[window + 1] - found.starts[window] == len(packed)
    assert found.efficiency == lengths.sum() / (found.num_sequences * sequence_length)


def test_where_a_sequence_lies() -> None:
    found = plan([8] * (WINDOW + 3), 8)
    places = [(0, 0, WINDOW), (0, WINDOW - 1, WINDOW), (1, 0, 3), (1, 2, 3)]
    assert [found.window_of(s) for s in (0, WINDOW - 1, WINDOW, WINDOW + 2)] == places
    assert found.at_most(WINDOW) == WINDOW and found.at_most(2 * WINDOW) == WINDOW + 3
    kept = PackingPlan(lambda start, stop: 1 / 0, WINDOW + 3, 8, known=found.counts)
    assert kept.starts.tolist() == found.starts.tolist() and kept.efficiency == found.efficiency


def test_the_first_sequences_are_known_before_the_last_samples_are_looked_at() -> None:
    asked, may_go_on = Event(), Event()

    def lengths_of(start: int, stop: int) -> np.ndarray:
        if start:
            asked.set()
            assert may_go_on.wait(20)
        return np.full(stop - start, 8)

    found = PackingPlan(lengths_of, WINDOWS_AT_ONCE * WINDOW + 1, 8)
    assert asked.wait(20) and found.window_of(WINDOW - 1) == (0, WINDOW - 1, WINDOW)
    may_go_on.set()
    assert found.num_sequences == WINDOWS_AT_ONCE * WINDOW + 1


def test_an_error_reaches_whoever_asks_for_what_lies_behind_it() -> None:
    found = plan([8] * WINDOW * WINDOWS_AT_ONCE + [9], 8)
    assert found.window_of(3) == (0, 3, WINDOW)
    for _ in range(2):
        with pytest.raises(InputError, match="longer than sequence_length"):
            found.num_sequences  # noqa: B018


@pytest.mark.parametrize("packing", [True, False])
def test_too_long_a_sample_is_named(packing) -> None:
    with pytest.raises(
        InputError, match=r"1 of 2 samples are longer than sequence_length 8 \(the longest has 9"
    ):
        plan([3, 9], 8, packing).num_sequences  # noqa: B018


def test_unpacked_is_one_sample_a_sequence() -> None:
    assert plan([3, 5], 8, packing=False).starts.tolist() == [0, 2]


def test_the_plan_rests_while_a_batch_is_made(monkeypatch) -> None:
    """Else a batch waits for the interpreter's lock; what is planned does not depend on it."""
    monkeypatch.setattr(packing, "LONGEST_REST_SECONDS", 60)
    num_samples, asked = 4000 * WINDOW + 5, []

    def lengths_of(start: int, stop: int) -> np.ndarray:
        asked.append((start, stop))
        return np.full(stop - start, 3, np.int32)

    plan = PackingPlan(lengths_of, num_samples, 8)
    with plan.resting(), plan.resting():
        assert plan.at_most(0) == 0
        time.sleep(0.01)  # what had begun ends
        before = len(asked)
        time.sleep(0.1)
        assert len(asked) <= before + 1
    assert plan.num_sequences == 4000 * WINDOW // 2 + 3
    assert asked[0] == (0, WINDOW) and asked[-1][1] == num_samples and len(asked) > 20
    monkeypatch.setattr(packing, "LONGEST_REST_SECONDS", 0.001)
    plan = PackingPlan(lengths_of, 3 * WINDOW, 8)
    with plan.resting():  # somebody at work for ever stops nobody who waits for the number of all
        assert plan.num_sequences == 3 * WINDOW // 2
