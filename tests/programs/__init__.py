"""Small programs that tests start in processes of their own, because they end or are measured."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def run_program(name: str, *words: object) -> subprocess.CompletedProcess[str]:
    """Run `python -m tests.programs.NAME WORDS…` to its end; its output is kept."""
    return subprocess.run(
        [sys.executable, "-m", f"tests.programs.{name}", *map(str, words)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
