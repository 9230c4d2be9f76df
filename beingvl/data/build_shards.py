"""[4] JSONL token rows (ours or the published files) -> memory-mapped Arrow shards.

  1. plan_parts    every file is cut at multiples of --part_bytes; a part holds the lines that
                   start inside it
  2. build         parse (token_rows.py), check, write a shard; in --num_workers threads
      (parts.py: killed and started again)
  3. join_shards   all shards, the index files, and manifest.json last

The sequence of a row is token_0 + image + token_1, where image is token_image_new when the row has
it, else token_image. A published file without target_spans is accepted: its targets are token_1. A
file that `beingvl tokenize` wrote brings its vocabulary and lineage in the manifest beside it; for
any other file --model_path says which vocabulary its ids belong to. Merged images are decoded, a
row's first one is compared with its codes, when the vBPE is known: --vbpe_path, or the vbpe.json in
--model_path. The result does not depend on workers, ranks or kills.
"""

from __future__ import annotations

import argparse
import atexit
import gc
import importlib
import json
import os
import queue
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from beingvl.artefact.hashes import has_hash, hash_file
from beingvl.artefact.manifest import (
    MANIFEST_FILE,
    Manifest,
    already_made,
    is_complete,
    join_lineages,
    read_manifest,
    start_folder,
)
from beingvl.artefact.parts import (
    OvertakenError,
    Parts,
    locked,
    ranks_of,
    refuse_overwrite_of_many,
    remove_parts,
)
from beingvl.data.arrow_shards import finish_shards, open_batch, shard_name, sync_shard, write_shard
from beingvl.data.token_rows import RowReader, hash_ids
from beingvl.errors import InputError
from beingvl.vbpe.published import LegacyVisualBPE
from beingvl.vbpe.visual_bpe import VisualBPE
from beingvl.vocab import VocabLayout

MAX_PART_BYTES = 1 << 30  # a shard's offsets are 32 bits
THREADS_THAT_WAIT = 4  # for the disk, while others parse
PARTS_VERSION = (
    2  # of a part's files: another for another hash of ids, or another summary of a shard
)


@contextmanager
def _without_collecting() -> Iterator[None]:
    """No step here makes cycles; collecting during the imports and at the exit is a quarter of a
    second.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    atexit.unregister(gc.freeze)
    atexit.register(gc.freeze)
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@_without_collecting()
def run(args: argparse.Namespace) -> None:
    if not 1 <= args.part_bytes <= MAX_PART_BYTES:
        raise InputError(f"--part_bytes is {args.part_bytes}, expected 1 … {MAX_PART_BYTES}")
    if args.num_workers is not None and args.num_workers < 0:
        raise InputError(f"--num_workers is {args.num_workers}, expected at least 0")
    rank, num_ranks = ranks_of(args)
    refuse_overwrite_of_many(args.overwrite, num_ranks, args.output_path)
    vbpe = _open_vbpe(args)
    layout, lineage = _layout_and_lineage(args.jsonl_path, args.model_path, vbpe)
    decoder = _decoder(vbpe)
    content = {
        "jsonl": contents_of(args.jsonl_path),
        "lineage": lineage,
        "part_bytes": args.part_bytes,
    }
    request = {**content, "duplicate_ids": args.duplicate_ids}
    tasks = plan_parts(args.jsonl_path, args.part_bytes)
    with locked(args.output_path):
        if args.overwrite:
            start_folder(args.output_path, "shards")
            remove_parts(args.output_path)
        if already_made(args.output_path, "shards", request):
            remove_parts(args.output_path)
            warn_of_merged(read_manifest(args.output_path))
            return
        parts = Parts(
            args.output_path,
            {"parts_version": PARTS_VERSION, **content, "decoded": decoder is not None},
        )
        num_readers = max(
            1, len(os.sched_getaffinity(0)) if args.num_workers is None else args.num_workers
        )
        mine = [tasks[number] for number in parts.missing(len(tasks)) if number % num_ranks == rank]
    with suppress(OvertakenError):
        build_parts(
            ShardBuilder(parts, layout, decoder, num_readers), mine, num_readers + THREADS_THAT_WAIT
        )
    with locked(args.output_path):
        if parts.are_to_be_joined(len(tasks), is_complete(args.output_path), rank, num_ranks):
            join_shards(parts, tasks, args, layout, decoder is not None, request)


def build_parts(builder: ShardBuilder, tasks: list[PartOfLines], num_threads: int) -> None:
    """Threads, not processes: parsing, hashing and writing all happen outside of the
    interpreter's lock.
    """
    pool = ThreadPoolExecutor(num_threads)
    total = sum(task.stop - task.start for task in tasks)
    with tqdm(
        total=total, desc="build-shards", unit="B", unit_scale=True, disable=None
    ) as progress:
        try:
            for future in [pool.submit(builder.build, task) for task in tasks]:
                progress.update(future.result())
        finally:
            pool.shutdown(cancel_futures=True)


def _open_vbpe(args: argparse.Namespace) -> VisualBPE | LegacyVisualBPE | None:
    path = args.vbpe_path
    if path is None and args.model_path and (args.model_path / "vbpe.json").is_file():
        path = args.model_path
    if path is None:  # vBPE code is not imported where none is asked for
        return None
    return VisualBPE.load(path)


def _decoder(vbpe: VisualBPE | LegacyVisualBPE | None) -> VisualBPE | None:
    if vbpe is None:
        return None
    return vbpe if isinstance(vbpe, VisualBPE) else None  # a published vocabulary cannot decode


def contents_of(paths: list[Path]) -> list[str]:
    """Hashes of JSONL files; meanwhile what comes next is imported, which takes most of a
    second.
    """
    with ThreadPoolExecutor(1) as pool:
        contents = pool.submit(lambda: [content_of(path) for path in paths])
        importlib.import_module("beingvl.data.token_rows")
    return contents.result()


def content_of(path: Path) -> str:
    """Hash of a JSONL file. The manifest beside it knows the hash of a file that is not younger
    than itself.

    Raises InputError when the file is not the one of its manifest.
    """
    entry = (
        read_manifest(path.parent, "jsonl").files.get(path.name)
        if is_complete(path.parent)
        else None
    )
    if entry is None:
        return hash_file(path)
    changed = path.stat().st_size != entry["bytes"]
    if not changed and path.stat().st_mtime_ns > (path.parent / MANIFEST_FILE).stat().st_mtime_ns:
        changed = not has_hash(path, str(entry["hash"]))
    if changed:
        raise InputError(
            f"{path} changed after its manifest was written; make it again with `beingvl "
            "tokenize --overwrite`"
        )
    return str(entry["hash"])


def _layout_and_lineage(
    paths: list[Path], model_path: Path | None, vbpe: VisualBPE | LegacyVisualBPE | None
) -> tuple[VocabLayout, dict[str, str]]:
    layout = VocabLayout.load(model_path) if model_path else None
    lineages = {str(model_path): read_manifest(model_path, "model").lineage} if model_path else {}
    for path in paths:
        if not path.is_file():
            found = "is not a file" if path.exists() else "does not exist"
            raise InputError(f"{path} {found}; give a JSONL file, as `beingvl tokenize` makes it")
        if (
            is_complete(path.parent)
            and path.name in (manifest := read_manifest(path.parent, "jsonl")).files
        ):
            lineages[str(path.parent)] = manifest.lineage
            layout = layout or VocabLayout.from_dict(
                manifest.details["layout"], f"{path.parent}/manifest.json"
            )
    if layout is None:
        raise InputError(
            f"{paths[0]} is in no manifest beside it: say with --model_path which "
            "vocabulary its ids belong to"
        )
    if vbpe:
        lineages[vbpe.source] = {**vbpe.lineage, "vbpe": vbpe.fingerprint()}
    return layout, {
        **join_lineages({**lineages, "the vocabulary layout": {"vocab": layout.fingerprint()}})
    }


# ---- parts ----


@dataclass(frozen=True)
class PartOfLines:
    """The lines of `path` that start in bytes `start … stop - 1`."""

    number: int
    path: Path
    start: int
    stop: int


def plan_parts(paths: list[Path], part_bytes: int) -> list[PartOfLines]:
    cuts = [
        (path, start, min(start + part_bytes, size))
        for path in paths
        for size in [path.stat().st_size]
        for start in range(0, size, part_bytes)
    ]
    return [PartOfLines(number, *cut) for number, cut in enumerate(cuts)]


class ShardBuilder:
    """`build(task)` makes one part's shard, in any thread.

    `num_readers` parts are parsed at once: a thread that waits for the disk has given its reader,
    with its memory, to the next.
    """

    def __init__(
        self, parts: Parts, layout: VocabLayout, vbpe: VisualBPE | None, num_readers: int
    ) -> None:
        self._parts, self._layout = parts, layout
        self._readers: queue.SimpleQueue[RowReader] = queue.SimpleQueue()
        for _ in range(num_readers):
            self._readers.put(RowReader(layout, vbpe))

    def build(self, task: PartOfLines) -> int:
        """One part to one shard; returns its bytes of JSONL. Raises InputError that names the
        file.
        """
        with self._parts.writing(task.number) as folder:
            reader = self._readers.get()
            try:
                summary = self._write(task, reader, folder)
            finally:
                self._readers.put(reader)
            (folder / "shard.json").write_text(json.dumps(summary))
            if summary:
                sync_shard(folder / "shard.arrow")
        return task.stop - task.start

    def _write(self, task: PartOfLines, reader: RowReader, folder: Path) -> dict[str, Any] | None:
        """The shard of a part's rows and the hashes of their ids; returns what is to be known of
        the shard, None without rows.
        """
        rows = reader.read(task.path, task.start, task.stop)
        if not len(rows):
            return None
        try:
            summary = write_shard(folder / "shard.arrow", rows, self._layout)
        except InputError as error:
            raise InputError(
                f"{task.path}: {error}; make the file again with `beingvl tokenize`"
            ) from error
        (folder / "id_hashes").write_bytes(
            hash_ids(rows.id).tobytes()
        )  # tofile does not say that a disk is full
        return summary


# ---- all parts ----


def join_shards(
    parts: Parts,
    tasks: list[PartOfLines],
    args: argparse.Namespace,
    layout: VocabLayout,
    is_decoded: bool,
    request: dict[str, Any],
) -> None:
    if args.duplicate_ids == "refuse":
        refuse_duplicates(parts, [task.path for task in tasks], "shard.arrow")
    shards = link_shards(parts, len(tasks), args.output_path, "shard")
    merged = (
        "decoded"
        if is_decoded
        else "not decoded"
        if _hold_merged(shards.values(), layout)
        else "none"
    )
    details = {"request": request, "merged_images": merged}
    manifest = finish_shards(args.output_path, shards, layout, request["lineage"], details)
    parts.remove()
    samples, tokens, targets = (
        manifest.counts[name] for name in ("samples", "tokens", "target_tokens")
    )
    print(
        f"{args.output_path}: {samples:,} samples, {tokens:,} tokens, {targets:,} of them targets"
    )
    warn_of_merged(manifest)


def warn_of_merged(manifest: Manifest) -> None:
    if manifest.details.get("merged_images") == "not decoded":
        remedy = (
            "build them again with --vbpe_path and --overwrite (a published vBPE cannot decode)"
        )
        print(
            "warning: the merged images in these shards were never decoded and compared "
            f"with their codes; {remedy}"
        )


def _hold_merged(shards: Iterable[Mapping[str, Any]], layout: VocabLayout) -> bool:
    return any(shard["largest_id"] >= layout.first_vbpe_id for shard in shards)


def link_shards(parts: Parts, num_parts: int, output: Path, name: str) -> dict[str, dict[str, Any]]:
    """Give the parts' shards (NAME.arrow, described by NAME.json) their names in `output`; no
    byte is copied where links work.
    """
    for left in output.glob(
        "shard-*.arrow"
    ):  # of a run that was killed here, and started again to make fewer
        left.unlink()
    shards: dict[str, dict[str, Any]] = {}
    for number, summary in enumerate(parts.read_json(num_parts, f"{name}.json")):
        if summary is None:  # a part inside one very long line
            continue
        target = output / shard_name(len(shards))
        source = parts.path(number) / f"{name}.arrow"
        try:
            os.link(source, target)
        except OSError:  # a file system without hard links
            shutil.copyfile(source, target)
        shards[target.name] = summary
    return shards


def refuse_duplicates(parts: Parts, sources: Sequence[Path], shard: str) -> None:
    """Raises InputError that names an id which two rows have. Takes 16 bytes a row. `sources`:
    the file of every part.
    """
    files = [parts.path(number) / "id_hashes" for number in range(len(sources))]
    all_hashes = np.sort(
        np.concatenate(
            [np.fromfile(path, np.uint64) for path in files if path.is_file()]
            or [np.empty(0, np.uint64)]
        )
    )
    twice = all_hashes[1:][all_hashes[1:] == all_hashes[:-1]]
    if not len(twice):
        return
    for source, path in zip(sources, files, strict=True):
        if path.is_file() and len(rows := np.flatnonzero(np.fromfile(path, np.uint64) == twice[0])):
            name = open_batch(path.with_name(shard)).column("id")[int(rows[0])].as_py()
            found = (
                f"{len(twice)} rows repeat the id of another row, the first is {name!r} in {source}"
            )
            raise InputError(
                f"{found}; give every row its own id, or start again with --duplicate_ids keep"
            )
