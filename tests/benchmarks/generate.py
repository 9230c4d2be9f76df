"""Answers per second of BeingVL against plain transformers `generate`, on one random small
model; one JSON line last.

    python -m tests.benchmarks.generate [--prompts 512] [--repeats 3]     --tiny takes seconds

Both get the same prompts in the same order and the same batch size; plain transformers pads each
batch on the left as its documentation says. `generation_ratio` is ours / plain (above 1: ours is
faster), the median over repeats taken in turn; `generation_ratio_sorted` the same when plain
transformers is given the prompts sorted by length, as our class sorts them itself. Answers have 1
to 64 tokens, `mean_tokens` on average. `equal_lengths_ratio`: sorted, and all answers have 16.
`shared_image_ratio`: sorted, three questions about each image, a row of
`--image_tokens`, with answers of four tokens. Times are the process's CPU seconds. `batch_equal`
says whether batched and single answers are the same tokens. The model's weights are made larger,
because freshly initialised ones hardly attend, and `batch_equal` would say little.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from beingvl.inference.model import BeingVL
from beingvl.vocab import VocabLayout
from tests.tiny import write_model

LAYOUT = VocabLayout(num_text=512, num_vq=64, num_merges=128, bos_id=256, eos_id=257)
MAX_NEW_TOKENS, BATCH_SIZE = 64, 64
ENDS = 3.0  # larger weights of eos, so that answers end


def make_prompts(count: int) -> list[list[int]]:
    """Random ids; lengths as of the quickstart's prompts, in random order."""
    random = np.random.default_rng(0)
    return [
        random.integers(0, LAYOUT.size, random.integers(40, 100)).tolist() for _ in range(count)
    ]


def make_image_prompts(count: int, image_tokens: int) -> list[list[int]]:
    """Three questions about each image; an image has up to a tenth fewer tokens, as merged."""
    random = np.random.default_rng(0)

    def ids(least: int, most: int, first: int, end: int) -> list[int]:
        return random.integers(first, end, random.integers(least, most)).tolist()

    prompts = []
    for _ in range(count // 3):
        image = ids(image_tokens * 9 // 10, image_tokens, LAYOUT.first_image_id, LAYOUT.size)
        head = [LAYOUT.bos_id, LAYOUT.boi_id, *image, LAYOUT.eoi_id]
        prompts += [[*head, *ids(8, 24, 0, 256), LAYOUT.sep_id] for _ in range(3)]
    return prompts


@torch.inference_mode()
def plain_transformers(
    model: BeingVL, prompts: list[list[int]], max_new_tokens: int = MAX_NEW_TOKENS
) -> list[list[int]]:
    """New tokens of every prompt, batch after batch, up to eos."""
    answers: list[list[int]] = []
    for start in range(0, len(prompts), BATCH_SIZE):
        batch = prompts[start : start + BATCH_SIZE]
        width = max(map(len, batch))
        input_ids = torch.tensor([[LAYOUT.pad_id] * (width - len(ids)) + ids for ids in batch])
        mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in batch])
        out = model.model.generate(
            input_ids=input_ids,
            attention_mask=mask,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=LAYOUT.eos_id,
            pad_token_id=LAYOUT.pad_id,
        )
        rows = out[:, width:].tolist()
        answers += [
            row[: row.index(LAYOUT.eos_id)] if LAYOUT.eos_id in row else row for row in rows
        ]
    return answers


def measure(
    model: BeingVL, prompts: list[list[int]], max_new_tokens: int = MAX_NEW_TOKENS
) -> tuple[float, float]:
    """Seconds of plain transformers / ours, and the same for prompts that are sorted for them."""
    started = time.process_time()
    ours = model.continue_token_sequences(prompts, max_new_tokens, batch_size=BATCH_SIZE)
    seconds = time.process_time() - started
    started = time.process_time()
    plain = plain_transformers(model, prompts, max_new_tokens)
    plain_seconds = time.process_time() - started
    started = time.process_time()
    plain_transformers(model, sorted(prompts, key=len), max_new_tokens)
    sorted_seconds = time.process_time() - started
    speeds = [len(prompts) / each for each in (seconds, plain_seconds, sorted_seconds)]
    print(
        "ours {:.0f}, plain transformers {:.0f}, given sorted prompts {:.0f} answers "
        "per CPU second".format(*speeds)
    )
    assert ours == plain, "both must give the same answers"
    return plain_seconds / seconds, sorted_seconds / seconds


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--prompts", type=int, default=512)
    add("--repeats", type=int, default=3)
    add("--image_tokens", type=int, default=256)
    add("--tiny", action="store_true", help="see that it runs, in seconds")
    args = parser.parse_args()
    if args.tiny:
        args.prompts, args.repeats = 8, 1
    prompts = make_prompts(args.prompts)
    with tempfile.TemporaryDirectory() as folder:
        path = write_model(Path(folder) / "model", LAYOUT, num_layers=4, hidden_size=128)
        model = BeingVL(path).load_model(device="cpu")
        for parameter in model.model.parameters():
            if parameter.dim() == 2:
                parameter.data *= 8
        first = prompts[:BATCH_SIZE]
        equal = [measure(model, prompts, 16)[1] for _ in range(args.repeats)]
        asked = make_image_prompts(args.prompts, args.image_tokens)
        shared = [measure(model, asked, 4)[1] for _ in range(args.repeats)]
        model.model.lm_head.weight.data[LAYOUT.eos_id] *= ENDS
        found = [measure(model, prompts) for _ in range(args.repeats)]
        batched = model.continue_token_sequences(first, MAX_NEW_TOKENS, batch_size=BATCH_SIZE)
        single = model.continue_token_sequences(first, MAX_NEW_TOKENS, batch_size=1)
    ratio, sorted_ratio = (
        round(statistics.median(values), 3) for values in zip(*found, strict=True)
    )
    result = {"generation_ratio": ratio, "generation_ratio_sorted": sorted_ratio}
    result["equal_lengths_ratio"] = round(statistics.median(equal), 3)
    result["shared_image_ratio"] = round(statistics.median(shared), 3)
    result["mean_tokens"] = round(statistics.mean(map(len, batched)), 1)
    print(json.dumps({**result, "batch_equal": single == batched}))


if __name__ == "__main__":
    main()
