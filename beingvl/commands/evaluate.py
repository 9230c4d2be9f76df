"""Score a model: answers to held-out questions, loss on held-out shards, or its text logits
against the base model's.

One of three, each into a folder of its own:
  --json_path FILE      answer every row's question greedily and score the answers by --metric
  --data SHARDS         loss and perplexity per source and token kind, computed as in training
  --text_parity BASE    do-no-harm check on a fixed text: after stage 1 the logits of all text
                        ids equal the base model's bit for
                        bit (a difference is exit code 1); after stages 2 and 3 the KL divergence is
                        printed

Rows of --json_path: LLaVA format, one question a row. Its reference answer is `answers` (a list of
texts, or of objects with `answer`), else `answer` (a text, or a number into the list `choices`),
else the gpt turn. `category` groups scores.
  exact_match    equal to a reference after stripping and lower-casing
  vqa_accuracy   VQAv2, VizWiz, TextVQA: ten `answers` a row, official normalisation
  pope           answer yes or no; accuracy, precision, recall, F1, share of yes; `category`
                 random, popular, adversarial
  mme            answer yes or no; `category` is the MME task, two questions an image;
                 perception and cognition score
  scienceqa      answer is a letter A … E, or a number into `choices`
  anls           DocVQA, ST-VQA: similarity with the best of `answers`, 0 below 0.5
  bleu, cider    captions; pip install '.[evaluation]'

OUTPUT_PATH gets scores.json (with standard errors), predictions.jsonl or samples.jsonl, and
manifest.json last. The work is cut into parts of --rows_per_part (beingvl/artefact/parts.py):
started by a launcher or as a Slurm array, every rank makes its share; killed, it is started again
with any number of ranks and makes what is missing. A finished evaluation with the same inputs is
reused.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from beingvl.evaluation.metrics import METRICS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from beingvl.commands.ranks import add_rank_arguments

    add = parser.add_argument
    add("--model", type=Path, required=True, help="Being-VL model folder, e.g. stage-3/final")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--json_path",
        type=Path,
        help="LLaVA-format JSON or JSONL, one question and its reference answer a row",
    )
    what.add_argument(
        "--data", type=Path, help="shard folder of build-shards that was not trained on"
    )
    what.add_argument(
        "--text_parity",
        type=Path,
        metavar="BASE",
        help="the model that training started from, converted or not",
    )
    add("--output_path", type=Path, required=True, help="folder to write")
    add("--metric", default="exact_match", choices=list(METRICS), help="of --json_path")
    add("--vbpe_path", type=Path, help="vbpe.json; default: the one inside the model folder")
    add(
        "--raw",
        action="store_true",
        help="plain VQ codes without vBPE, for a model trained on them",
    )
    add("--image_path", type=Path, help="folder that the rows' image paths start from")
    add(
        "--vq_codes",
        type=Path,
        help="folder of encode-images; without it the images are encoded now",
    )
    add("--name", help="name in scores.json and the table; default: the output folder's")
    add("--batch_size", type=int, default=128, help="prompts a batch; fewer for a large model")
    add("--max_new_tokens", type=int, default=16, help="longest answer, in tokens")
    add(
        "--loss_on",
        default="response",
        choices=["response", "text", "all"],
        help="of --data: which tokens are targets",
    )
    add("--limit", type=int, help="take only the first so many rows or samples")
    add(
        "--rows_per_part",
        type=int,
        default=512,
        help="rows or samples that are finished, or lost by a kill, together",
    )
    add(
        "--torch_dtype",
        default="float32",
        choices=["float32", "bfloat16", "float16"],
        help="of the language model",
    )
    add(
        "--device",
        help="torch device; default: this rank's accelerator, if there is one; for "
        "--text_parity the cpu",
    )
    add_rank_arguments(parser)
    add("--overwrite", action="store_true", help="replace a finished evaluation of other inputs")


def run(args: argparse.Namespace) -> int | None:
    from beingvl.evaluation.evaluate import run as step

    return step(args)
