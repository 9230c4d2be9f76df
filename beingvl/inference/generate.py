"""`beingvl generate` on the terminal: one answer, a conversation, or a drawing.

generate    checks the request, loads the model, prints the answer or saves the drawing
hold_chat   reads one question after another
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

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
    images: Sequence[Path | str] = (),
    chat: bool = False,
    draw: Path | None = None,
    vbpe_path: Path | str | None = None,
    raw: bool = False,
    template: str | None = None,
    max_new_tokens: int = 128,
    do_sample: bool = False,
    temperature: float = 1.0,
    seed: int = 0,
    torch_dtype: str | None = None,
    device: str | None = None,
) -> str | None:
    """Print the answer to `prompt` about `images` while it is generated, and return it.

    With `chat`, read questions instead; with `draw`, sample an image into that PNG file.
    """
    if draw is not None:
        _check_drawing(draw, chat)
    elif (prompt is not None) == chat:
        raise InputError("give either --prompt with a question, or --chat")
    model = BeingVL(model_path, vbpe_path, template=template)
    if draw is not None and not model.vqgan.has_decoder:
        raise InputError(f"{model.vqgan.source} has no decoder, so it cannot show a drawing")
    # Errors in the images or the prompt are reported before the weights are loaded.
    with_vbpe = False if raw else None  # None: as the model was trained
    tokens = model.img2tok(images, with_vbpe) if images and draw is None else []
    is_asked = prompt is not None and draw is None
    prompt_ids = model.tokenize_with_tokens(prompt or "", tokens) if is_asked else []
    model.load_model(torch_dtype, device)
    torch.manual_seed(seed)
    if draw is not None:
        drawings = model.draw([prompt or ""], [list(images) or None], with_vbpe, temperature)
        (picture,) = model.tok2img(drawings)
        write_atomically(draw, to_png(picture))
        height, width, _ = picture.shape
        print(f"{draw}: {width} x {height} pixels from {len(drawings[0])} tokens")
        return None

    def answer(prompt_ids: list[int]) -> str:
        """Print the answer piece by piece while it is generated."""
        (text,) = model.answer_token_sequences(
            [prompt_ids],
            max_new_tokens,
            on_text=lambda piece: print(piece, end="", flush=True),
            do_sample=do_sample,
            temperature=temperature,
        )
        print(flush=True)
        return text

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


def hold_chat(model: BeingVL, images: list[np.ndarray], answer: Callable[[list[int]], str]) -> None:
    """Answer questions from the terminal, each after all earlier turns, until an empty line or the
    end of input. For an invalid question print the error, and continue without it.
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
