"""Answer a prompt about images.

    beingvl generate --model stage-3/final --image a.png --prompt "Which digit is this?"
    beingvl generate --model stage-3/final --image a.png --chat
    beingvl generate --model stage-3/final --draw new.png --seed 1

With several --image options, each image goes to its `<image>` placeholder in the prompt. The answer
appears while it is generated. --chat reads one question after another and remembers the
conversation; an empty line ends it.

--draw (experimental) samples image tokens instead of an answer, only those that fit the grid, and
saves the image that the VQ-GAN decodes from them. Without --prompt and --image it starts as a
training sample does. A model trained with the default `loss_on: response` never learnt to predict
image tokens, so its pictures show little.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from beingvl.commands.options import add_model_arguments, options_of
from beingvl.commands.parser import FILE


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add_model_arguments(parser)
    add(
        "--image",
        dest="images",
        metavar="FILE",
        type=FILE,
        action="append",
        default=[],
        help="image file; can be given more than once",
    )
    add("--prompt", help="the question; `<image>` marks an image's place when there are several")
    add("--chat", action="store_true", help="read questions from the terminal, one after another")
    draw = "experimental: draw an image, decode it with the model's VQ-GAN, save it here"
    add("--draw", type=Path, metavar="PNG", help=draw)
    add("--max_new_tokens", type=int, default=128, help="longest answer, in tokens")
    sample = "sample tokens by their probability; default: take the most likely one"
    add("--do_sample", action="store_true", help=sample)
    temperature = "for --do_sample and --draw: below 1 more predictable, above 1 less"
    add("--temperature", type=float, default=1.0, help=temperature)
    add("--seed", type=int, default=0, help="seed of --do_sample and --draw")


def run(args: argparse.Namespace) -> None:
    # torch is imported here, so that --help is instant.
    from beingvl.inference.generate import generate

    generate(**options_of(args))
