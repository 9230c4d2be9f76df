"""The benchmarks of training run, in small, and end with their JSON line."""

import json
import sys
from types import ModuleType

import pytest

from tests.benchmarks import loss, train


@pytest.mark.parametrize(
    ("benchmark", "key"),
    [(train, "overhead_fraction"), (loss, "ours")],
    ids=["train", "loss"],
)
def test_it_ends_with_its_json_line(
    benchmark: ModuleType,
    key: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmark", "--tiny"])
    assert benchmark.main() == 0
    assert key in json.loads(capsys.readouterr().out.splitlines()[-1])
