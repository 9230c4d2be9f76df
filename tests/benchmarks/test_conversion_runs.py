"""The benchmark of conversions runs and ends with its line of JSON."""

import json
import sys

from tests.benchmarks import convert


def test_the_benchmark_of_conversions_runs(monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmark", "--tiny"])
    assert convert.main() == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["max_abs_diff"] == 0 and result["time_ratio_copy"] > 0
