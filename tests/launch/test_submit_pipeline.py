"""What scripts/slurm/submit-pipeline.sh submits, with a program in the place of sbatch."""

import os
import subprocess
from pathlib import Path

import pytest

from tests.launcher import ENVIRONMENT

REPOSITORY = Path(__file__).parents[2]


@pytest.mark.parametrize("name", ["vbpe.json", "vbpe"])
def test_a_vbpe_file_or_folder_that_is_finished_is_not_trained_again(tmp_path, name) -> None:
    sbatch = tmp_path / "bin/sbatch"
    sbatch.parent.mkdir()
    sbatch.write_text("#!/bin/sh\necho 7\n")
    sbatch.chmod(0o755)
    path = f"{sbatch.parent}:{os.environ['PATH']}"
    environment = {
        **ENVIRONMENT,
        "PATH": path,
        "WORKSPACE": str(tmp_path),
        "VBPE_PATH": str(tmp_path / name),
    }

    def shown() -> str:
        return subprocess.check_output(
            ["bash", "scripts/slurm/submit-pipeline.sh"], cwd=REPOSITORY, env=environment, text=True
        )

    assert "train-vbpe: job 7" in shown()
    marker = tmp_path / name if name.endswith(".json") else tmp_path / name / "manifest.json"
    marker.parent.mkdir(exist_ok=True)
    marker.write_text("{}")
    assert "train-vbpe: finished" in shown()
