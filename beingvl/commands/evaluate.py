"""[7] Score a model: answers to held-out questions, loss on held-out shards, or its text logits
against the base model's.

    beingvl evaluate --model stage-3/final --json_path test.json --output eval/

One of three, each with its own output folder:
  --json_path FILE      answer every row's question greedily and score the answers by --metric
  --data SHARDS         loss and perplexity per source and token kind, computed as in training
  --text_parity BASE    compare logits on fixed texts: after stage 1 those of all text ids must be
                        bit-identical to the base model's (otherwise exit code 1); after stages 2
                        and 3 the KL divergence is printed; on the CPU by default

--json_path needs one question per dataset row. The reference answer is in `answers` (a list of
texts, or of objects with `answer`), else in `answer` (a text, or an index into the list `choices`,
read as its letter), else in the gpt turn. `category` groups scores.
  exact_match    equal to a reference after stripping and lower-casing
  vqa_accuracy   VQAv2, VizWiz, TextVQA: ten `answers` per row, official normalisation
  pope           answer yes or no; accuracy, precision, recall, F1, share of yes; `category`
                 random, popular, adversarial
  mme            answer yes or no; `category` is the MME task, two questions per image;
                 perception and cognition score
  scienceqa      answer is a letter A … E, or an index into `choices`
  anls           DocVQA, ST-VQA: similarity with the best of `answers`, 0 below 0.5
  cider, bleu    captions; bleu needs pip install '.[evaluation]'

The output folder gets scores.json (with standard errors), predictions.jsonl or samples.jsonl, and
manifest.json last. The work is divided into parts of --rows_per_part: started by a launcher or as a
Slurm array, every rank does its share; after a kill, start it again with any number of ranks to do
the rest. A finished evaluation with the same inputs is reused.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from beingvl.commands.options import (
    add_model_arguments,
    add_rank_arguments,
    add_row_format,
    options_of,
)
from beingvl.commands.parser import FILE, PLACE, Input
from beingvl.evaluation.metrics import METRICS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add_model_arguments(parser)
    what = parser.add_mutually_exclusive_group(required=True)
    rows = "one question and its reference answer per row, in any format that tokenize reads"
    what.add_argument("--json_path", type=PLACE, nargs="+", help=rows)
    shards = "shard folder that was not trained on"
    what.add_argument("--data", type=Input("shards"), help=shards)
    base = "the model that training started from, converted or not"
    what.add_argument("--text_parity", type=FILE, metavar="BASE", help=base)
    add("--output", dest="output_path", type=Path, required=True, help="folder to write")
    add(
        "--metric",
        default="exact_match",
        choices=list(METRICS),
        help="how the answers to --json_path are scored",
    )
    add_row_format(parser)
    images = "root folder of the rows' image paths, or tar files or tables with the images"
    add("--image_path", type=PLACE, nargs="+", help=images)
    codes = "folder written by encode-images; without it, images are encoded now"
    add("--codes", dest="vq_codes", type=Input("vq_codes"), help=codes)
    add("--max_new_tokens", type=int, default=16, help="longest answer, in tokens")
    add("--batch_size", type=int, default=128, help="prompts per batch; fewer for a large model")
    targets = "which tokens of --data are targets"
    add("--loss_on", default="response", choices=["response", "text", "all"], help=targets)
    add("--limit", type=int, help="use only the first rows or samples, this many")
    part = "rows or samples per part; a kill loses only unfinished parts"
    add("--rows_per_part", type=int, default=512, help=part)
    add("--name", help="name in scores.json and the table; default: the output folder's")
    add_rank_arguments(parser)
    add("--overwrite", action="store_true", help="replace a finished evaluation with other inputs")


def run(args: argparse.Namespace) -> int:
    # torch is imported here, so that --help is instant.
    from beingvl.evaluation.evaluate import evaluate

    scores = evaluate(**options_of(args))
    is_harmed = scores and scores.get("equal_is_expected") and not scores["equal"]
    return 1 if is_harmed else 0
