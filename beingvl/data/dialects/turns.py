"""What the dialects share: roles, and rows in our own format."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from beingvl.errors import InputError

ROLES = {
    "human": "human",
    "user": "human",
    "gpt": "gpt",
    "assistant": "gpt",
    "model": "gpt",
    "chatgpt": "gpt",
    "bot": "gpt",
    "system": "system",
}
ANSWER_NAMES = ("answer", "answers", "choices")  # for evaluation
NOT_TAKEN = ("video", "videos", "audio", "audios")
PREFERENCES = ("chosen", "rejected", "rejected_response")  # DPO
JUDGEMENTS = ("label", "kto_tag")  # in KTO true or false; in other datasets a class


def refuse_bad_answers(record: Mapping[str, Any]) -> None:
    """Raises InputError for rows of preference training: not all their answers should be learnt."""
    if bad := [name for name in JUDGEMENTS if record.get(name) is False]:
        raise InputError(f"{bad[0]} is false (as in KTO), so the answer is bad")
    if pairs := [name for name in PREFERENCES if record.get(name)]:
        raise InputError(
            f"the row has {pairs[0]!r}, a preference (DPO), which is not supported: leave the key "
            "out, and end the turns with the answer to learn"
        )


def turn(role: Any, text: Any, where: str) -> dict[str, str]:
    """One entry of `conversations`. Raises InputError for an unknown role, or no text."""
    if not isinstance(role, str) or role not in ROLES:
        raise InputError(f"{where} is from {str(role)[:60]!r}, expected one of {', '.join(ROLES)}")
    if not isinstance(text, str):
        raise InputError(f"{where} has no text")
    return {"from": ROLES[role], "value": text}


def row_of(
    record: Mapping[str, Any], turns: Sequence[dict[str, str]], images: Any
) -> dict[str, Any]:
    """Our row: turns and images, with `record`'s id, category and right answer. Raises InputError
    for a record with audio, video or a preference.
    """
    if others := [name for name in NOT_TAKEN if record.get(name)]:
        raise InputError(f"the row has {others[0]}, which we do not support")
    refuse_bad_answers(record)
    images = [image for image in images if image is not None]
    answers = {name: record[name] for name in ANSWER_NAMES if record.get(name) is not None}
    return answers | {
        "id": record.get("id"),
        "image": images[0] if len(images) == 1 else images or None,
        "category": record.get("category"),
        "conversations": list(turns),
    }


def images_of(record: Mapping[str, Any]) -> list[Any]:
    """The value of `image` or `images`, as a list."""
    found = record.get("images", record.get("image"))
    if found is None or found == "":
        return []
    return list(found) if isinstance(found, list | tuple) else [found]
