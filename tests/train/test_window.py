"""What a training loop gets: windows of ascending steps, which a loader of any number of ranks
goes on with.
"""

from collections.abc import Iterator

import pytest

from beingvl.data.arrow_shards import ShardReader
from beingvl.data.loader import TrainingData
from beingvl.data.stage_data import data_of
from beingvl.stage.stage_config import load_stage_config
from beingvl.train.window import Window, WindowFetcher
from tests.tiny import stage_fields, write_inputs


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> TrainingData:
    folder = write_inputs(tmp_path_factory.mktemp("inputs"), all=stage_fields())
    return data_of(load_stage_config(folder / "all.json"), ShardReader(folder / "shards"))


def fetchers(data: TrainingData, num_ranks: int) -> list[WindowFetcher]:
    accumulation = data.sequences_per_step // num_ranks
    return [
        WindowFetcher(data, accumulation, 1, rank, num_ranks, stop=data.num_steps)
        for rank in range(num_ranks)
    ]


def names(windows: Iterator[Window]) -> list[list[str]]:
    return [[name for batch in window.batches for name in batch.sample_ids] for window in windows]


def test_a_loader_of_another_number_of_ranks_goes_on_from_the_state(data) -> None:
    (whole,) = fetchers(data, 1)
    expected = names(whole)
    assert len(expected) == data.num_steps > 3 and whole.state_dict() == {"step": data.num_steps}

    (first,) = fetchers(data, 1)
    seen = names(next(first) for _ in range(2))
    state = first.state_dict()
    second = fetchers(data, 2)
    for fetcher in second:
        fetcher.load_state_dict(state)
    rest = [sorted(a + b) for a, b in zip(*(names(fetcher) for fetcher in second), strict=True)]
    assert (
        state == {"step": 2}
        and seen == expected[:2]
        and rest == [sorted(step) for step in expected[2:]]
    )


def test_a_loader_that_is_set_back_gives_what_it_gave(data) -> None:
    (fetcher,) = fetchers(data, 1)
    before = next(fetcher)
    fetcher.load_state_dict({"step": 0})
    again = next(fetcher)
    assert all(
        (a.input_ids == b.input_ids).all()
        for a, b in zip(before.batches, again.batches, strict=True)
    )
    assert (before.counts == again.counts).all()
    fetcher.load_state_dict({"step": data.num_steps})
    with pytest.raises(StopIteration):
        next(fetcher)
