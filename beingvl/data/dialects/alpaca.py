"""Alpaca: `instruction`, `input` and `output`, optionally `system`, `history` and `images`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from beingvl.data.dialects.turns import images_of, row_of, turn
from beingvl.errors import InputError


def from_alpaca(record: Mapping[str, Any]) -> dict[str, Any]:
    """The input goes below the instruction, the `[question, answer]` pairs of `history` before it.

    Raises InputError for a record without instruction or output.
    """
    turns = [turn("system", record["system"], "system")] if record.get("system") else []
    history = record.get("history") or []
    if not isinstance(history, list) or not all(
        isinstance(pair, list) and len(pair) == 2 for pair in history
    ):
        raise InputError("history is not a list of [question, answer]")
    for question, answer in history:
        turns += [turn("user", question, "history"), turn("assistant", answer, "history")]
    told = [record[name] for name in ("instruction", "input") if record.get(name)]
    question = "\n".join(told) if all(isinstance(text, str) for text in told) else None
    turns.append(turn("user", question, "instruction"))
    turns.append(turn("assistant", record.get("output"), "output"))
    return row_of(record, turns, images_of(record))
