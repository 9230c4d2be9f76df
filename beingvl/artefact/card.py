"""README.md of a finished folder: its manifest for people. The manifest does not hash it, so that
users may edit it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from beingvl.artefact.files import write_atomically
from beingvl.artefact.hashes import hash_bytes

CARD_FILE = "README.md"
_END = "<!-- As beingvl wrote it, "


def write_card(folder: Path, text: str) -> bool:
    """Write the card unless a user has edited the existing one; returns whether it was written."""
    path = folder / CARD_FILE
    if path.exists():
        there = path.read_text(encoding="utf-8", errors="replace")
        if there != _sealed(there.partition(_END)[0]):
            print(f"{path} is not as beingvl wrote it: left as it is")
            return False
    write_atomically(path, _sealed(text))
    return True


def _sealed(text: str) -> str:
    """The text with its hash, which reveals changes."""
    return f"{text}{_END}{hash_bytes(text.encode())}: once changed, it is never overwritten. -->\n"


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table."""

    def line(cells: Sequence[object]) -> str:
        texts = [" ".join(str(cell).split()).replace("|", "\\|") for cell in cells]
        return f"| {' | '.join(texts)} |\n"

    return line(head) + line(["---"] * len(head)) + "".join(map(line, rows)) + "\n"
