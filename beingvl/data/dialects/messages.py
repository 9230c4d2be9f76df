"""`messages`, as in OpenAI's API and Hugging Face's chat templates.

    {"messages": [{"role": "user", "content": "<image>What is it?"}, …], "images": ["a.png"]}
    {"messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": …}]}, …],
     "images": ["a.png"]}
    … {"type": "image", "image": "a.png"} or {"type": "image_url", "image_url": {"url": "a.png"}}
    … or, in requests to the API, {"type": "file", "file": {"file_data": "data:image/png;base64,…"}}

An image part without a picture takes the next one of `images`. Some datasets store a part's content
under `content` or `value`, whatever its type.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from beingvl.data.dialects.turns import images_of, row_of, turn
from beingvl.errors import InputError

TEXT_KEYS = ("text", "content", "value")
IMAGE_KEYS = ("image", "image_url", "file", "url", "path", "content", "value")


def from_messages(record: Mapping[str, Any]) -> dict[str, Any]:
    """Raises InputError for a message without role or content, and for audio or video parts."""
    entries = record.get("messages", record.get("conversations"))
    if not isinstance(entries, list):
        raise InputError("messages is not a list")
    waiting = images_of(record)
    images: list[Any] = []
    turns = []
    for number, entry in enumerate(entries):
        where = f"messages[{number}]"
        if not isinstance(entry, Mapping):
            raise InputError(f"{where} is not an object")
        content = entry.get("content")
        if isinstance(content, list):
            content = _text_of(content, where, waiting, images)
        elif isinstance(content, str):
            for _ in range(min(content.count("<image>"), len(waiting))):
                images.append(waiting.pop(0))
        turns.append(turn(entry.get("role"), content, where))
    return row_of(record, turns, images + waiting)


def _text_of(parts: list[Any], where: str, waiting: list[Any], images: list[Any]) -> str:
    """The text of a message's parts, with placeholders for images, which are added to `images`."""
    texts = []
    for part in parts:
        if not isinstance(part, Mapping):
            raise InputError(f"{where} has a part that is not an object")
        kind, text = part.get("type"), _first_of(part, TEXT_KEYS)
        if kind == "text" and isinstance(text, str):
            texts.append(text)
        elif kind in ("image", "image_url", "input_image", "file"):
            texts.append("<image>")
            images.append(_image_of(part, where, waiting))
        else:
            raise InputError(f"{where} has a part of type {kind!r}, expected text or image")
    return "".join(texts)


def _image_of(part: Mapping[str, Any], where: str, waiting: list[Any]) -> Any:
    found = _first_of(part, IMAGE_KEYS)
    if isinstance(found, Mapping):
        if found.get("file_id") is not None:
            raise InputError(f"{where} has a `file_id`, but no files are stored; give the picture")
        found = found.get("url", found.get("file_data", found))
    if found is not None:
        return found
    if not waiting:
        raise InputError(f"{where} has an image part without a picture, in it or left in `images`")
    return waiting.pop(0)


def _first_of(part: Mapping[str, Any], names: Sequence[str]) -> Any:
    return next((part[name] for name in names if part.get(name) is not None), None)
