"""[5] Any LLaMA + vocabulary -> Being-VL base/: longer embedding and head, longer tokenizer, the
VQ-GAN inside.

    beingvl convert --llama_path llama/ --being_vq_path vq/ --vbpe vbpe.json --output_path base/
    --verify_loading

The checkpoint is never loaded as a model. Weight files without embedding or head are hard-linked
(or copied), the others are rewritten tensor by tensor. Rows of the text ids keep their bytes; new
rows start by --init. Tied embeddings are untied. The result is a stock Hugging Face folder:
unmodified transformers loads it, and its text logits are the base model's. An interrupted run is
finished by running the same command again.
"""

from __future__ import annotations

import argparse
from pathlib import Path

INIT_METHODS = ("he", "mean", "mean_cov", "codebook", "zero")
DTYPES = ("auto", "float32", "bfloat16", "float16")
DEFAULT_CODES = DEFAULT_MERGES = 8192


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--llama_path",
        type=Path,
        required=True,
        help="folder of the base model (any causal LM of transformers)",
    )
    add(
        "--being_tokenizer_config_path",
        type=Path,
        help="tokenizer with the visual tokens; default: made from the base's own",
    )
    add(
        "--being_vq_path",
        type=Path,
        help=f"VQ-GAN folder, copied into the result; without it: {DEFAULT_CODES} codes",
    )
    add("--output_path", type=Path, required=True, help="folder to write")
    add(
        "--vbpe",
        "--vbpe_path",
        type=Path,
        help="vbpe.json: decides the number of merges, is copied into the result",
    )
    add(
        "--num_merges",
        type=int,
        help=f"vBPE ids to make room for; default: from --vbpe, else {DEFAULT_MERGES}",
    )
    add("--vocab_size", type=int, help="text ids the base model must have; only checked")
    add(
        "--extended_vocab_size",
        type=int,
        help="ids in all, text and visual; another way to say --num_merges",
    )
    add(
        "--init",
        choices=INIT_METHODS,
        default="he",
        help="values of new rows; he: normal with std sqrt(2 / hidden size)",
    )
    add("--seed", type=int, default=0, help="of the new rows")
    add(
        "--torch_dtype",
        choices=DTYPES,
        default="auto",
        help="dtype of the weights; auto: the base model's",
    )
    add(
        "--pad_vocab_multiple",
        type=int,
        default=1,
        help="rows are rounded up to a multiple of this with zero rows",
    )
    linking = parser.add_mutually_exclusive_group()
    linking.add_argument(
        "--link",
        action="store_true",
        help="hard-link unchanged files where the file system can; the default",
    )
    linking.add_argument("--no_link", action="store_true", help="copy unchanged files")
    add(
        "--overwrite",
        action="store_true",
        help="replace what another conversion wrote into --output_path",
    )
    add(
        "--verify_loading",
        action="store_true",
        help="load the result and compare it with the base; exit code 1 if it differs",
    )


def run(args: argparse.Namespace) -> int | None:
    from beingvl.model.convert_llama import run as step

    return step(args)
