"""What lmms-eval asks, answered by a `BeingVL`: text, images and generation options in, answers
out.

Nothing of lmms-eval is needed here; beingvl/evaluation/lmms_eval_model.py is the class that it
loads. Prompts go through the same chat template as everywhere.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from beingvl.data.conversation import IMAGE_PLACEHOLDER
from beingvl.errors import InputError
from beingvl.inference.model import BeingVL

MAX_NEW_TOKENS = 128  # of tasks that say nothing
IGNORED_OPTIONS = {
    "top_p",
    "image_aspect_ratio",
    "use_cache",
    "max_gen_toks",
}  # without effect on greedy answers of this model


@dataclass(frozen=True)
class Request:
    """One question: its text, its images (PIL or paths) and the task's generation options."""

    context: str
    images: Sequence[Any]
    options: Mapping[str, Any]


def answer_requests(
    model: BeingVL,
    requests: Sequence[Request],
    batch_size: int,
    with_vbpe: bool,
    on_answers: Callable[[int], object],
) -> list[str]:
    """Answers in the order of `requests`, in batches of equal options; `on_answers` hears how
    many more are done.

    Raises InputError for options that this model cannot follow and for visuals that are no images.
    """
    groups: dict[tuple, list[int]] = {}
    for index, request in enumerate(requests):
        groups.setdefault(_generation(request.options), []).append(index)
    answers = [""] * len(requests)
    for (max_new_tokens, temperature), indices in groups.items():
        sampling = {"do_sample": True, "temperature": temperature} if temperature else {}
        for start in range(0, len(indices), batch_size):
            batch = indices[start : start + batch_size]
            method = model.generate_with_vbpe if with_vbpe else model.generate
            found = method(
                [_prompt(requests[index]) for index in batch],
                [_images(requests[index]) for index in batch],
                max_new_tokens,
                batch_size=batch_size,
                **sampling,
            )
            for index, answer in zip(batch, found, strict=True):
                answers[index] = cut_at(answer, requests[index].options.get("until"))
            on_answers(len(batch))
    return answers


def _generation(options: Mapping[str, Any]) -> tuple[int, float]:
    """(longest answer in tokens, temperature; 0 is greedy)."""
    if (options.get("num_beams") or 1) != 1:
        raise InputError(
            f"num_beams is {options['num_beams']}, beingvl answers greedily or by "
            "sampling; set num_beams=1"
        )
    unknown = (
        set(options)
        - IGNORED_OPTIONS
        - {"max_new_tokens", "temperature", "do_sample", "until", "num_beams"}
    )
    if unknown:
        raise InputError(
            f"generation option {sorted(unknown)[0]!r} is not known to beingvl; remove it "
            "from the task or --gen_kwargs"
        )
    temperature = float(options.get("temperature") or 0) if options.get("do_sample") else 0.0
    return int(options.get("max_new_tokens") or MAX_NEW_TOKENS), temperature


def _prompt(request: Request) -> str:
    """The text with one placeholder an image: tasks write none, or as many as there are images."""
    count = len(request.images)
    if request.context.count(IMAGE_PLACEHOLDER) == count:
        return request.context
    return IMAGE_PLACEHOLDER * count + request.context.replace(IMAGE_PLACEHOLDER, " ")


def _images(request: Request) -> list[Any] | None:
    for image in request.images:
        if not isinstance(image, (str, os.PathLike)) and not hasattr(image, "convert"):
            raise InputError(
                f"the task shows {type(image).__name__}, beingvl sees images only (no video, "
                "no audio)"
            )
    return list(request.images) or None


def cut_at(answer: str, until: str | Iterable[str] | None) -> str:
    """The answer up to the first of the task's stop strings."""
    for stop in [until] if isinstance(until, str) else until or []:
        answer = answer.split(stop)[0] if stop else answer
    return answer.strip()


def as_flag(value: Any) -> bool:
    """`raw=True` arrives from lmms-eval's command line as a bool or as text."""
    return value.strip().lower() in ("1", "true", "yes") if isinstance(value, str) else bool(value)


def open_model(
    pretrained: str, vbpe_path: str | None, torch_dtype: str | None, device: str | None
) -> tuple[BeingVL, str]:
    """The loaded model and its device: this rank's accelerator in bfloat16, else the CPU in
    float32.
    """
    on_gpu = torch.cuda.is_available() and not str(device).startswith("cpu")
    rank_device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    place = rank_device if on_gpu and device in (None, "cuda") else str(device) if on_gpu else "cpu"
    model = BeingVL(Path(pretrained), Path(vbpe_path) if vbpe_path else None)
    return model.load_model(torch_dtype or ("bfloat16" if on_gpu else "float32"), place), place
