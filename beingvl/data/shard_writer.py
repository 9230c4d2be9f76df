"""Write Arrow token shards. A shard folder holds, in the order of writing:

    shards/shard-00000.arrow …    one record batch each: id, image, category, input_ids,
                                  target_spans
    shards/lengths.npy            [num_samples] int32, tokens of each sample
    shards/source_of.npy          [num_samples] uint8, index into the manifest's sources
    shards/members.npy            [num_samples] uint32, sample numbers grouped by source,
                                  ascending within each
    shards/manifest.json          counts, vocabulary layout, sources, rows per shard, lineage;
                                  written last

`write_shard` writes a batch of rows, `finish_shards` the rest. Steps that work in parts write each
shard into its part's folder, and `join_shards` gives it its final name.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from beingvl.artefact.card import write_card
from beingvl.artefact.hashes import HashedFile
from beingvl.artefact.manifest import Manifest, start_folder, write_manifest
from beingvl.artefact.parts import Parts
from beingvl.data.card import data_card
from beingvl.data.shard_columns import (
    SCHEMA,
    FolderFacts,
    Row,
    Sample,
    ShardColumns,
    ShardFacts,
    check_columns,
    map_batch,
)
from beingvl.data.variant import variant_up_to
from beingvl.errors import InputError
from beingvl.vocab import VocabLayout

ROWS_PER_SHARD = 65_536
LENGTHS_FILE, SOURCE_OF_FILE, MEMBERS_FILE = "lengths.npy", "source_of.npy", "members.npy"


def write_shard(path: Path, rows: ShardColumns, layout: VocabLayout) -> ShardFacts:
    """Check and write one shard; returns what `finish_shards` needs to know about it.

    Raises InputError for a row without tokens, ids outside the vocabulary or impossible spans.
    """
    check_columns(rows, layout)
    with open(path, "wb") as file:
        hashed = HashedFile(file)
        with pa.ipc.new_file(pa.PythonFile(hashed, "w"), SCHEMA) as writer:
            writer.write_batch(rows.to_batch())
    return ShardFacts.of_columns(rows, hashed.hash)


def finish_shards(
    folder: Path,
    shards: Mapping[str, ShardFacts],
    layout: VocabLayout,
    lineage: Mapping[str, str],
    details: Mapping,
) -> Manifest:
    """Write the index files and the manifest of `shards` (by file name), which are in `folder`."""
    if not shards:
        raise InputError(
            f"{folder}: no sample to write; every input is empty, or every row was rejected"
        )
    try:
        facts = FolderFacts.of_shards(list(shards.values()))
    except InputError as error:
        raise InputError(f"{folder}: {error}") from error
    index = {
        LENGTHS_FILE: facts.lengths,
        SOURCE_OF_FILE: facts.source_of,
        MEMBERS_FILE: np.argsort(facts.source_of, kind="stable").astype(np.uint32),
    }
    hashes = {name: shard.hash for name, shard in shards.items()}
    for name, array in index.items():
        temporary = folder / f"{name}.tmp"
        with open(temporary, "wb") as file:
            # Also for its errors: writing to a real file, numpy does not say what failed.
            hashed = HashedFile(file)
            np.save(hashed, array)
        hashes[name] = hashed.hash
        temporary.replace(folder / name)
    largest_id = max(shard.largest_id for shard in shards.values())
    details = {
        **details,
        "variant": variant_up_to(largest_id, layout),
        "layout": layout.to_dict(),
        "sources": facts.sources,
        "rows": {name: len(shard.lengths) for name, shard in shards.items()},
    }
    own = {*shards, *index}  # a user's files in this folder are never listed or removed
    manifest = write_manifest(
        folder, "shards", facts.counts, lineage, details, hashes, own.__contains__
    )
    write_card(folder, data_card(manifest))
    return manifest


class ShardWriter:
    """Writes a shard per `rows_per_shard` samples; `finish` writes the manifest."""

    def __init__(
        self, folder: Path, layout: VocabLayout, rows_per_shard: int = ROWS_PER_SHARD
    ) -> None:
        self._folder = start_folder(folder, "shards")
        self._layout = layout
        self._rows_per_shard = rows_per_shard
        self._rows: list[Row] = []
        self._shards: dict[str, ShardFacts] = {}

    def add(self, sample: Sample) -> None:
        """Append a sample; it is checked when its shard is written."""
        spans = sample.target_spans.ravel()
        row = Row(sample.id, sample.image, sample.category, (sample.input_ids,), spans)
        self._rows.append(row)
        if len(self._rows) >= self._rows_per_shard:
            self._flush()

    def _flush(self) -> None:
        if self._rows:
            name = shard_name(len(self._shards))
            rows = ShardColumns.of_rows(self._rows)
            self._shards[name] = write_shard(self._folder / name, rows, self._layout)
            self._rows = []

    def finish(self, lineage: dict[str, str], details: dict) -> Manifest:
        """Write the last shard and the manifest. Raises InputError for an impossible sample, or if
        there are no samples.
        """
        self._flush()
        return finish_shards(self._folder, self._shards, self._layout, lineage, details)


def shard_name(number: int) -> str:
    return f"shard-{number:05d}.arrow"


# ---- in parts ----


def write_shard_of_part(folder: Path, name: str, rows: ShardColumns, layout: VocabLayout) -> None:
    """One part's shard NAME.arrow, and NAME.npz for `join_shards`; nothing if there are no rows."""
    if len(rows):
        write_shard(folder / f"{name}.arrow", rows, layout).save(folder / f"{name}.npz")


def join_shards(
    parts: Parts, sources: Sequence[Path], name: str, output: Path, *, refuse_duplicates: bool
) -> dict[str, ShardFacts]:
    """Give the parts' shards their names in `output`, as hard links if the file system has them.

    `sources` are the files that the parts' rows come from. With `refuse_duplicates`, raises
    InputError naming an id that two rows share.
    """
    filled = [n for n in range(len(sources)) if (parts.path(n) / f"{name}.npz").is_file()]
    paths = [parts.path(number) / f"{name}.arrow" for number in filled]
    facts = [ShardFacts.load(path.with_suffix(".npz")) for path in paths]
    if refuse_duplicates:
        _refuse_duplicates(facts, paths, [sources[number] for number in filled])
    for left in output.glob("shard-*.arrow"):  # left by a run that was killed here
        left.unlink()
    shards: dict[str, ShardFacts] = {}
    for path, shard in zip(paths, facts, strict=True):
        target = output / shard_name(len(shards))
        try:
            os.link(path, target)
        except OSError:  # a file system without hard links
            shutil.copyfile(path, target)
        shards[target.name] = shard
    return shards


def _refuse_duplicates(
    facts: Sequence[ShardFacts], paths: Sequence[Path], sources: Sequence[Path]
) -> None:
    """Needs 16 bytes per row."""
    hashes = np.sort(np.concatenate([np.empty(0, np.uint64), *(one.id_hashes for one in facts)]))
    twice = hashes[1:][hashes[1:] == hashes[:-1]]
    if not len(twice):
        return
    for shard, path, source in zip(facts, paths, sources, strict=True):
        rows = np.flatnonzero(shard.id_hashes == twice[0])
        if len(rows):
            first = map_batch(path)[1].column("id")[int(rows[0])].as_py()
            raise InputError(
                f"{len(twice)} rows repeat the id of another row, the first is {first!r} in "
                f"{source}; give every row its own id, or start again with --duplicate_ids keep"
            )
