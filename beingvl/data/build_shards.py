"""JSONL token rows (ours or the published files) -> memory-mapped Arrow shards.

  1. contents_of   hashes of the files: of `beingvl tokenize` from its manifest, else computed
  2. BuildShards   every file is cut at multiples of `part_bytes`; a part, the lines that start
                   inside one piece, is parsed and checked (token_rows.py) and becomes one shard
  3. join          all shards, the index files, and manifest.json last (shard_writer.py)

The result does not depend on workers, ranks or kills (artefact/work.py).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from beingvl.artefact.hashes import hash_file
from beingvl.artefact.manifest import (
    MANIFEST_FILE,
    Manifest,
    is_complete,
    join_lineages,
    read_manifest,
)
from beingvl.artefact.parts import Parts
from beingvl.artefact.ranks import RankOf
from beingvl.artefact.request import Request
from beingvl.artefact.work import Work, run_in_parts
from beingvl.data.shard_writer import finish_shards, join_shards, write_shard_of_part
from beingvl.data.token_rows import read_rows
from beingvl.errors import InputError
from beingvl.vbpe.visual_bpe import AnyVBPE, VisualBPE
from beingvl.vocab import VocabLayout

MAX_PART_BYTES = 1 << 30  # a shard's offsets are 32 bits
PARTS_VERSION = 3  # of a part's files


def build_shards(
    jsonl_path: Path | str | Sequence[Path | str],
    output_path: Path | str,
    *,
    model_path: Path | str | None = None,
    vbpe_path: Path | str | None = None,
    part_bytes: int = 64 << 20,
    num_workers: int | None = None,
    duplicate_ids: str = "refuse",
    rank: int = 0,
    num_ranks: int = 1,
    overwrite: bool = False,
) -> Manifest | None:
    """Write the folder of shards `output_path`; a finished one of the same rows is reused.

    Args:
        jsonl_path: one or more JSONL files of token rows.
        model_path: model folder whose vocabulary the ids belong to, for files without a manifest.
        vbpe_path: vbpe.json that merged images must decode with, a row's first to its own codes;
            None takes the one in `model_path`, if there is one.
        part_bytes: bytes of JSONL that become one shard.
        num_workers: processes that parse; None takes one per CPU core, 0 parses in this one.
        duplicate_ids: "refuse" two rows with one id, or "keep" both.
        rank, num_ranks: this process among those that share the work.

    Returns the manifest, or None when other ranks have not finished their parts yet. Raises
    InputError that names file and line, or sample, of what is wrong.
    """
    if not 1 <= part_bytes <= MAX_PART_BYTES:
        raise InputError(f"--part_bytes is {part_bytes}, expected 1 … {MAX_PART_BYTES}")
    if num_workers is None:
        num_workers = len(os.sched_getaffinity(0))
    if num_workers < 0:
        raise InputError(f"--num_workers is {num_workers}, expected at least 0")
    paths = [Path(path) for path in _listed(jsonl_path)]
    model = None if model_path is None else Path(model_path)
    vbpe = _open_vbpe(vbpe_path, model)
    layout, lineage = _layout_and_lineage(paths, model, vbpe)
    decoder = vbpe if isinstance(vbpe, VisualBPE) else None  # a published one cannot decode
    pieces = cut(paths, part_bytes)
    work = BuildShards(
        Path(output_path), pieces, part_bytes, layout, lineage, decoder, duplicate_ids
    )
    workers = min(num_workers, len(pieces))
    run_in_parts(
        work, RankOf(rank, num_ranks), workers if workers > 1 else 0, overwrite, "build-shards"
    )
    return read_manifest(work.output) if is_complete(work.output) else None


def _listed(paths: Path | str | Sequence[Path | str]) -> Sequence[Path | str]:
    return [paths] if isinstance(paths, Path | str) else paths


def _open_vbpe(vbpe_path: Path | str | None, model_path: Path | None) -> AnyVBPE | None:
    if vbpe_path is None and model_path and (model_path / "vbpe.json").is_file():
        vbpe_path = model_path
    return None if vbpe_path is None else VisualBPE.load(vbpe_path)


def _layout_and_lineage(
    paths: list[Path], model_path: Path | None, vbpe: AnyVBPE | None
) -> tuple[VocabLayout, dict[str, str]]:
    """Of the model folder, or of the manifest beside the files. Raises InputError when nothing
    says which vocabulary the ids belong to, or inputs contradict each other.
    """
    layout = VocabLayout.load(model_path) if model_path else None
    lineages = {str(model_path): read_manifest(model_path, "model").lineage} if model_path else {}
    for path in paths:
        if not path.is_file():
            found = "is not a file" if path.exists() else "does not exist"
            raise InputError(f"{path} {found}; give a JSONL file, as `beingvl tokenize` makes it")
        manifest = _manifest_beside(path)
        if manifest is not None:
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
    lineages["the vocabulary layout"] = {"vocab": layout.fingerprint()}
    return layout, join_lineages(lineages)


def _manifest_beside(path: Path) -> Manifest | None:
    """The manifest of the folder that a JSONL file lies in, if it lists the file."""
    if not is_complete(path.parent):
        return None
    manifest = read_manifest(path.parent, "jsonl")
    return manifest if path.name in manifest.files else None


def content_of(path: Path) -> str:
    """Hash of a JSONL file. The manifest beside it knows the hash of a file that is not younger
    than itself. Raises InputError when the file is not the one of its manifest.
    """
    manifest = _manifest_beside(path)
    if manifest is None:
        return hash_file(path)
    entry = manifest.files[path.name]
    changed = path.stat().st_size != entry["bytes"]
    if not changed and path.stat().st_mtime_ns > (path.parent / MANIFEST_FILE).stat().st_mtime_ns:
        changed = hash_file(path) != entry["hash"]
    if changed:
        raise InputError(
            f"{path} changed after its manifest was written; make it again with `beingvl "
            "tokenize --overwrite`"
        )
    return str(entry["hash"])


# ---- the work ----


class Piece(NamedTuple):
    """The lines of `path` that start in bytes `start … stop - 1`."""

    path: Path
    start: int
    stop: int


def cut(paths: Sequence[Path], piece_bytes: int) -> list[Piece]:
    return [
        Piece(path, start, min(start + piece_bytes, size))
        for path in paths
        for size in [path.stat().st_size]
        for start in range(0, size, piece_bytes)
    ]


@dataclass
class BuildShards(Work):
    """A part is the shard of one piece."""

    output: Path
    pieces: list[Piece]
    part_bytes: int
    layout: VocabLayout
    lineage: dict[str, str]
    decoder: VisualBPE | None
    duplicate_ids: str
    kind = "shards"
    unit = "B"

    @property
    def num_parts(self) -> int:
        return len(self.pieces)

    def size_of_part(self, number: int) -> int:
        return self.pieces[number].stop - self.pieces[number].start

    @cached_property
    def content(self) -> Request:
        paths = dict.fromkeys(piece.path for piece in self.pieces)
        contents = [content_of(path) for path in paths]
        return Request(jsonl=contents, lineage=self.lineage, part_bytes=self.part_bytes)

    def request(self) -> Request:
        return Request(**self.content, duplicate_ids=self.duplicate_ids)

    def request_of_parts(self) -> Request:
        is_decoded = self.decoder is not None
        return Request(parts_version=PARTS_VERSION, **self.content, decoded=is_decoded)

    def write_part(self, number: int, folder: Path, advance: Callable[[int], object]) -> None:
        rows = read_rows(*self.pieces[number], self.layout, self.decoder, advance)
        write_shard_of_part(folder, "shard", rows, self.layout)

    def join(self, parts: Parts) -> None:
        sources = [piece.path for piece in self.pieces]
        refuse = self.duplicate_ids == "refuse"
        shards = join_shards(parts, sources, "shard", self.output, refuse_duplicates=refuse)
        largest_id = max((shard.largest_id for shard in shards.values()), default=0)
        merged = "not decoded" if largest_id >= self.layout.first_vbpe_id else "none"
        if self.decoder:
            merged = "decoded"
        details = {"request": self.request(), "merged_images": merged}
        manifest = finish_shards(self.output, shards, self.layout, self.lineage, details)
        counts = (f"{manifest.counts[name]:,}" for name in ("samples", "tokens", "target_tokens"))
        print("{}: {} samples, {} tokens, {} of them targets".format(self.output, *counts))
        warn_of_merged(manifest)

    def check_finished(self) -> None:
        super().check_finished()
        warn_of_merged(read_manifest(self.output))


def warn_of_merged(manifest: Manifest) -> None:
    if manifest.details.get("merged_images") == "not decoded":
        print(
            "warning: the merged images in these shards were never decoded and compared with "
            "their codes; build them again with --vbpe_path and --overwrite (a published vBPE "
            "cannot decode)"
        )
