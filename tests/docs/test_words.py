"""Pages stay short: in all, by the paragraph, and CHANGELOG by its bullets."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.docs.pages import REPOSITORY, count_words, pages, paragraphs, user_pages

LONG = {"log.md", "benchmarks.md", "decisions.md"}  # of dev/, for who looks something up


def test_all_user_pages_have_at_most_15000_words() -> None:
    counts = {page: count_words(page.read_text()) for page in user_pages()}
    for page, count in counts.items():
        print(f"{count:6} {page.relative_to(REPOSITORY)}")
    print(f"{sum(counts.values()):6} in all")
    assert sum(counts.values()) <= 15_000


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_no_paragraph_has_more_than_90_words(page: Path) -> None:
    if page.name in LONG:
        return
    for paragraph in paragraphs(page.read_text()):
        assert count_words(paragraph) <= 90, f"{page.name}: {count_words(paragraph)}: {paragraph}"


def test_the_changelog_has_at_most_15_bullets() -> None:
    unreleased = (REPOSITORY / "CHANGELOG.md").read_text().split("\n## ")[1]
    assert unreleased.count("\n- ") <= 15
