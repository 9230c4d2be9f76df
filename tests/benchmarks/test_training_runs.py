"""The benchmark of training runs, in small, and ends with its JSON line; with accelerate installed
it compares, too.
"""

import json
import sys

import pytest

from tests.benchmarks import train


def test_it_ends_with_its_json_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmark", "--tiny"])
    assert train.main() == 0
    assert "overhead_fraction" in json.loads(capsys.readouterr().out.splitlines()[-1])
