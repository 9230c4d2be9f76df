"""Loss and perplexity of a model on held-out shards, per source and per token kind: `beingvl
evaluate --data`.

The batches, the attention, the head that gives one loss a target token and the sums are those of
training (data/held_out.py, model/extended_vocab.py, train/loss.py), on stock weights read by
transformers and without DeepSpeed.

    HeldOutLoss.write_part   a range of samples, packed -> one line a sample, and the part's sums
    HeldOutLoss.finish       all parts, added in their order -> samples.jsonl, and what
                             scores.json says
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM

from beingvl.artefact.manifest import join_lineages, read_manifest
from beingvl.artefact.parts import Parts
from beingvl.data.arrow_shards import ShardReader
from beingvl.data.held_out import held_out_batch, pack_in_order
from beingvl.data.loader import IGNORED, MicroBatch
from beingvl.errors import InputError
from beingvl.inference.model import quiet_without_terminal
from beingvl.model import packed_attention
from beingvl.model.extended_vocab import PackedCausalLM, pack_stock_model
from beingvl.model.packed_check import refuse_short_window, refuse_unlike_packed
from beingvl.train.loss import LossSums
from beingvl.vocab import VocabLayout

SAMPLES_FILE = "samples.jsonl"
_SUMS_FILE = "sums.json"
_LOSS_CHUNK_TOKENS = 1024
SHORTEST_SEQUENCE = 2048


class HeldOutLoss:
    """The work of `beingvl evaluate --data`."""

    unit = "sample"

    def __init__(self, args: Any, device: str) -> None:
        self._args, self._device = args, torch.device(device)
        layout = VocabLayout.load(args.model)
        self._manifest = read_manifest(args.model, "model")
        self._shards = ShardReader(args.data)
        lineages = {
            str(args.model): self._manifest.lineage,
            str(args.data): self._shards.manifest.lineage,
        }
        self.lineage = join_lineages(
            {**lineages, f"{args.model}/vocab_layout.json": {"vocab": layout.fingerprint()}}
        )
        self.num_rows = min(len(self._shards), args.limit or len(self._shards))
        self._longest = int(self._shards.lengths[: self.num_rows].max(initial=0))
        self._model: PackedCausalLM | None = None

    @property
    def parts_request(self) -> dict[str, Any]:
        return {
            "data": self._shards.manifest.content_hash,
            "model": self._manifest.content_hash,
            **{name: getattr(self._args, name) for name in ("limit", "torch_dtype", "loss_on")},
        }

    def request(self) -> dict[str, Any]:
        return self.parts_request

    def write_part(self, rows: range, folder: Path, on_rows: Callable[[int], object]) -> None:
        """Losses of the samples `rows`; `on_rows` hears how many more are done."""
        started = time.perf_counter()
        model = self._model = self._model or load_packed(
            self._args.model, self._args.torch_dtype, self._device, self._longest
        )
        lengths = self._shards.lengths[rows.start : rows.stop]
        sums = LossSums.zero(self._shards.layout, self._shards.sources)
        of_samples: dict[int, tuple[float, int]] = {}
        for sequence in pack_in_order(lengths, max(SHORTEST_SEQUENCE, int(lengths.max()))):
            indices = [rows.start + position for position in sequence]
            batch = held_out_batch(self._shards, indices, self._args.loss_on)
            losses = token_losses(model, batch, self._device)
            sums.add(batch, losses)
            of_samples.update(zip(indices, sums_of_samples(batch, losses), strict=True))
            on_rows(len(indices))
        lines = [self._line(index, *of_samples[index]) for index in rows]
        (folder / SAMPLES_FILE).write_text("".join(lines), encoding="utf-8")
        seconds = time.perf_counter() - started
        (folder / _SUMS_FILE).write_text(
            json.dumps({"sums": sums.values.tolist(), "seconds": seconds}), encoding="utf-8"
        )

    def _line(self, index: int, loss_sum: float, num_targets: int) -> str:
        source = self._shards.sources[int(self._shards.source_of[index])]
        fields = {
            "id": self._shards[index].id,
            "source": source,
            "loss_sum": loss_sum,
            "target_tokens": num_targets,
        }
        return json.dumps(fields, ensure_ascii=False) + "\n"

    def finish(
        self, parts: Parts, num_parts: int, output: Path
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, float]]:
        """Write samples.jsonl; returns what scores.json says beside the name, the request and
        the counts.
        """
        parts.join(num_parts, SAMPLES_FILE, output / SAMPLES_FILE)
        found = parts.read_json(num_parts, _SUMS_FILE)
        sums = LossSums.zero(self._shards.layout, self._shards.sources)
        for part in found:
            sums.values += np.array(part["sums"])
        with open(output / SAMPLES_FILE, encoding="utf-8") as file:
            samples = [json.loads(line) for line in file]
        if not any(sample["target_tokens"] for sample in samples):
            raise InputError(
                f"{self._args.data} has no target token for --loss_on {self._args.loss_on}: "
                "there is no loss to tell"
            )
        return (
            summarize_losses(sums, samples),
            self.request(),
            {"seconds": sum(part["seconds"] for part in found)},
        )


def load_packed(
    folder: Path, torch_dtype: str, device: torch.device, longest: int
) -> PackedCausalLM:
    """A model folder as training sees it. Raises InputError for one that packing changes;
    `longest`: tokens of a sample.
    """
    config = AutoConfig.from_pretrained(folder)
    refuse_short_window(config, longest, "score it with --json_path")
    refuse_unlike_packed(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)], config)
    with quiet_without_terminal():
        causal_lm = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=getattr(torch, torch_dtype),
            attn_implementation=packed_attention.register(),
        )
    causal_lm.to(device).eval().requires_grad_(False)
    return pack_stock_model(causal_lm, VocabLayout.load(folder).num_text, _LOSS_CHUNK_TOKENS)


@torch.no_grad()
def token_losses(model: PackedCausalLM, batch: MicroBatch, device: torch.device) -> np.ndarray:
    """Losses `[num_targets]` float32 (nats) of a packed batch, in the order of its target
    positions.
    """
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
    """Loss (nats a target token) and perplexity of all, of every source and token kind, as shown
    in scores.json.
    """
    means = sums.means()
    groups: dict[str, dict[str, dict[str, float]]] = {"sources": {}, "kinds": {}}
    for name, loss in means.items():
        _, _, key = name.partition("/")
        if key:
            group, _, label = key.partition("/")
            groups[f"{group}s"][label] = {"loss": loss, "perplexity": math.exp(loss)}
    for source, entry in groups["sources"].items():
        own = [sample for sample in samples if sample["source"] == source]
        entry["standard_error"] = standard_error(own)
        entry["samples"], entry["target_tokens"] = (
            len(own),
            sum(sample["target_tokens"] for sample in own),
        )
    return {
        "metric": "loss",
        "rows": len(samples),
        "target_tokens": sum(sample["target_tokens"] for sample in samples),
        "scores": {"loss": means["loss"], "perplexity": math.exp(means["loss"])},
        "standard_errors": {"loss": standard_error(samples)},
        **groups,
    }


def standard_error(samples: Sequence[dict[str, Any]]) -> float:
    """Standard error of sum(losses) / sum(targets) over samples drawn independently (their
    tokens are not independent).
    """
    targets = math.fsum(sample["target_tokens"] for sample in samples)
    if len(samples) < 2 or not targets:
        return 0.0
    mean = math.fsum(sample["loss_sum"] for sample in samples) / targets
    squares = math.fsum(
        (sample["loss_sum"] - mean * sample["target_tokens"]) ** 2 for sample in samples
    )
    return math.sqrt(squares * len(samples) / (len(samples) - 1)) / targets
