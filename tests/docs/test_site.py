"""mkdocs builds the site: no broken link, no page that the navigation lacks."""

import os
import subprocess
import sys
from pathlib import Path

from tests.docs.pages import REPOSITORY


def test_the_site(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet"]
    done = subprocess.run(
        [*words, "--site-dir", str(tmp_path)],
        cwd=REPOSITORY,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "how-to/memory/index.html").is_file()
