import itertools
import math

import numpy as np
import pytest

from beingvl.data.loader import MicroBatch
from beingvl.train.loss import LossSums, backward_scale, learning_rate_at
from tests.tiny import LAYOUT


def test_learning_rate_warms_up_from_the_first_step_and_ends_near_zero() -> None:
    rates = [learning_rate_at(step, 100, 1.0, "cosine", 0.03, 0.0) for step in range(100)]
    assert rates[:3] == pytest.approx([1 / 3, 2 / 3, 1.0])
    assert rates[3] == 1.0 and 0 < rates[-1] < 1e-3
    assert all(before >= after for before, after in itertools.pairwise(rates[3:]))


def test_constant_and_minimum() -> None:
    assert learning_rate_at(50, 100, 2.0, "constant", 0.1, 0.0) == 2.0
    assert learning_rate_at(99, 100, 1.0, "cosine", 0.0, 0.1) == pytest.approx(0.1, abs=1e-3)
    assert learning_rate_at(0, 1, 1.0, "cosine", 0.0, 0.0) == 1.0


def test_backward_scale_undoes_what_deepspeed_divides_by() -> None:
    sums, counts = [6.0, 1.0, 8.0, 3.0], [3, 1, 2, 2]  # two ranks x two micro steps
    scale = backward_scale(sum(counts), 2, 2)
    deepspeed_result = sum(value * scale for value in sums) / (2 * 2)
    assert deepspeed_result == pytest.approx(sum(sums) / sum(counts))
    assert backward_scale(0, 2, 2) == 0.0


def test_sums_by_kind_and_source() -> None:
    targets = np.array([5, -100, LAYOUT.sep_id, LAYOUT.first_image_id, LAYOUT.first_vbpe_id])
    zeros = np.zeros(5, np.int64)
    sources = np.array([0, 0, 0, 1, 1], np.uint8)
    batch = MicroBatch(
        zeros, targets, zeros, np.array([0, 5], np.int32), LAYOUT.token_kinds(zeros), sources, ()
    )
    sums = LossSums.zero(LAYOUT, ["a", "b", "c"])
    sums.add(batch, np.array([1.0, 2.0, 3.0, 5.0]))
    means = sums.means()
    assert means == {
        "loss": 11 / 4,
        "loss/kind/text": 1.0,
        "loss/kind/special": 2.0,
        "loss/kind/vq": 3.0,
        "loss/kind/vbpe": 5.0,
        "loss/source/a": 1.5,
        "loss/source/b": 4.0,
    }
    assert not math.isnan(LossSums.zero(LAYOUT, []).means()["loss"])
