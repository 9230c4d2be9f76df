"""Parses requests to OpenAI's chat completions API: JSON to turns, pictures and options.

Pictures come inside the request, as `data:` URLs. No address is fetched and no path is opened.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from beingvl.data.conversation import Turn, parse_conversation
from beingvl.data.dialects.messages import from_messages
from beingvl.errors import InputError
from beingvl.images.decode import decode_image
from beingvl.images.preprocess import Preprocess
from beingvl.inference.back_end import Sampling
from beingvl.inference.sampling import GREEDY_BELOW

MAX_STOPS = 4
MAX_TOKENS = ("max_tokens", "max_completion_tokens")
# Unsupported fields that would change the answer, with their neutral values.
NOT_DONE: dict[str, tuple[Any, ...]] = {
    "n": (None, 1),
    "tools": (None, []),
    "functions": (None, []),
    "response_format": (None, {"type": "text"}),
    "logprobs": (None, False),
    "logit_bias": (None, {}),
    "frequency_penalty": (None, 0),
    "presence_penalty": (None, 0),
    "modalities": (None, ["text"]),
}


class RequestError(InputError):
    """A request field that is wrong or not supported; `field` is its name."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field


@dataclass(frozen=True)
class ChatRequest:
    """`image_urls` are in the order of the `<image>` placeholders in `turns`."""

    turns: list[Turn]
    image_urls: list[Any]
    max_new_tokens: int
    sampling: Sampling
    stops: tuple[str, ...]
    stream: bool
    include_usage: bool


def read_chat_request(body: Mapping[str, Any], max_new_tokens: int) -> ChatRequest:
    """Raises RequestError for a field that is not valid in OpenAI's API, or not supported here.
    Answers longer than `max_new_tokens` are truncated and end with the reason "length".
    """
    for name, neutral in NOT_DONE.items():
        if body.get(name) not in neutral:
            raise RequestError(name, f"{name} is {str(body[name])[:60]}, which is not supported")
    turns, image_urls = _turns_and_images(body.get("messages"))
    wanted = [_number(body, name, 1, math.inf, whole=True) for name in MAX_TOKENS]
    stream_options = body.get("stream_options") or {}
    return ChatRequest(
        turns,
        image_urls,
        int(min([max_new_tokens, *(number for number in wanted if number is not None)])),
        _sampling(body),
        _stops(body.get("stop")),
        body.get("stream") is True,
        isinstance(stream_options, dict) and stream_options.get("include_usage") is True,
    )


def _turns_and_images(messages: Any) -> tuple[list[Turn], list[Any]]:
    try:
        row = from_messages({"messages": messages})
        _check_roles(messages, [entry["from"] for entry in row["conversations"]])
        waiting = {"from": "gpt", "value": "the answer"}
        *turns, (question, _) = parse_conversation([*row["conversations"], waiting])
    except InputError as error:
        raise RequestError("messages", str(error).replace("conversations", "messages")) from error
    images = row["image"] if isinstance(row["image"], list) else [row["image"]]
    return [*turns, (question, None)], [image for image in images if image is not None]


def _check_roles(messages: Sequence[Mapping[str, Any]], roles: list[str]) -> None:
    asked = roles[1:] if roles[:1] == ["system"] else roles
    if asked != ["human", *["gpt", "human"] * (len(asked) // 2)]:
        found = ", ".join(message["role"] for message in messages)[:100] or "nobody"
        raise InputError(
            f"messages are from {found}; expected user, assistant, …, user, after at most one from "
            "system"
        )


def _sampling(body: Mapping[str, Any]) -> Sampling:
    temperature = float(_number(body, "temperature", 0, 2) or 0)
    top_p = _number(body, "top_p", 0, 1)
    seed = _number(body, "seed", -(2**63), 2**63 - 1, whole=True)
    if top_p == 0:
        raise RequestError("top_p", "top_p is 0, expected more than 0; temperature 0 is greedy")
    return Sampling(
        0.0 if temperature < GREEDY_BELOW else temperature,
        1.0 if top_p is None else float(top_p),
        None if seed is None else int(seed),
    )


def _number(
    body: Mapping[str, Any], name: str, least: float, most: float, whole: bool = False
) -> float | None:
    value = body.get(name)
    is_number = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
    if value is None or (is_number and least <= value <= most):
        return value
    kind = "an integer" if whole else "a number"
    limit = f"at least {least}" if most == math.inf else f"from {least} to {most}"
    raise RequestError(name, f"{name} is {str(value)[:60]!r}, expected {kind} {limit}")


def _stops(stop: Any) -> tuple[str, ...]:
    stops = [] if stop is None else [stop] if isinstance(stop, str) else stop
    are_texts = isinstance(stops, list) and all(isinstance(one, str) and one for one in stops)
    if not are_texts or len(stops) > MAX_STOPS:
        raise RequestError("stop", f"stop is not a text, or a list of at most {MAX_STOPS} texts")
    return tuple(stops)


def open_images(
    image_urls: Sequence[Any], max_images: int, preprocessing: Preprocess
) -> list[np.ndarray]:
    """The pictures, each decoded and cropped, so that only one is large at a time: `[3, H, W]`
    uint8. Raises RequestError for too many, for addresses and paths, and for data that is not a
    picture.
    """
    if len(image_urls) > max_images:
        found = f"{len(image_urls)} images in one request, expected at most {max_images}"
        raise RequestError("messages", found)
    return [
        _open_image(url, f"image {number}", preprocessing)
        for number, url in enumerate(image_urls, 1)
    ]


def _open_image(url: Any, name: str, preprocessing: Preprocess) -> np.ndarray:
    head, comma, data = url.partition(",") if isinstance(url, str) else ("", "", "")
    if not (head.startswith("data:") and head.endswith(";base64") and comma):
        raise RequestError(
            "messages",
            f"{name} is not a data URL (data:image/png;base64,…); addresses are not fetched and "
            "paths are not opened",
        )
    try:
        return preprocessing.crop(decode_image(base64.b64decode(data, validate=True), name), name)
    except InputError as error:
        raise RequestError("messages", str(error)) from error
    except ValueError as error:  # from b64decode
        raise RequestError("messages", f"{name} is not base64 ({error})") from error
