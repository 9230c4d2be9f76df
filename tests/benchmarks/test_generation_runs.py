"""The benchmarks of inference and evaluation run, in small, and end with their JSON line."""

import json
import sys
from types import ModuleType

import pytest

from tests.benchmarks import generate, lmms_task


@pytest.mark.parametrize(
    ("benchmark", "key"),
    [(generate, "batch_equal"), (lmms_task, "accuracy")],
    ids=["generate", "lmms_task"],
)
def test_it_ends_with_its_json_line(
    benchmark: ModuleType,
    key: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmark", "--tiny"])
    benchmark.main()
    assert key in json.loads(capsys.readouterr().out.splitlines()[-1])
