"""The loader: (step, rank, micro step) to one packed micro-batch, as a pure function.

    1. Mixture.draw               k-th sample of the global order               [num_samples]
    2. PackingPlan                how many sequences each window of 4096 samples packs into
                                                                                [num_windows]
    3. step s                     takes sequences s*B … (s+1)*B - 1,   B = sequences_per_step
    4. TrainingData.micro_batch   this rank's share of one micro step, concatenated into one row

B does not depend on the number of ranks, so neither does what a step sees. There is no iterator
state: a resumed run asks for the next step. The step is the only integer to keep, and every
checkpoint keeps it (`train/checkpoint.py`).
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from beingvl.artefact.files import write_atomically
from beingvl.artefact.hashes import hash_bytes
from beingvl.data.arrow_shards import ShardReader, damaged
from beingvl.data.mixture import Mixture, check_weights
from beingvl.data.packing import WINDOW, PackingPlan, pack_window
from beingvl.data.positions import running
from beingvl.data.shard_columns import Sample
from beingvl.data.shard_writer import LENGTHS_FILE, MEMBERS_FILE, SOURCE_OF_FILE
from beingvl.errors import InputError
from beingvl.json_file import read_json
from beingvl.vocab import VocabLayout

IGNORED = -100
# Covers the arithmetic of mixture and packing, which decides what a step sees, and the file format.
PLAN_VERSION = 5
WINDOWS_KEPT = 2


@dataclass(frozen=True)
class MicroBatch:
    """Samples laid end to end in one row of `num_tokens`.

    input_ids, target_ids, position_ids: `[num_tokens]` int64. `target_ids` are already shifted:
    `target_ids[i]` is the token after `input_ids[i]`, or IGNORED. cu_seqlens:
    `[num_documents + 1]` int32, where documents start and end. token_kinds: `[num_tokens]` uint8,
    each input id's index into vocab.TOKEN_KINDS. source_of_token: `[num_tokens]` uint8, index into
    the mixture's sources.
    """

    input_ids: np.ndarray
    target_ids: np.ndarray
    position_ids: np.ndarray
    cu_seqlens: np.ndarray
    token_kinds: np.ndarray
    source_of_token: np.ndarray
    sample_ids: tuple[str, ...]

    @property
    def num_target_tokens(self) -> int:
        return int((self.target_ids != IGNORED).sum())


@dataclass(frozen=True)
class Share:
    """One source's part of everything that a run sees; shares are 0 … 1."""

    samples: int
    share_of_samples: float
    tokens: int
    share_of_tokens: float


class TrainingData:
    """What a stage trains on: shards in mixture order, packed and divided into optimizer steps.

    Opening it starts a thread that counts the sequences of every window of the global order.
    `num_steps` waits for this plan and stores it in a small file beside the shards, so the next
    start has it at once. A step waits only for the windows up to its own. A window's samples are
    drawn and packed when a step reads it.
    """

    def __init__(
        self,
        shards: ShardReader,
        mixture: Mixture,
        num_samples: int,
        sequence_length: int,
        sequences_per_step: int,
        loss_on: str = "response",
        packing: bool = True,
        advance: Callable[[], object] = lambda: None,
    ) -> None:
        """`advance` is called, from a thread, after each planned window."""
        if num_samples < 1:
            raise InputError(
                f"the run draws none of the {mixture.num_samples} samples of its mixture; "
                "raise beingvl.epochs"
            )
        self.shards = shards
        self.mixture = mixture
        self.sequences_per_step = sequences_per_step
        self._num_samples, self._sequence_length, self._packing = (
            num_samples,
            sequence_length,
            packing,
        )
        self._loss_on = loss_on
        self._windows: dict[int, list[np.ndarray]] = {}
        self._advance = advance
        self._plan_path = self._path_of_plan()
        kept = self._kept_plan()
        self._tokens_of_source = np.array(
            kept["tokens_of_source"] if kept else [0] * len(shards.sources)
        )
        self.plan = PackingPlan(self._lengths, num_samples, sequence_length, packing, kept, advance)
        if shards.manifest.counts["longest_sample_tokens"] > sequence_length:
            self.plan.num_sequences  # noqa: B018  raise now, not at the step of such a sample

    def _draw(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Samples at these places of the global order, their lengths and sources. Raises
        InputError for a damaged index.

        A few thousand samples touch pages all over the index files, so the pages are given back at
        once.
        """
        self.shards.give_back_pages()
        drawn = self.mixture.draw(start, stop)
        if drawn.max(initial=0) >= len(self.shards):
            raise damaged(self.shards.folder / MEMBERS_FILE, f"it names the sample {drawn.max()}")
        lengths = self.shards.lengths[drawn]
        if lengths.min(initial=1) < 1:
            raise damaged(
                self.shards.folder / LENGTHS_FILE, f"it holds a length of {lengths.min()} tokens"
            )
        sources = self.shards.source_of[drawn]
        if sources.max(initial=0) >= len(self.shards.sources):
            raise damaged(
                self.shards.folder / SOURCE_OF_FILE, f"it holds the source {sources.max()}"
            )
        self.shards.give_back_pages()
        return drawn, lengths, sources

    def _lengths(self, start: int, stop: int) -> np.ndarray:
        """For the plan, which asks for each sample once, so tokens per source are counted here."""
        _, lengths, sources = self._draw(start, stop)
        self._tokens_of_source += self._count(sources, lengths)[1]
        return lengths

    def _path_of_plan(self) -> Path:
        """Its name is a hash of everything that determines the plan, so it is never stale."""
        decides = [PLAN_VERSION, WINDOW, self.shards.manifest.content_hash, self.mixture.identity]
        decides += [self._num_samples, self._sequence_length, self._packing]
        # Manifests omit names that end in .tmp: a plan is not part of the shards.
        return self.shards.folder / f"plan-{hash_bytes(json.dumps(decides).encode())[7:23]}.tmp"

    def _kept_plan(self) -> dict[str, Any] | None:
        """The plan that an earlier run stored. Raises InputError for a damaged file."""
        if not self._plan_path.is_file():
            return None
        try:
            kept = read_json(self._plan_path)
            if (
                len(kept["sequences"]) != -(-self._num_samples // WINDOW)
                or min(kept["sequences"]) < 1
                or kept["tokens"] < 1
            ):
                raise ValueError("other windows")
            if (
                len(kept["tokens_of_source"]) != len(self.shards.sources)
                or sum(kept["tokens_of_source"]) != kept["tokens"]
            ):
                raise ValueError("other sources")
        except (ValueError, TypeError, KeyError) as error:
            raise InputError(
                f"{self._plan_path} is damaged ({error}); remove it, it is made again"
            ) from error
        return kept

    @cached_property
    def num_steps(self) -> int:
        """Optimizer steps; the last may have fewer sequences. Waits for the whole plan."""
        num_sequences = self.plan.num_sequences
        if not self._plan_path.is_file():
            # If the disk is read-only or full, every start plans again.
            with contextlib.suppress(OSError):
                kept = {**self.plan.counts, "tokens_of_source": self._tokens_of_source.tolist()}
                write_atomically(self._plan_path, json.dumps(kept))
        return -(-num_sequences // self.sequences_per_step)

    def sequence_numbers(
        self, step: int, micro_step: int, rank: int, num_ranks: int, micro_batch_size: int
    ) -> range:
        """One rank's sequences in a micro step; fewer or none at the very end of the run."""
        start = step * self.sequences_per_step + (micro_step * num_ranks + rank) * micro_batch_size
        end = self.plan.at_most(start + micro_batch_size)
        return range(start, max(start, end))

    def samples_of(self, sequence: int) -> np.ndarray:
        """Sample indices of one sequence."""
        window, number, num_sequences = self.plan.window_of(sequence)
        # Looked up only once: a prefetching thread may drop the window meanwhile.
        sequences = self._windows.get(window)
        if sequences is None:
            sequences = self._pack(window, num_sequences)
            if len(self._windows) >= WINDOWS_KEPT:
                # A copy of the keys, because another thread may add one.
                self._windows.pop(next(iter(list(self._windows))), None)
            self._windows[window] = sequences
        return sequences[number]

    def _pack(self, window: int, num_sequences: int) -> list[np.ndarray]:
        """Samples of the window's sequences. Raises InputError if the plan differs in number."""
        start = window * WINDOW
        drawn, lengths, _ = self._draw(start, min(start + WINDOW, self._num_samples))
        if not self._packing:
            return list(drawn.reshape(-1, 1))
        sequences = [drawn[positions] for positions in pack_window(lengths, self._sequence_length)]
        if len(sequences) != num_sequences:
            raise damaged(
                self.shards.folder / LENGTHS_FILE,
                f"it does not match {self._plan_path.name}, which was made from it",
            )
        return sequences

    def micro_batch(
        self, step: int, micro_step: int, rank: int, num_ranks: int, micro_batch_size: int
    ) -> MicroBatch:
        """Collate one rank's samples of one micro step. Steps count from 0."""
        numbers = self.sequence_numbers(step, micro_step, rank, num_ranks, micro_batch_size)
        with self.plan.resting():
            indices = [int(index) for number in numbers for index in self.samples_of(number)]
            sources = [int(self.shards.source_of[index]) for index in indices]
            return collate(
                [self.shards[index] for index in indices],
                sources,
                self.shards.layout,
                self._loss_on,
                self.shards.positions,
            )

    def realised_shares(self, num_steps: int) -> dict[str, Share]:
        """Each source's share of the first `num_steps` steps. Waits for the whole plan."""
        if num_steps < self.num_steps:
            samples, tokens = self._seen_before(num_steps * self.sequences_per_step)
        else:
            counts = self.mixture.counts(self._num_samples)
            samples, tokens = (
                np.array([counts.get(name, 0) for name in self.shards.sources]),
                self._tokens_of_source,
            )
        return {
            name: Share(
                int(samples[at]),
                float(samples[at] / samples.sum()),
                int(tokens[at]),
                float(tokens[at] / tokens.sum()),
            )
            for at, name in enumerate(self.shards.sources)
        }

    def _seen_before(self, sequence: int) -> np.ndarray:
        """Samples and tokens `[2, sources]` of all earlier sequences."""
        window, number, _ = self.plan.window_of(sequence)
        counts = np.zeros((2, len(self.shards.sources)), np.int64)
        for start in range(0, window * WINDOW, WINDOW):
            _, lengths, sources = self._draw(start, start + WINDOW)
            counts += self._count(sources, lengths)
            self._advance()
        for earlier in range(sequence - number, sequence):
            drawn = self.samples_of(earlier)
            counts += self._count(self.shards.source_of[drawn], self.shards.lengths[drawn])
        return counts

    def _count(self, sources: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Samples and tokens `[2, sources]`."""
        size = len(self.shards.sources)
        return np.stack(
            [np.bincount(sources, weights, size).astype(np.int64) for weights in (None, lengths)]
        )


def open_mixture(shards: ShardReader, weights: Mapping[str, float], by: str, seed: int) -> Mixture:
    """`weights` are shares `by` samples or tokens. Raises InputError if they are impossible."""
    weights = dict(weights)
    check_weights(weights)
    if by not in ("samples", "tokens"):
        raise InputError(f"beingvl.mixture_by is {by!r}, expected samples or tokens")
    if by == "tokens":  # the share of samples is the share of tokens divided by the mean length
        for name, entry in shards.manifest.details["sources"].items():
            if name in weights:
                weights[name] /= entry["tokens"] / entry["samples"]
    return Mixture(shards.members, shards.sources, weights, seed)


def collate(
    samples: list[Sample],
    sources: list[int],
    layout: VocabLayout,
    loss_on: str = "response",
    positions: Callable[[np.ndarray], np.ndarray] = running,
) -> MicroBatch:
    """Lay samples end to end; `positions` computes each one's position ids (positions.py). Without
    samples, the batch is one padding token without a target, so that every rank takes part.
    """
    if not samples:
        padding = np.array([layout.pad_id])
        return MicroBatch(
            input_ids=padding,
            target_ids=np.array([IGNORED]),
            position_ids=np.array([0]),
            cu_seqlens=np.array([0, 1], np.int32),
            token_kinds=layout.token_kinds(padding),
            source_of_token=np.zeros(1, np.uint8),
            sample_ids=(),
        )
    lengths = [len(sample.input_ids) for sample in samples]
    input_ids = np.concatenate([sample.input_ids for sample in samples]).astype(np.int64)
    return MicroBatch(
        input_ids=input_ids,
        target_ids=np.concatenate([shifted_targets(sample, layout, loss_on) for sample in samples]),
        position_ids=np.concatenate([positions(sample.input_ids) for sample in samples]),
        cu_seqlens=np.cumsum([0, *lengths], dtype=np.int32),
        token_kinds=layout.token_kinds(input_ids),
        source_of_token=np.repeat(np.array(sources, np.uint8), lengths),
        sample_ids=tuple(sample.id for sample in samples),
    )


def shifted_targets(sample: Sample, layout: VocabLayout, loss_on: str = "response") -> np.ndarray:
    """`[length]` int64: the next token where it is a target, else IGNORED. The last position never
    has a target.

    Targets for `response`: the target spans; `text`: all but image tokens; `all`: every token.
    """
    ids = sample.input_ids
    if loss_on == "response":
        is_target = np.zeros(len(ids), bool)
        for start, end in sample.target_spans:
            is_target[start:end] = True
    elif loss_on == "text":
        is_target = ~layout.is_image_token(ids)
    else:
        is_target = np.ones(len(ids), bool)
    targets = np.full(len(ids), IGNORED, np.int64)
    targets[:-1] = np.where(is_target[1:], ids[1:], IGNORED)
    return targets
