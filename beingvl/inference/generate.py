"""Answer a prompt about images.

    beingvl generate --model stage-3/final --vbpe_path vbpe.json --image a.png --prompt "Which digit
    is this?" beingvl generate --model stage-3/final --image a.png --chat beingvl generate --model
    stage-3/final --draw new.png --seed 1

With several --image options each stands where its `<image>` placeholder is in the prompt. The
answer appears while it is made. --chat asks for one question after another and remembers the
conversation; an empty line ends it.

--draw (experimental) samples the tokens of an image instead of an answer, held to those that fit
the grid, and saves what the VQ-GAN makes of them. Without --prompt and --image it begins as a
training sample does; a model trained with the default `loss_on: response` was never taught to
predict image tokens, so its pictures show little.
"""

from __future__ import annotations

import argparse
import sys

import numpy as np
import torch

from beingvl.artefact.files import write_atomically
from beingvl.errors import InputError
from beingvl.images.vqgan_pictures import to_png
from beingvl.inference.model import BeingVL


def run(args: argparse.Namespace) -> None:
    if args.draw and args.chat:
        raise InputError("give either --draw or --chat")
    if not args.draw and (args.prompt is not None) == args.chat:
        raise InputError("give either --prompt with a question, or --chat")
    if args.draw and not args.draw.absolute().parent.is_dir():
        raise InputError(f"--draw {args.draw}: its folder does not exist; make it first")
    if args.draw and (args.draw.suffix.lower() != ".png" or args.draw.is_dir()):
        raise InputError(
            f"--draw {args.draw} is {'a folder' if args.draw.is_dir() else 'no .png'}; "
            "name a PNG file"
        )
    model = BeingVL(args.model, args.vbpe_path)
    if args.draw:
        draw(model, args)
        return
    images = model.img2tok(args.image, with_vbpe=not args.raw) if args.image else []
    prompt_ids = (
        [] if args.chat else model.tokenize_with_tokens(args.prompt, images)
    )  # refused before weights are read
    model.load_model(args.torch_dtype, args.device)
    torch.manual_seed(args.seed)
    if args.chat:
        chat(model, images, args)
    else:
        print_answer(model, prompt_ids, args)


def draw(model: BeingVL, args: argparse.Namespace) -> None:
    """Sample one image and save it as PNG."""
    if not model.vqgan.has_decoder:
        raise InputError(f"{model.vqgan.source} has no decoder, so a drawing could not be shown")
    model.load_model(args.torch_dtype, args.device)
    torch.manual_seed(args.seed)
    token_ids = model.draw(
        [args.prompt or ""], [args.image or None], not args.raw, args.temperature
    )
    picture = model.tok2img(token_ids)[0]
    write_atomically(args.draw, to_png(picture))
    print(
        f"{args.draw}: {picture.shape[1]} x {picture.shape[0]} pixels from "
        f"{len(token_ids[0])} tokens"
    )


def print_answer(model: BeingVL, prompt_ids: list[int], args: argparse.Namespace) -> str:
    """Print the answer piece by piece while it is made; returns it."""
    answers = model.answer_token_sequences(
        [prompt_ids],
        args.max_new_tokens,
        on_text=lambda piece: print(piece, end="", flush=True),
        do_sample=args.do_sample,
        temperature=args.temperature,
    )
    print(flush=True)
    return answers[0]


def chat(model: BeingVL, images: list[np.ndarray], args: argparse.Namespace) -> None:
    """Questions from the terminal, each with all earlier turns before it; an empty line or the
    end of input ends it.

    A question that cannot be asked (reserved tokens, context full) is explained, and the
    conversation goes on without it.
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
            answer = print_answer(
                model, model.tokenize_with_tokens([*turns, (question, None)], images), args
            )
        except InputError as error:
            print(error, file=sys.stderr)
            continue
        turns.append((question, answer))
