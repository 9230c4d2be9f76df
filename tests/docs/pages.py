"""The project's own pages, and what is in them."""

from __future__ import annotations

import re
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
GENERATED = "docs/reference/command-line.md"


def pages() -> list[Path]:
    return [*sorted(REPOSITORY.glob("*.md")), *sorted((REPOSITORY / "docs").rglob("*.md"))]


def user_pages() -> list[Path]:
    """README and docs/ without dev/ and what is generated."""
    docs = REPOSITORY / "docs"
    left_out = {*(docs / "dev").glob("*.md"), REPOSITORY / GENERATED}
    return [
        REPOSITORY / "README.md",
        *(page for page in docs.rglob("*.md") if page not in left_out),
    ]


def links(text: str) -> list[str]:
    """Targets of links and pictures outside blocks of code."""
    return LINK.findall(re.sub(r"`[^`\n]*`", "", FENCE.sub("", text)))


def anchors(text: str) -> set[str]:
    """Of its headings, as GitHub makes them."""
    headings = re.findall(r"^#+ +(.+?) *$", FENCE.sub("", text), re.MULTILINE)
    kept = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings)
    return {heading.replace(" ", "-") for heading in kept}


def count_words(text: str) -> int:
    """Words, tables and code included; rules and borders of tables are not words."""
    return sum(any(letter.isalnum() for letter in word) for word in text.split())


def paragraphs(text: str) -> list[str]:
    """Outside blocks of code, tables and headings; every item of a list is one."""
    blocks = re.split(r"\n\s*\n|\n(?=\s*(?:[-*]|\d+\.) )", FENCE.sub("\n\n", text))
    return [block for block in blocks if not block.lstrip().startswith(("|", "#"))]
