"""The benchmark of vBPE runs, in small, and ends with its JSON line."""

import json
import sys

import pytest

from tests.benchmarks import vbpe


def test_it_ends_with_its_json_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["vbpe", "--tiny"])
    vbpe.main()
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    names = {"train_ratio", "train_ratio_alpha", "encode_ratio", "growth_slope", "bytes_per_cell"}
    assert found.keys() == names and found["train_ratio"] > 0
