"""The package as a notebook meets it; test_full_vocabulary.py runs the whole pipeline by it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import beingvl
from beingvl import InputError
from tests.tiny import stage_fields


def test_errors_are_exceptions_and_name_both_sides(tmp_path: Path) -> None:
    (tmp_path / "stage.json").write_text(json.dumps(stage_fields(mixture={"instruction": 1.0})))
    with pytest.raises(InputError, match="none"):
        beingvl.build_shards(tmp_path / "none.jsonl", tmp_path / "shards")
    with pytest.raises(InputError, match="incomplete; make it with `beingvl convert`"):
        beingvl.train(tmp_path, tmp_path, tmp_path, deepspeed_config=str(tmp_path / "stage.json"))


def test_importing_loads_nothing_heavy_and_every_name_is_there() -> None:
    code = "import sys, beingvl; assert not {'torch', 'numpy', 'tqdm'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert all(callable(getattr(beingvl, name)) for name in beingvl.__all__ if name[0] != "_")
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        beingvl.trian  # noqa: B018
