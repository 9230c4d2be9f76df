"""`beingvl.evaluate` from Python: it returns what scores.json holds, and says what it cannot do."""

import json
from pathlib import Path

import pytest

from beingvl import evaluate
from beingvl.errors import InputError


def test_it_returns_the_scores_and_none_while_other_ranks_work(
    run_folder: Path, tmp_path: Path
) -> None:
    options = {
        "json_path": str(run_folder / "data" / "test.json"),
        "vbpe_path": str(run_folder / "vbpe"),
        "vq_codes": str(run_folder / "vq_codes" / "test"),
        "max_new_tokens": 4,
        "device": "cpu",
        "rows_per_part": 12,
        "num_ranks": 2,
    }
    model, output = str(run_folder / "stage-1" / "final"), tmp_path / "eval"
    assert evaluate(model, str(output), rank=1, **options) is None
    scores = evaluate(model, str(output), rank=0, **options)
    assert scores == json.loads((output / "scores.json").read_text())
    whole = json.loads((run_folder / "eval" / "stage-1" / "scores.json").read_text())
    assert scores == {**whole, "name": "eval"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give one of --json_path, --data and --text_parity, found 0"),
        ({"json_path": "a", "data": "b"}, "found 2"),
        ({"json_path": "a", "metric": "guess"}, "--metric is 'guess', expected one of exact_match"),
        ({"data": "a", "loss_on": "gpt"}, "--loss_on is 'gpt', expected one of response"),
        ({"data": "a", "torch_dtype": "float8"}, "torch_dtype is 'float8'"),
        ({"text_parity": "a", "limit": 1}, "--limit has no effect on --text_parity"),
        ({"data": "a", "image_path": "b"}, "--image_path has no effect on --data"),
    ],
)
def test_what_no_command_line_lets_through_is_refused(
    tmp_path: Path, options: dict[str, object], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        evaluate(tmp_path, tmp_path / "eval", **options)
    assert not (tmp_path / "eval").exists()
