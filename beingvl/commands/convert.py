"""[3] Any LLaMA + vocabulary -> Being-VL base/: extended embedding, head and tokenizer, with the
VQ-GAN inside.

    beingvl convert --llama_path llama/ --vqgan vqgan/ --vbpe vbpe.json --output base/
    --verify_loading

The checkpoint is never loaded as a model. Weight files without embedding or head are hard-linked
(or copied); the others are rewritten tensor by tensor. Text rows stay bit-identical; visual rows
are initialised by --init. Tied embeddings are untied. The result is a stock Hugging Face folder:
unmodified transformers loads it, and its text logits are the base model's. After a kill, the same
command starts over.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from beingvl.commands.options import options_of
from beingvl.commands.parser import FILE, VBPE, VQGAN, Input

INIT_METHODS = ("he", "mean", "mean_cov", "codebook", "zero")
DTYPES = ("auto", "float32", "bfloat16", "float16")
HELP = {
    "llama_path": "folder of the base model (any causal LM of transformers)",
    "output_path": "folder to write",
    "being_vq_path": "VQ-GAN folder, copied into the result; without it: 8192 codes",
    "vbpe": "vbpe.json: sets the number of merges, and is copied into the result",
    "being_tokenizer_config_path": "tokenizer with visual tokens; default: the base's, extended",
    "num_merges": "number of vBPE ids; default: from --vbpe, else 8192",
    "vocab_size": "number of text ids the base model must have; only checked",
    "extended_vocab_size": "all ids, or new ids if fewer than the text ids; sets --num_merges",
    "init": "values of the visual rows; he: normal with std sqrt(2 / hidden size)",
    "seed": "seed of the visual rows",
    "torch_dtype": "dtype of the weights; auto: the base model's",
    "pad_vocab_multiple": "pad the vocabulary to a multiple of this, with zero rows",
    "overwrite": "replace the result of a different conversion in --output",
    "verify_loading": "load the result and compare it with the base; exit code 1 if it differs",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    base = Input(config_of="a Hugging Face model folder")
    add("--llama_path", type=base, required=True, help=HELP["llama_path"])
    add("--output", dest="output_path", type=Path, required=True, help=HELP["output_path"])
    add("--vqgan", dest="being_vq_path", type=VQGAN, help=HELP["being_vq_path"])
    add("--vbpe", type=VBPE, help=HELP["vbpe"])
    name = "being_tokenizer_config_path"
    add(f"--{name}", type=FILE, help=HELP[name])
    for name in ("num_merges", "vocab_size", "extended_vocab_size"):
        add(f"--{name}", type=int, help=HELP[name])
    for name, default in (("seed", 0), ("pad_vocab_multiple", 1)):
        add(f"--{name}", type=int, default=default, help=HELP[name])
    add("--init", choices=INIT_METHODS, default="he", help=HELP["init"])
    dtype = HELP["torch_dtype"]
    add("--dtype", dest="torch_dtype", choices=DTYPES, default="auto", help=dtype)
    link = parser.add_mutually_exclusive_group()
    linked = "hard-link unchanged files where the file system can; the default"
    link.add_argument("--link", action="store_true", default=True, help=linked)
    link.add_argument("--no_link", dest="link", action="store_false", help="copy unchanged files")
    for name in ("overwrite", "verify_loading"):
        add(f"--{name}", action="store_true", help=HELP[name])


def run(args: argparse.Namespace) -> int:
    # torch is imported here, so that --help is instant.
    from beingvl.model.convert_llama import ConversionDiffersError, convert

    try:
        convert(**options_of(args))
    except ConversionDiffersError:  # its table was printed
        return 1
    return 0
