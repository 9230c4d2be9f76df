"""Answers lmms-eval's questions with a `BeingVL`. This file does not need lmms-eval;
lmms_eval_model.py has the class that it loads.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from beingvl.data.conversation import IMAGE_PLACEHOLDER
from beingvl.errors import InputError
from beingvl.inference.model import BeingVL
from beingvl.inference.reading import own_device
from beingvl.inference.streaming import cut_at

MAX_NEW_TOKENS = 128  # for tasks that do not set it
OPTIONS = {"max_new_tokens", "temperature", "do_sample", "until", "num_beams"}
# These do not affect this model's greedy answers.
IGNORED_OPTIONS = {"top_p", "image_aspect_ratio", "use_cache", "max_gen_toks"}


@dataclass(frozen=True)
class Question:
    """A question's text, its images (PIL or paths) and the task's generation options."""

    context: str
    images: Sequence[Any]
    options: Mapping[str, Any]


def answer_questions(
    model: BeingVL,
    questions: Sequence[Question],
    batch_size: int,
    with_vbpe: bool | None,
    on_answers: Callable[[int], object],
) -> list[str]:
    """Answers in the order of `questions`, batched by equal options; `on_answers` is called with
    the number of new answers.

    Raises InputError for options that this model does not support, and for visuals that are not
    images.
    """
    groups: dict[tuple[int, float], list[int]] = {}
    for index, question in enumerate(questions):
        groups.setdefault(_length_and_temperature(question.options), []).append(index)
    answers = [""] * len(questions)
    for (max_new_tokens, temperature), indices in groups.items():
        sampling: dict[str, Any] = {"do_sample": bool(temperature)}
        if temperature:
            sampling["temperature"] = temperature
        for start in range(0, len(indices), batch_size):
            batch = indices[start : start + batch_size]
            found = model.generate(
                [_prompt(questions[index]) for index in batch],
                [_images(questions[index]) for index in batch],
                max_new_tokens,
                with_vbpe=with_vbpe,
                batch_size=batch_size,
                **sampling,
            )
            for index, answer in zip(batch, found, strict=True):
                answers[index] = cut_at(answer, questions[index].options.get("until"))
            on_answers(len(batch))
    return answers


def _length_and_temperature(options: Mapping[str, Any]) -> tuple[int, float]:
    """The maximum answer length in tokens, and the temperature; 0 is greedy."""
    if (options.get("num_beams") or 1) != 1:
        raise InputError(
            f"num_beams is {options['num_beams']}, beingvl answers greedily or by "
            "sampling; set num_beams=1"
        )
    if unknown := set(options) - OPTIONS - IGNORED_OPTIONS:
        raise InputError(
            f"generation option {min(unknown)!r} is not known to beingvl; remove it "
            "from the task or --gen_kwargs"
        )
    temperature = float(options.get("temperature") or 0) if options.get("do_sample") else 0.0
    return int(options.get("max_new_tokens") or MAX_NEW_TOKENS), temperature


def _prompt(question: Question) -> str:
    """The text with one placeholder per image; many tasks have none."""
    count = len(question.images)
    if question.context.count(IMAGE_PLACEHOLDER) == count:
        return question.context
    return IMAGE_PLACEHOLDER * count + question.context.replace(IMAGE_PLACEHOLDER, " ")


def _images(question: Question) -> list[Any] | None:
    for image in question.images:
        if not isinstance(image, (str, os.PathLike)) and not hasattr(image, "convert"):
            raise InputError(
                f"the task shows {type(image).__name__}, beingvl sees images only (no video, "
                "no audio)"
            )
    return list(question.images) or None


def as_flag(value: bool | str) -> bool:
    """lmms-eval's command line passes `raw=True` as a bool or as text."""
    return str(value).strip().lower() in ("1", "true", "yes")


def open_model(
    pretrained: str,
    vbpe_path: str | None,
    torch_dtype: str | None,
    device: str | None,
    template: str | None = None,
) -> tuple[BeingVL, str]:
    """The loaded model and its device."""
    target = own_device(None if device == "cuda" else device)
    model = BeingVL(pretrained, vbpe_path, template=template)
    return model.load_model(torch_dtype, target), str(target)
