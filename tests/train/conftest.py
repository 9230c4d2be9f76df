"""One tiny model, its data, and the uninterrupted run that interrupted ones are held to."""

from pathlib import Path

import pytest

from tests.launcher import log_of, run
from tests.tiny import stage_fields, write_inputs

ROWS_ONLY = [{"match": "visual_rows"}, {"match": ".*", "train": False}]
STALL_SECONDS = 8


@pytest.fixture(scope="session")
def work(tmp_path_factory) -> Path:
    return write_inputs(
        tmp_path_factory.mktemp("train"),
        rows=stage_fields(trainable=ROWS_ONLY),
        all=stage_fields(epochs=4, stall_timeout_seconds=STALL_SECONDS),
    )


@pytest.fixture(scope="session")
def whole_run(work) -> Path:
    """Everything trained on two ranks, to the end."""
    output = work / "all"
    assert run(2, work / "all.json", work / "base", work / "shards", output) == 0, log_of(output)
    return output
