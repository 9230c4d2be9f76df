"""Small programs that tests start in processes of their own, because they end or are measured."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.launcher import ENVIRONMENT, PYTHON


def run_program(
    name: str, *words: object, is_measured: bool = False
) -> subprocess.CompletedProcess[str]:
    """Run `python -m tests.programs.NAME WORDS…` to its end; its output is kept. A program whose
    imports or memory are measured gets a Python that has imported nothing.
    """
    python = [sys.executable] if is_measured else PYTHON
    return subprocess.run(
        [*python, "-m", f"tests.programs.{name}", *map(str, words)],
        cwd=Path(__file__).parents[2],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
    )
