"""`texts`: pairs of user and assistant, with `images`, as in The Cauldron and FineVision."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from beingvl.data.dialects.turns import images_of, row_of, turn
from beingvl.errors import InputError


def from_texts(record: Mapping[str, Any]) -> dict[str, Any]:
    """All images go before the first question. Raises InputError for a pair without texts."""
    entries, images = record.get("texts"), images_of(record)
    if not isinstance(entries, list) or not entries:
        raise InputError("texts is empty or not a list, expected pairs of user and assistant")
    turns = []
    for number, entry in enumerate(entries):
        where = f"texts[{number}]"
        if not isinstance(entry, Mapping):
            raise InputError(f"{where} is not an object")
        turns += [turn(role, entry.get(role), where) for role in ("user", "assistant")]
    named = sum(entry["value"].count("<image>") for entry in turns)
    turns[0]["value"] = "<image>" * (len(images) - named) + turns[0]["value"]
    return row_of(record, turns, images)
