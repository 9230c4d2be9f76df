"""Environments of their own for what the tests' own one must not hold, on top of it."""

from __future__ import annotations

import os
import site
import subprocess
import venv
from pathlib import Path


def own_environment(folder: Path, *packages: str) -> Path:
    """The python of a new environment with `packages`, from PyPI."""
    venv.create(folder, with_pip=True)
    [installed] = (folder / "lib").glob("python*/site-packages")
    (installed / "base.pth").write_text("\n".join(site.getsitepackages()) + "\n")
    python = folder / "bin" / "python"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run([python, "-m", "pip", "install", "-q", *packages], check=True, env=environment)
    return python
