"""Answer a prompt about images.

    beingvl generate --model stage-3/final --vbpe_path vbpe.json --image a.png --prompt "Which digit is this?"
    beingvl generate --model stage-3/final --image a.png --chat

With several --image options each stands where its `<image>` placeholder is in the prompt. The answer appears while it is
made. --chat asks for one question after another and remembers the conversation; an empty line ends it.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

    from beingvl.inference.model import BeingVL, Prompt


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", type=Path, required=True, help="Being-VL model folder, e.g. stage-3/final")
    add("--vbpe_path", type=Path, help="vbpe.json; default: the one inside the model folder")
    add("--raw", action="store_true", help="plain VQ codes without vBPE, for a model trained on them")
    add("--image", type=Path, action="append", default=[], help="image file; can be given more than once")
    add("--prompt", help="the question; `<image>` marks an image's place when there are several")
    add("--chat", action="store_true", help="ask for questions one after another, on the terminal")
    add("--max_new_tokens", type=int, default=128, help="longest answer, in tokens")
    add("--do_sample", action="store_true", help="draw tokens by their probability; without it the likeliest one is taken")
    add("--temperature", type=float, default=1.0, help="with --do_sample: below 1 more predictable, above 1 less")
    add("--seed", type=int, default=0, help="of --do_sample")
    add("--torch_dtype", default="float32", choices=["float32", "bfloat16", "float16"], help="of the language model")
    add("--device", help="torch device; default: the accelerator, if there is one")


def run(args: argparse.Namespace) -> None:
    import torch

    from beingvl.errors import InputError
    from beingvl.inference.model import BeingVL

    if bool(args.prompt) == args.chat:
        raise InputError("give either --prompt with a question, or --chat")
    model = BeingVL(args.model, args.vbpe_path)
    images = model.img2tok(args.image, with_vbpe=not args.raw) if args.image else []
    model.load_model(args.torch_dtype, args.device)
    torch.manual_seed(args.seed)
    if args.chat:
        chat(model, images, args)
    else:
        print_answer(model, args.prompt, images, args)


def print_answer(model: BeingVL, prompt: Prompt, images: list[np.ndarray], args: argparse.Namespace) -> str:
    """Print the answer piece by piece while it is made; returns it."""
    answers = model.answer_token_sequences(
        [model.tokenize_with_tokens(prompt, images)],
        args.max_new_tokens,
        on_text=lambda piece: print(piece, end="", flush=True),
        do_sample=args.do_sample,
        temperature=args.temperature,
    )
    print(flush=True)
    return answers[0]


def chat(model: BeingVL, images: list[np.ndarray], args: argparse.Namespace) -> None:
    """Questions from the terminal, each with all earlier turns before it; an empty line or the end of input ends it.

    A question that cannot be asked (reserved tokens, context full) is explained, and the conversation goes on without it.
    """
    import sys

    from beingvl.errors import InputError

    turns: list[tuple[str, str | None]] = []
    while True:
        try:
            question = input("> ").strip()
        except EOFError:
            return
        if not question:
            return
        try:
            answer = print_answer(model, [*turns, (question, None)], images, args)
        except InputError as error:
            print(error, file=sys.stderr)
            continue
        turns.append((question, answer))


if __name__ == "__main__":
    import sys

    from beingvl.cli import main

    sys.exit(main(["generate", *sys.argv[1:]]))
