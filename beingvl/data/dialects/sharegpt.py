"""ShareGPT as fine-tuning tools read it: `conversations` from human, gpt and others, with `system`
(a text) and `images` (a list; the text has one `<image>` for each).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from beingvl.data.dialects.turns import images_of, row_of, turn
from beingvl.errors import InputError


def from_sharegpt(record: Mapping[str, Any]) -> dict[str, Any]:
    """Raises InputError for a turn without role or text, and for tool calls."""
    entries = record.get("conversations")
    if not isinstance(entries, list):
        raise InputError("conversations is not a list of turns")
    turns = [turn("system", record["system"], "system")] if record.get("system") else []
    for number, entry in enumerate(entries):
        where = f"conversations[{number}]"
        if not isinstance(entry, Mapping):
            raise InputError(f"{where} is not an object")
        turns.append(turn(entry.get("from"), entry.get("value"), where))
    return row_of(record, turns, images_of(record))
