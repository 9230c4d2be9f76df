"""Arrow token shards: samples on disk, read through the memory map without a copy.

    shards/shard-00000.arrow …    one record batch each: id, image, category, input_ids, target_spans
    shards/manifest.json          counts, vocabulary layout, sources, lineage; written last

`ShardWriter` streams rows out, `ShardReader` presents all shards of a folder as one list of samples. Per-sample lengths come
from the list offsets, so that planning reads four bytes a sample and no token.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from beingvl.errors import InputError
from beingvl.manifest import Manifest, read_manifest, start_folder, write_manifest
from beingvl.vocab import VocabLayout

SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("image", pa.string()),
        ("category", pa.string()),
        ("input_ids", pa.list_(pa.int32())),
        ("target_spans", pa.list_(pa.int32())),  # start, end, start, end, …; end exclusive
    ]
)
ROWS_PER_SHARD = 65_536


@dataclass(frozen=True)
class Sample:
    """One sample. `input_ids` [length] int32 and `target_spans` [num_spans, 2] int32 are views into the memory map."""

    id: str
    image: str
    category: str
    input_ids: np.ndarray
    target_spans: np.ndarray


class ShardWriter:
    """Collects rows and writes a shard whenever `rows_per_shard` are there; `finish` writes the manifest."""

    def __init__(self, folder: Path, layout: VocabLayout, rows_per_shard: int = ROWS_PER_SHARD) -> None:
        self._folder = start_folder(folder)
        self._layout = layout
        self._rows_per_shard = rows_per_shard
        self._rows: list[dict] = []
        self._num_shards = 0
        self._counts = {"samples": 0, "tokens": 0, "target_tokens": 0, "longest_sample_tokens": 0}
        self._samples_of_source: dict[str, int] = {}
        self._tokens_of_source: dict[str, int] = {}

    def add(self, sample: Sample) -> None:
        """Append one sample. Raises InputError for ids outside the vocabulary or spans outside the row."""
        self._check(sample)
        num_tokens = len(sample.input_ids)
        num_targets = int((sample.target_spans[:, 1] - sample.target_spans[:, 0]).sum())
        self._counts["samples"] += 1
        self._counts["tokens"] += num_tokens
        self._counts["target_tokens"] += num_targets
        self._counts["longest_sample_tokens"] = max(self._counts["longest_sample_tokens"], num_tokens)
        self._samples_of_source[sample.category] = self._samples_of_source.get(sample.category, 0) + 1
        self._tokens_of_source[sample.category] = self._tokens_of_source.get(sample.category, 0) + num_tokens
        self._rows.append(
            {
                "id": sample.id,
                "image": sample.image,
                "category": sample.category,
                "input_ids": sample.input_ids,
                "target_spans": sample.target_spans.ravel(),
            }
        )
        if len(self._rows) >= self._rows_per_shard:
            self._flush()

    def _check(self, sample: Sample) -> None:
        ids, spans = sample.input_ids, sample.target_spans
        if len(ids) == 0:
            raise InputError(f"sample {sample.id!r} has no tokens")
        if ids.min() < 0 or ids.max() >= self._layout.size:
            raise InputError(f"sample {sample.id!r} has id {ids.max()}, the vocabulary ends at {self._layout.size - 1}")
        flat = spans.ravel()
        if spans.size and (flat[0] < 1 or flat[-1] > len(ids) or (np.diff(flat) < 0).any()):
            raise InputError(
                f"sample {sample.id!r} has target_spans {spans.tolist()} outside its tokens 1 … {len(ids)} or overlapping"
            )

    def _flush(self) -> None:
        if not self._rows:
            return
        path = self._folder / f"shard-{self._num_shards:05d}.arrow"
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, SCHEMA) as writer:
            writer.write_batch(pa.RecordBatch.from_pylist(self._rows, schema=SCHEMA))
        self._num_shards += 1
        self._rows = []

    def finish(self, lineage: dict[str, str], details: dict) -> Manifest:
        """Write the last shard and the manifest. Raises InputError when there is no sample at all."""
        self._flush()
        if not self._num_shards:
            raise InputError(f"{self._folder}: no sample to write")
        sources = {
            name: {"samples": self._samples_of_source[name], "tokens": self._tokens_of_source[name]}
            for name in sorted(self._samples_of_source)
        }
        details = {**details, "layout": self._layout.to_dict(), "sources": sources}
        return write_manifest(self._folder, "shards", {**self._counts, "shards": self._num_shards}, lineage, details)


class ShardReader:
    """All samples of a finished shard folder, memory-mapped.

    `lengths` [num_samples] int32 (tokens), `source_of` [num_samples] uint8 (index into `sources`).
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        self.manifest = read_manifest(folder, "shards")
        self.layout = VocabLayout.from_dict(self.manifest.details["layout"], f"{folder}/manifest.json")
        self.sources: list[str] = list(self.manifest.details["sources"])
        self._batches = [self._open(name) for name in sorted(self.manifest.files) if name.endswith(".arrow")]
        self._starts = np.cumsum([0, *(batch.num_rows for batch in self._batches)])
        expected = self.manifest.counts["samples"]
        if self._starts[-1] != expected:
            raise InputError(f"{folder} holds {self._starts[-1]} samples, its manifest says {expected}; build the shards again")
        self.lengths = np.concatenate([np.diff(_offsets(batch, "input_ids")) for batch in self._batches])
        self.source_of = np.concatenate([self._source_indices(batch) for batch in self._batches])

    def _open(self, name: str) -> pa.RecordBatch:
        path = self.folder / name
        expected_bytes = self.manifest.files[name]["bytes"]
        if not path.is_file() or path.stat().st_size != expected_bytes:
            found = f"{path.stat().st_size} bytes" if path.is_file() else "no such file"
            raise InputError(f"{path}: found {found}, the manifest says {expected_bytes} bytes; build the shards again")
        try:
            return pa.ipc.open_file(pa.memory_map(str(path))).get_batch(0)
        except pa.ArrowInvalid as error:
            raise InputError(f"{path} is not a readable Arrow file ({error}); build the shards again") from error

    def _source_indices(self, batch: pa.RecordBatch) -> np.ndarray:
        encoded = batch.column("category").dictionary_encode()
        to_source = np.array([self.sources.index(name) for name in encoded.dictionary.to_pylist()], np.uint8)
        return to_source[encoded.indices.to_numpy(zero_copy_only=False)]

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> Sample:
        shard = int(np.searchsorted(self._starts, index, side="right")) - 1
        batch, row = self._batches[shard], int(index - self._starts[shard])
        return Sample(
            id=batch.column("id")[row].as_py(),
            image=batch.column("image")[row].as_py(),
            category=batch.column("category")[row].as_py(),
            input_ids=_list_item(batch, "input_ids", row),
            target_spans=_list_item(batch, "target_spans", row).reshape(-1, 2),
        )


def _offsets(batch: pa.RecordBatch, column: str) -> np.ndarray:
    return batch.column(column).offsets.to_numpy()


def _list_item(batch: pa.RecordBatch, column: str, row: int) -> np.ndarray:
    array = batch.column(column)
    start, end = array.offsets[row].as_py(), array.offsets[row + 1].as_py()
    return array.values.slice(start, end - start).to_numpy()
