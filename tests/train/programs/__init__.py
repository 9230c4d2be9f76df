"""Programs that tests of training start in processes of their own."""

from __future__ import annotations

import subprocess
from pathlib import Path

from tests.launcher import ENVIRONMENT, PYTHON, free_port


def program(name: str, *words: object) -> list[str]:
    """The command that starts one."""
    return [*PYTHON, "-m", f"tests.train.programs.{name}", *map(str, words)]


def run_program(name: str, *words: object, **variables: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        program(name, *words),
        env={**ENVIRONMENT, "MASTER_PORT": str(free_port()), **variables},
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        timeout=300,
    )
