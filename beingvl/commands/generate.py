"""Answer a prompt about images.

    beingvl generate --model stage-3/final --image a.png --prompt "Which digit is this?"
    beingvl generate --model stage-3/final --image a.png --chat
    beingvl generate --model stage-3/final --draw new.png --seed 1

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
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", type=Path, required=True, help="Being-VL model folder, e.g. stage-3/final")
    add("--vbpe_path", type=Path, help="vbpe.json; default: the one inside the model folder")
    raw = "plain VQ codes without vBPE, for a model trained on them"
    add("--raw", action="store_true", help=raw)
    image = "image file; can be given more than once"
    add("--image", type=Path, action="append", default=[], help=image)
    add("--prompt", help="the question; `<image>` marks an image's place when there are several")
    add("--chat", action="store_true", help="ask for questions one after another, on the terminal")
    draw = "experimental: draw an image, decode it with the model's VQ-GAN, save it here"
    add("--draw", type=Path, metavar="PNG", help=draw)
    add("--max_new_tokens", type=int, default=128, help="longest answer, in tokens")
    sample = "draw tokens by their probability; without it the likeliest one is taken"
    add("--do_sample", action="store_true", help=sample)
    temperature = "with --do_sample and --draw: below 1 more predictable, above 1 less"
    add("--temperature", type=float, default=1.0, help=temperature)
    add("--seed", type=int, default=0, help="of --do_sample and --draw")
    dtypes = ["float32", "bfloat16", "float16"]
    add("--torch_dtype", default="float32", choices=dtypes, help="of the language model")
    add("--device", help="torch device; default: the accelerator, if there is one")


def run(args: argparse.Namespace) -> None:
    # torch is imported here, so that --help is instant.
    from beingvl.inference.generate import generate

    generate(
        args.model,
        prompt=args.prompt,
        images=args.image,
        chat=args.chat,
        draw=args.draw,
        vbpe_path=args.vbpe_path,
        raw=args.raw,
        max_new_tokens=args.max_new_tokens,
        do_sample=args.do_sample,
        temperature=args.temperature,
        seed=args.seed,
        torch_dtype=args.torch_dtype,
        device=args.device,
    )
