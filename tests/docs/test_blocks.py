"""Every shell block of tutorials and how-tos says whether a test runs it, or why not; and runs."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from tests.docs.pages import REPOSITORY
from tests.docs.world import MADE, SMALLER, make_world, run

DOCS = REPOSITORY / "docs"
FOLDERS = (DOCS / "tutorial", DOCS / "how-to")
PAGES = [page for folder in FOLDERS for page in sorted(folder.glob("*.md"))]
PAGES.append(DOCS / "reference/data-formats.md")
BLOCK = re.compile(r"(?:<!-- (.+?) -->\n)?```bash\n(.*?)```", re.DOTALL)
RUNS = "runs"


def marked_blocks(page: Path) -> list[tuple[str, str]]:
    """(mark, commands): "runs", "runs in tests/…" or "not run: why"; "" where it says nothing."""
    return BLOCK.findall(page.read_text())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_block_says_whether_it_runs(page: Path) -> None:
    for mark, commands in marked_blocks(page):
        elsewhere = mark.removeprefix("runs in ") if mark.startswith("runs in ") else ""
        assert mark == RUNS or mark.startswith("not run: ") or elsewhere, commands
        assert not elsewhere or (REPOSITORY / elsewhere).is_file()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    make_world(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_blocks_of_a_page_run(page: Path, world: Path, tmp_path: Path) -> None:
    commands = "".join(block for mark, block in marked_blocks(page) if mark == RUNS)
    if not commands:
        return
    folder = tmp_path / "world"
    shutil.copytree(world, folder, symlinks=True)
    if page.parent.name == "tutorial":  # which makes everything itself
        for name in MADE:
            shutil.rmtree(folder / name)
    for words, instead in SMALLER.items():
        commands = commands.replace(words, instead)
    own = {}
    if page.stem == "cluster":  # its scripts look for their JSON in the repository
        own = {"DS_CONFIG": f"{folder}/ds_configs/stage1.json"}
    run(["bash", "-euc", commands], folder, **own)
