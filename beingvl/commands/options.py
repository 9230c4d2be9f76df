"""Turns a command's options into arguments of its step; options that several commands share."""

from __future__ import annotations

import argparse
from typing import Any

from beingvl.artefact.ranks import rank_of
from beingvl.commands.parser import VBPE, Input

EXIF = "EXIF orientation: apply it, as viewers do, or ignore it, as the published data does"
ENCODER = "dtype of the VQ-GAN's encoder; auto is bfloat16 on a GPU, float32 on a CPU"
ENCODER_DTYPES = ("auto", "float32", "bfloat16", "float16")
NOT_FOR_THE_STEP = ("debug", "kind", "local_rank")


def options_of(args: argparse.Namespace, *others: str) -> dict[str, Any]:
    """Keyword arguments for the step's function, named like the options; without `others`, which
    the command handles itself. The default rank is the launcher's.
    """
    left_out = (*NOT_FOR_THE_STEP, *others)
    options = {name: value for name, value in vars(args).items() if name not in left_out}
    if "rank" in options:
        options |= rank_of(args.rank, args.num_ranks)._asdict()
    return options


def share(text: str) -> float:
    """A fraction, written as 0.01 or 1%."""
    return float(text[:-1]) / 100 if text.endswith("%") else float(text)


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """For every command that runs a trained model."""
    add = parser.add_argument
    model = "Being-VL model folder, or a stage folder, for its final/"
    a_model: dict[str, Any] = {"metavar": "MODEL", "type": Input("model"), "required": True}
    add("--model", dest="model_path", help=model, **a_model)
    vbpe = "vbpe.json; default: the one inside the model folder"
    add("--vbpe", dest="vbpe_path", type=VBPE, help=vbpe)
    raw = "plain VQ codes without vBPE, for a model trained on them"
    add("--raw", action="store_true", help=raw)
    template = "default, being-vl-0.5, or base for the base model's own; default: the model's"
    add("--template", help=template)
    dtypes = ["float32", "bfloat16", "float16"]
    dtype = "dtype of the language model; default: the checkpoint's, float32 on a CPU"
    add("--dtype", dest="torch_dtype", choices=dtypes, help=dtype)
    add("--device", help="torch device; default: this rank's accelerator, if there is one")


def add_row_format(parser: argparse.ArgumentParser) -> None:
    """For every command that reads dataset rows."""
    dialects = ["llava", "sharegpt", "messages", "texts", "caption", "alpaca"]
    of_rows = "format of the dataset rows; default: recognised from the first ones"
    parser.add_argument("--row_format", choices=dialects, help=of_rows)


def add_rank_arguments(parser: argparse.ArgumentParser) -> None:
    """For every command whose work several processes can share."""
    add = parser.add_argument
    rank = "number of this process, below --num_ranks; default: from the launcher or Slurm array"
    add("--rank", type=int, help=rank)
    num_ranks = "processes that share the work, each started with this command"
    add("--num_ranks", type=int, help=num_ranks)


def add_overrides(parser: argparse.ArgumentParser) -> None:
    """For every command that reads a stage's JSON."""
    add = parser.add_argument
    keys, shown = "override keys of the JSON, for example beingvl.epochs=1", "KEY=VALUE"
    add("--set", dest="overrides", nargs="+", action="extend", default=[], metavar=shown, help=keys)
