"""Every link of a page leads somewhere: to a file of the repository and, with #, to a heading."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.docs.pages import REPOSITORY, anchors, links, pages


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in links(page.read_text()):
        if "://" in target or target.startswith("mailto:"):
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name) if name else page
        assert file.exists(), f"{page.name}: {target} is not there"
        if anchor and file.suffix == ".md":
            found = anchors(file.read_text())
            assert anchor in found, f"{page.name}: {target}: no such heading, but {sorted(found)}"


def test_a_wrong_link_is_seen() -> None:
    text = "# A b, c\n[x](gone.md) ![y](z.png#q) `[code](no.md)`\n```\n[in](block.md)\n```\n"
    assert links(text) == ["gone.md", "z.png#q"]
    assert anchors(text) == {"a-b-c"}
