"""The options of every command that runs a trained model."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", type=Path, required=True, help="Being-VL model folder, e.g. stage-3/final")
    add("--vbpe_path", type=Path, help="vbpe.json; default: the one inside the model folder")
    raw = "plain VQ codes without vBPE, for a model trained on them"
    add("--raw", action="store_true", help=raw)
    dtypes = ["float32", "bfloat16", "float16"]
    add("--torch_dtype", default="float32", choices=dtypes, help="of the language model")
    add("--device", help="torch device; default: this rank's accelerator, if there is one")
