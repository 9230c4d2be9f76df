"""`--data`: loss and perplexity of a model on held-out shards, per source and per token kind.

Batches, attention, per-token losses and sums use training's code (data/held_out.py,
model/extended_vocab.py, train/loss.py), on stock weights loaded by transformers, without DeepSpeed.

    HeldOutLoss.evaluate_rows   packed samples -> a loss per sample, and sums over groups of tokens
    HeldOutLoss.combine         all parts, added in order -> samples.jsonl and the scores
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

from beingvl.artefact.manifest import join_lineages, read_manifest
from beingvl.artefact.request import Request
from beingvl.data.arrow_shards import ShardReader
from beingvl.data.held_out import held_out_batch, pack_in_order
from beingvl.data.loader import IGNORED, MicroBatch
from beingvl.data.made_with import DEFAULT, IMAGE_POSITIONS, TEMPLATE
from beingvl.errors import InputError
from beingvl.evaluation.results import (
    SAMPLES_FILE,
    Evaluation,
    SharedOptions,
    write_lines,
)
from beingvl.inference.reading import read_model
from beingvl.model import packed_attention
from beingvl.model.base_model import open_config
from beingvl.model.extended_vocab import PackedCausalLM, pack_stock_model
from beingvl.model.packed_check import refuse_short_window, refuse_unlike_packed
from beingvl.train.loss import LossSums
from beingvl.vocab import VocabLayout

SHORTEST_SEQUENCE = 2048
_LOSS_CHUNK_TOKENS = 1024


class HeldOutLoss(Evaluation):
    """The loss of every sample of a shard folder."""

    unit = "sample"

    def __init__(self, shared: SharedOptions, data: Path, loss_on: str) -> None:
        super().__init__(shared)
        self._data, self._loss_on = data, loss_on
        layout = VocabLayout.load(shared.model)
        self._manifest = read_manifest(shared.model, "model")
        self._shards = ShardReader(data, shared.model)
        self._template = TEMPLATE.of(self._shards.manifest) or DEFAULT
        asked = shared.template or TEMPLATE.of(self._manifest) or self._template
        if asked != self._template:
            raise InputError(
                f"{data} was tokenized with template {self._template}, {shared.model} uses "
                f"template {asked}; give different shards, or --template {self._template}"
            )
        made = {str(shared.model): self._manifest, str(data): self._shards.manifest}
        IMAGE_POSITIONS.join({name: IMAGE_POSITIONS.of(found) for name, found in made.items()})
        self.lineage = join_lineages(
            {
                str(shared.model): self._manifest.lineage,
                str(data): self._shards.manifest.lineage,
                f"{shared.model}/vocab_layout.json": {"vocab": layout.fingerprint()},
            }
        )
        self.num_rows = min(len(self._shards), shared.limit or len(self._shards))

    def options(self) -> Request:
        return Request(
            data=self._shards.manifest.content_hash,
            model=self._manifest.content_hash,
            limit=self.shared.limit,
            **TEMPLATE.in_request(self._template),
            torch_dtype=self.shared.dtype_name,
            loss_on=self._loss_on,
        )

    def prepare(self) -> None:
        longest = int(self._shards.lengths[: self.num_rows].max(initial=0))
        shared = self.shared
        self._model = load_packed(shared.model, shared.dtype, shared.device, longest)

    def evaluate_rows(self, rows: range, advance: Callable[[int], object]) -> dict[str, Any]:
        lengths = self._shards.lengths[rows.start : rows.stop]
        sums = LossSums.zero(self._shards.layout, self._shards.sources)
        of_samples: dict[int, tuple[float, int]] = {}
        for sequence in pack_in_order(lengths, max(SHORTEST_SEQUENCE, int(lengths.max()))):
            indices = [rows.start + position for position in sequence]
            batch = held_out_batch(self._shards, indices, self._loss_on)
            losses = token_losses(self._model, batch, self.shared.device)
            sums.add(batch, losses)
            of_samples.update(zip(indices, sums_of_samples(batch, losses), strict=True))
            advance(len(indices))
        samples = [
            {
                "id": self._shards[index].id,
                "source": self._shards.sources[int(self._shards.source_of[index])],
                "loss_sum": of_samples[index][0],
                "target_tokens": of_samples[index][1],
            }
            for index in rows
        ]
        return {"samples": samples, "sums": sums.values.tolist()}

    def combine(self, found: Sequence[dict[str, Any]]) -> tuple[dict[str, Any], Request]:
        sums = LossSums.zero(self._shards.layout, self._shards.sources)
        for part in found:
            sums.values += np.array(part["sums"])
        samples = [sample for part in found for sample in part["samples"]]
        if not any(sample["target_tokens"] for sample in samples):
            raise InputError(
                f"{self._data} has no target token for --loss_on {self._loss_on}, so there is no "
                "loss"
            )
        write_lines(self.output / SAMPLES_FILE, samples)
        return summarize_losses(sums, samples), self.request()


def load_packed(
    folder: Path, dtype: torch.dtype, device: torch.device, longest: int
) -> PackedCausalLM:
    """A model folder loaded as in training. Raises InputError for a model that packing would
    change; `longest`: tokens of the longest sample.
    """
    config = open_config(folder)
    refuse_short_window(config, longest, "score it with --json_path")
    refuse_unlike_packed(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)], config)
    model = read_model(folder, dtype, device, attn_implementation=packed_attention.register())
    return pack_stock_model(model, VocabLayout.load(folder).num_text, _LOSS_CHUNK_TOKENS)


@torch.no_grad()
def token_losses(model: PackedCausalLM, batch: MicroBatch, device: torch.device) -> np.ndarray:
    """Losses `[num_targets]` float32 (nats) of a packed batch, in the order of its targets."""
    positions = np.flatnonzero(batch.target_ids != IGNORED)
    if not len(positions):
        return np.zeros(0, np.float32)

    def tensor(array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(device)

    losses = model(
        input_ids=tensor(batch.input_ids)[None],
        position_ids=tensor(batch.position_ids)[None],
        cu_seqlens=tensor(batch.cu_seqlens),
        target_positions=tensor(positions),
        target_ids=tensor(batch.target_ids[positions]),
        longest=int(np.diff(batch.cu_seqlens).max()),
    )
    return losses.cpu().numpy()


def sums_of_samples(batch: MicroBatch, losses: np.ndarray) -> list[tuple[float, int]]:
    """(loss sum in nats, target tokens) of every sample in the batch."""
    positions = np.flatnonzero(batch.target_ids != IGNORED)
    sample_of = np.searchsorted(batch.cu_seqlens, positions, side="right") - 1
    count = len(batch.sample_ids)
    sums, targets = np.bincount(sample_of, losses, count), np.bincount(sample_of, minlength=count)
    return list(zip(sums.tolist(), targets.tolist(), strict=True))


def summarize_losses(sums: LossSums, samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Loss (nats per target token) and perplexity over everything, per source and per token kind,
    in the form of scores.json.
    """
    means = sums.means()
    groups: dict[str, dict[str, dict[str, float]]] = {"sources": {}, "kinds": {}}
    for name, loss in means.items():
        _, _, key = name.partition("/")
        if key:
            group, _, label = key.partition("/")
            groups[f"{group}s"][label] = {"loss": loss, "perplexity": perplexity(loss)}
    for source, entry in groups["sources"].items():
        own = [sample for sample in samples if sample["source"] == source]
        entry["standard_error"] = standard_error(own)
        entry["samples"] = len(own)
        entry["target_tokens"] = sum(sample["target_tokens"] for sample in own)
    return {
        "metric": "loss",
        "rows": len(samples),
        "target_tokens": sum(sample["target_tokens"] for sample in samples),
        "scores": {"loss": means["loss"], "perplexity": perplexity(means["loss"])},
        "standard_errors": {"loss": standard_error(samples)},
        **groups,
    }


def perplexity(loss: float) -> float:
    """exp(loss), or infinity for a loss so large that this is not a float."""
    return math.inf if loss > 709 else math.exp(loss)


def standard_error(samples: Sequence[dict[str, Any]]) -> float:
    """Standard error of sum(losses) / sum(targets), with samples (not tokens) as independent."""
    targets = math.fsum(sample["target_tokens"] for sample in samples)
    if len(samples) < 2 or not targets:
        return 0.0
    mean = math.fsum(sample["loss_sum"] for sample in samples) / targets
    squares = math.fsum(
        (sample["loss_sum"] - mean * sample["target_tokens"]) ** 2 for sample in samples
    )
    return math.sqrt(squares * len(samples) / (len(samples) - 1)) / targets
