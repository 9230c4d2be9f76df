"""The quickstart as a newcomer starts it, with half of its last stage: it must have learnt to
see.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from beingvl.artefact.manifest import read_manifest
from tests.launcher import ENVIRONMENT, free_port

REPOSITORY = Path(__file__).parents[1]


@pytest.mark.slow
def test_answers_about_images_it_has_never_seen(tmp_path) -> None:
    environment = {
        **ENVIRONMENT,
        "RUN": str(tmp_path / "run"),
        "STAGE3_STEPS": "300",
        "MASTER_PORT": str(free_port()),
    }
    del environment["OMP_NUM_THREADS"]  # the script's own choice
    environment["PYTHON"] = str(
        Path(sys.executable).resolve()
    )  # what .venv was made from: no stage may run in it
    done = subprocess.run(
        ["bash", "scripts/quickstart.sh"],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        timeout=1500,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert read_manifest(tmp_path / "run" / "shards-vbpe").details["merged_images"] == "decoded"
    report = tmp_path / "run" / "report"
    summary = json.loads((report / "summary.json").read_text())
    assert summary["test_accuracy_mean"] >= 0.80, done.stdout[-3000:]
    assert summary["peak_memory_bytes"] < 4e9
    assert summary["vbpe_compression"] >= 1.7
    assert {"accuracy_vbpe_equal_time", "accuracy_raw_equal_time"} <= summary.keys()
    assert {path.name for path in report.iterdir()} >= {
        "summary.json",
        "contact_sheet.png",
        "index.html",
    }
