"""Captions: `{"image", "caption"}`, also in CSV tables. The caption is the answer to QUESTION."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from beingvl.data.dialects.turns import images_of, row_of, turn
from beingvl.errors import InputError

QUESTION = "Describe the image."
CAPTION_NAMES = ("caption", "text", "txt", "description")
IMAGE_NAMES = ("image", "images", "file_name", "filename", "path", "url")


def from_caption(record: Mapping[str, Any]) -> dict[str, Any]:
    """Raises InputError for a record without caption or image."""
    caption = next((record[name] for name in CAPTION_NAMES if record.get(name)), None)
    image = next((record[name] for name in IMAGE_NAMES if record.get(name)), None)
    if not isinstance(caption, str) or image is None:
        raise InputError(f"a caption row has the keys {sorted(record)}, expected image and caption")
    images = images_of({"image": image})
    question = "<image>" * len(images) + QUESTION
    turns = [turn("user", question, "the question"), turn("assistant", caption, "the caption")]
    return row_of(record, turns, images)
