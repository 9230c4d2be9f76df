"""Prompts, images and names of options in the forms that callers may pass."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Sequence
from typing import Any

from beingvl.data.conversation import Turn
from beingvl.errors import InputError

Prompt = str | Sequence[Turn]
Prompts = Sequence[Prompt]
Images = Sequence[Any] | None
"""A question, or a chat: (question, answer) pairs whose last answer is None."""


def turns_of(prompt: Prompt) -> list[Turn]:
    if isinstance(prompt, str):
        return [(prompt, None)]
    is_chat = isinstance(prompt, (list, tuple)) and all(
        isinstance(turn, (list, tuple))
        and len(turn) == 2
        and isinstance(turn[0], str)
        and isinstance(turn[1], (str, type(None)))
        for turn in prompt
    )
    if not is_chat:
        found = f"a prompt is {str(prompt)[:60]!r}"
        raise InputError(f"{found}, expected text or a list of (question, answer) pairs")
    return [(question, answer) for question, answer in prompt]


def is_one_prompt(prompts: Any) -> bool:
    """Whether it is a text or a chat, whose last pair ends in None; a list of prompts has none."""
    if isinstance(prompts, str) or not prompts:
        return isinstance(prompts, str)
    last = prompts[-1]
    return isinstance(last, (list, tuple)) and len(last) == 2 and last[1] is None


def images_of_entry(entry: Any) -> list[Any]:
    return [] if entry is None else list(entry) if isinstance(entry, (list, tuple)) else [entry]


def refuse_one_image(images: Any) -> None:
    """Raises InputError for a single path or PIL image where a list is expected."""
    if isinstance(images, (str, os.PathLike)) or hasattr(images, "convert"):
        raise InputError(f"images is one image ({str(images)[:60]}), expected a list of images")


def check_names(what: str, given: Iterable[str], known: Sequence[str]) -> None:
    """Raises InputError for the first name that is not an option of `what`."""
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; expected one of {known}"
            raise InputError(f"{name!r} is not an option of {what}{hint}")
