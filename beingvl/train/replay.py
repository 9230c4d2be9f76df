"""Replay: rebuild a step's batch from the step's number alone, decode its samples and compute its
loss.

The loss uses the weights before the step if a checkpoint of the preceding step exists. Otherwise it
uses the nearest older checkpoint, or the start model, and the output says how many steps too old
that is.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from beingvl.data.loader import TrainingData
from beingvl.data.shard_columns import Sample
from beingvl.train.engine import TrainingEngine
from beingvl.train.loss import LossSums
from beingvl.train.metrics import METRICS_FILE, read_metrics
from beingvl.train.ranks import sum_over_ranks
from beingvl.train.window import WindowFetcher
from beingvl.vocab import VocabLayout


def replay(
    engine: TrainingEngine,
    data: TrainingData,
    model: Path,
    output: Path,
    step: int,
    weights_step: int,
) -> None:
    """Print step `step` (from 1), its loss with the weights after `weights_step`.

    All ranks call together.
    """
    ranks, config = engine.ranks, engine.config
    windows = WindowFetcher(
        data, engine.accumulation_steps, config.micro_batch_size, ranks.rank, ranks.num_ranks
    )
    sums = LossSums.zero(data.shards.layout, data.shards.sources)
    for batch in windows.fetch(step - 1).batches:
        sums.add(batch, engine.evaluate(batch).cpu().numpy())
    sums.values = sum_over_ranks(sums.values, ranks.device)
    if ranks.rank != 0:
        return
    for line in describe_samples(data, model, step):
        print(line)
    rows = read_metrics(output) if (output / METRICS_FILE).is_file() else []
    logged = next((row for row in rows if row["step"] == step), {})
    distance = step - 1 - weights_step
    weights = f"the weights after step {weights_step}" if weights_step else "the start model"
    print(f"step {step}: loss with {weights}{f', {distance} steps too old' if distance else ''}:")
    for name, value in sums.means().items():
        was = f"   logged {logged[name]:.6f}" if name in logged else ""
        print(f"  {name:<28} {value:.6f}{was}")


def describe_samples(data: TrainingData, model: Path, step: int) -> list[str]:
    """One line per sample of the whole step, with its text; images are abbreviated."""
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    layout = data.shards.layout
    lines = []
    for number in data.sequence_numbers(step - 1, 0, 0, 1, data.sequences_per_step):
        for index in data.samples_of(number).tolist():
            sample = data.shards[index]
            place = f"sequence {number}  {sample.id}  {sample.category}"
            text = decode(sample, tokenizer, layout)
            lines.append(f"{place}  {len(sample.input_ids)} tokens: {text}")
    return lines


def decode(sample: Sample, tokenizer: Tokenizer, layout: VocabLayout) -> str:
    """Text in quotes, runs of image tokens as `<64 image tokens>`, target tokens as `=> …`."""
    ids = sample.input_ids
    is_image = layout.is_image_token(ids)
    is_target = np.zeros(len(ids), bool)
    for start, end in sample.target_spans:
        is_target[start:end] = True
    changes = np.flatnonzero((np.diff(is_image) != 0) | (np.diff(is_target) != 0)) + 1
    parts = []
    for start, end in itertools.pairwise([0, *changes.tolist(), len(ids)]):
        text = f"<{end - start} image tokens>"
        if not is_image[start]:
            text = repr(tokenizer.decode(ids[start:end].tolist(), skip_special_tokens=False))
        parts.append(f"=> {text}" if is_target[start] else text)
    return " ".join(parts)
