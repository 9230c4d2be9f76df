"""Prompts, images and names of options in the forms that callers may pass."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Sequence
from numbers import Integral, Real
from typing import Any

from beingvl.data.conversation import Turn
from beingvl.errors import InputError

Prompt = str | Sequence[Turn]
"""A question, or a chat: (question, answer) pairs whose last answer is None."""
Prompts = Sequence[Prompt]
Images = Sequence[Any] | None


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


def pairs_of(prompts: Prompts, images: Images) -> list[tuple[Prompt, list[Any]]]:
    """Every prompt with its images. Raises InputError for a single prompt or image where a list is
    expected, and for lists of different lengths.
    """
    if isinstance(prompts, str):
        raise InputError("prompts is one string, expected a list of prompts")
    refuse_one_image(images)
    entries = [None] * len(prompts) if images is None else images
    if len(entries) != len(prompts):
        found = f"{len(prompts)} prompts and {len(entries)} images"
        raise InputError(f"{found}; expected one entry (or None) per prompt")
    return list(zip(prompts, map(images_of_entry, entries), strict=True))


def refuse_one_image(images: Any) -> None:
    """Raises InputError for a single path or PIL image where a list is expected."""
    if isinstance(images, (str, os.PathLike)) or hasattr(images, "convert"):
        raise InputError(f"images is one image ({str(images)[:60]}), expected a list of images")


def one_of(**same: Any) -> Any:
    """The value of options that mean the same, or None. Raises InputError if they contradict each
    other.
    """
    given = {name: value for name, value in same.items() if value is not None}
    spelt = {str(value).removeprefix("torch.").removesuffix(":0") for value in given.values()}
    if len(spelt) > 1:
        found = " and ".join(f"{name} is {value}" for name, value in given.items())
        raise InputError(f"{found}, but they mean the same; give one of them")
    return next(iter(given.values()), None)


def check_positive(**values: Any) -> None:
    """Raises InputError for a value that is not an integer above 0; `temperature` may be any number
    above 0.
    """
    for name, value in values.items():
        is_real = name == "temperature"
        is_number = isinstance(value, Real if is_real else Integral) and not isinstance(value, bool)
        if not is_number or not value > 0:
            expected = "a number" if is_real else "an integer"
            raise InputError(f"{name} is {value!r}, expected {expected} above 0")


def check_names(what: str, given: Iterable[str], known: Sequence[str]) -> None:
    """Raises InputError for the first name that is not an option of `what`."""
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; expected one of {known}"
            raise InputError(f"{name!r} is not an option of {what}{hint}")
