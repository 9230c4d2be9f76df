"""Dialects of dataset rows: one file per dialect, each a function from its records to our rows.

    llava      {"id", "image", "conversations": [{"from", "value"}, …]}          ours
    sharegpt   the same turns under different names, with `images` and `system` beside them
    messages   {"messages": [{"role", "content"}, …]}     content: text, or parts with images
    texts      {"images", "texts": [{"user", "assistant"}, …]}
    caption    {"image", "caption"}
    alpaca     {"instruction", "input", "output"}

A function returns a LLaVA row (`id, image, category, conversations`), or raises InputError saying
what is malformed. A system turn stays the first turn, from "system". Images are passed on as the
record has them: keys, or, in a container, what the container turns into keys.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from beingvl.data.dialects.alpaca import from_alpaca
from beingvl.data.dialects.caption import CAPTION_NAMES, IMAGE_NAMES, from_caption
from beingvl.data.dialects.llava import from_llava
from beingvl.data.dialects.messages import from_messages
from beingvl.data.dialects.sharegpt import from_sharegpt
from beingvl.data.dialects.texts import from_texts
from beingvl.errors import InputError

Record = Mapping[str, Any]
Dialect = Callable[[Record], dict[str, Any]]

DIALECTS: dict[str, Dialect] = {
    "llava": from_llava,
    "sharegpt": from_sharegpt,
    "messages": from_messages,
    "texts": from_texts,
    "caption": from_caption,
    "alpaca": from_alpaca,
}


def dialect_of(records: Sequence[Record], source: str) -> str:
    """Name of the dialect of `records`, which are the first of `source`.

    Raises InputError if they match no dialect, or several.
    """
    names = {name for record in records if (name := _name_of(record))}
    if names == {"llava", "sharegpt"}:  # llava, except for some rows
        return "sharegpt"
    if len(names) > 1:
        raise InputError(
            f"{source} mixes rows of {' and '.join(sorted(names))}: put each into a file of its "
            "own, or say with --row_format which to read (the others are rejected)"
        )
    if not names:
        keys = sorted(records[0]) if records else []
        raise InputError(
            f"{source} has rows with the keys {keys}, expected conversations, messages, texts, "
            "instruction and output, or image and caption; rename them, or say with --row_format "
            f"which of {list(DIALECTS)} it is"
        )
    return names.pop()


def _name_of(record: Record) -> str | None:
    if isinstance(record.get("messages"), list):
        return "messages"
    if isinstance(record.get("texts"), list):
        return "texts"
    turns = record.get("conversations")
    if isinstance(turns, list):
        first = turns[0] if turns and isinstance(turns[0], Mapping) else {}
        if "role" in first:
            return "messages"
        is_plain = first.get("from") in (None, "human", "gpt")
        return "llava" if is_plain and not {"images", "system"} & set(record) else "sharegpt"
    names = set(record)
    if {"instruction", "output"} <= names:
        return "alpaca"
    if names & set(CAPTION_NAMES) and names & set(IMAGE_NAMES):
        return "caption"
    only_names_images = "image" in names and names <= {"id", "image", "category"}
    return "llava" if only_names_images else None  # which is enough for encode-images
