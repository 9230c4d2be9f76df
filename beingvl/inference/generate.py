"""What `beingvl generate` does on the terminal: one answer, a conversation, or a drawing.

generate   checks what was asked, reads the model, and then
    print_answer   prints an answer while it is made
    hold_chat      asks for one question after another
    save_drawing   samples an image and saves it as PNG
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from beingvl.artefact.files import write_atomically
from beingvl.errors import InputError
from beingvl.images.pictures import to_png
from beingvl.inference.model import BeingVL


def generate(
    model_path: Path | str,
    *,
    prompt: str | None = None,
    images: Sequence[Path] = (),
    chat: bool = False,
    draw: Path | None = None,
    vbpe_path: Path | str | None = None,
    raw: bool = False,
    max_new_tokens: int = 128,
    do_sample: bool = False,
    temperature: float = 1.0,
    seed: int = 0,
    torch_dtype: str = "float32",
    device: str | None = None,
) -> str | None:
    """Print the answer to `prompt` about `images` while it is made, and return it.

    `chat` asks for questions instead; `draw` samples an image into that PNG file instead.
    """
    if draw is not None:
        _check_drawing(draw, chat)
    elif (prompt is not None) == chat:
        raise InputError("give either --prompt with a question, or --chat")
    model = BeingVL(model_path, vbpe_path)
    if draw is not None:
        if not model.vqgan.has_decoder:
            raise InputError(f"{model.vqgan.source} has no decoder, so it cannot show a drawing")
        model.load_model(torch_dtype, device)
        torch.manual_seed(seed)
        token_ids = model.draw([prompt or ""], [list(images) or None], not raw, temperature)
        save_drawing(model, token_ids[0], draw)
        return None
    tokens = model.img2tok(images, with_vbpe=not raw) if images else []
    # What is wrong with the prompt is told before the weights are read.
    prompt_ids = [] if prompt is None else model.tokenize_with_tokens(prompt, tokens)
    model.load_model(torch_dtype, device)
    torch.manual_seed(seed)
    options = {"do_sample": do_sample, "temperature": temperature}

    def answer(prompt_ids: list[int]) -> str:
        return print_answer(model, prompt_ids, max_new_tokens, options)

    if not chat:
        return answer(prompt_ids)
    hold_chat(model, tokens, answer)
    return None


def _check_drawing(path: Path, chat: bool) -> None:
    if chat:
        raise InputError("give either --draw or --chat")
    if not path.absolute().parent.is_dir():
        raise InputError(f"--draw {path}: its folder does not exist; make it first")
    if path.suffix.lower() != ".png" or path.is_dir():
        found = "a folder" if path.is_dir() else "not a .png"
        raise InputError(f"--draw {path} is {found}; name a PNG file")


def save_drawing(model: BeingVL, token_ids: np.ndarray, path: Path) -> None:
    """Decode one drawing `[n]` and save it as PNG."""
    (picture,) = model.tok2img([token_ids])
    write_atomically(path, to_png(picture))
    height, width, _ = picture.shape
    print(f"{path}: {width} x {height} pixels from {len(token_ids)} tokens")


def print_answer(
    model: BeingVL, prompt_ids: list[int], max_new_tokens: int, options: dict[str, Any]
) -> str:
    """Print the answer piece by piece while it is made; returns it."""
    (answer,) = model.answer_token_sequences(
        [prompt_ids],
        max_new_tokens,
        on_text=lambda piece: print(piece, end="", flush=True),
        **options,
    )
    print(flush=True)
    return answer


def hold_chat(model: BeingVL, images: list[np.ndarray], answer: Callable[[list[int]], str]) -> None:
    """Questions from the terminal, each behind all earlier turns, until an empty line or the end
    of input. What cannot be asked is explained, and the conversation goes on without it.
    """
    turns: list[tuple[str, str | None]] = []
    while True:
        try:
            question = input("> ").strip()
        except EOFError:
            return
        if not question:
            return
        try:
            found = answer(model.tokenize_with_tokens([*turns, (question, None)], images))
        except InputError as error:
            print(error, file=sys.stderr)
        else:
            turns.append((question, found))
