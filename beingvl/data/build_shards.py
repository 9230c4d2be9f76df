"""JSONL token rows (ours or the published files) -> memory-mapped Arrow shards.

  1. look_at       finds each file's hash and kind, in the manifest beside it or by reading it
                   (token_files.py)
  2. BuildShards   cuts every file at multiples of `part_bytes`; a part is the lines that start in
                   one piece; it is parsed and checked (token_rows.py) and becomes one shard
  3. join          writes all shards, the index files and, last, manifest.json (shard_writer.py)

The result does not depend on workers, ranks or kills (artefact/work.py).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from beingvl.artefact.manifest import Manifest, is_complete, join_lineages, read_manifest
from beingvl.artefact.parts import Parts
from beingvl.artefact.ranks import RankOf
from beingvl.artefact.request import Request
from beingvl.artefact.work import Work, run_in_parts
from beingvl.data.made_with import FACTS, IMAGE_POSITIONS, TEMPLATE, UNMERGED
from beingvl.data.positions import usual_positions
from beingvl.data.shard_columns import ShardFacts
from beingvl.data.shard_writer import finish_shards, join_shards, write_shard_of_part
from beingvl.data.token_files import Piece, TokenFile, look_at, manifest_beside
from beingvl.data.token_rows import read_rows
from beingvl.errors import InputError, check_at_least
from beingvl.stage.mixture import NO_CATEGORY
from beingvl.vbpe.visual_bpe import AnyVBPE, VisualBPE
from beingvl.vocab import VocabLayout

MAX_PART_BYTES = 1 << 30  # a shard's offsets have 32 bits
PARTS_VERSION = 4  # format of a part's files


def build_shards(
    jsonl_path: Path | str | Sequence[Path | str],
    output_path: Path | str,
    *,
    model_path: Path | str | None = None,
    vbpe_path: Path | str | None = None,
    template: str | None = None,
    image_positions: str | None = None,
    part_bytes: int = 64 << 20,
    num_workers: int | None = None,
    duplicate_ids: str = "refuse",
    rank: int = 0,
    num_ranks: int = 1,
    overwrite: bool = False,
) -> Manifest | None:
    """Write the shard folder `output_path`; a finished folder of the same rows is reused.

    Args:
        jsonl_path: one or more JSONL files of token rows.
        model_path: model folder whose vocabulary the ids belong to, for files without a manifest.
        vbpe_path: vbpe.json that must decode the merged images (a row's first image to the row's
            own codes); None takes the one in `model_path`, if there is one.
        template: chat template of the rows; None takes it from the manifest beside a file, or else
            from the file's first row: "being-vl-0.5" when all of token_1 is the target.
        image_positions: position ids of image tokens, "running" or "anchor" (positions.py); None
            takes them from the manifests beside the files, else from the model, else the default.
        part_bytes: bytes of JSONL per shard.
        num_workers: processes that parse; None starts one per CPU core, 0 parses in this process.
        duplicate_ids: "refuse" two rows with the same id, or "keep" both.
        rank, num_ranks: this process among those that share the work.

    Returns the manifest, or None when other ranks have not finished their parts yet. Raises
    InputError naming the file and the line or sample that is wrong.
    """
    if not 1 <= part_bytes <= MAX_PART_BYTES:
        raise InputError(f"--part_bytes is {part_bytes}, expected 1 … {MAX_PART_BYTES}")
    if num_workers is None:
        num_workers = len(os.sched_getaffinity(0))
    check_at_least(0, num_workers=num_workers)
    if template is not None:
        TEMPLATE.check(template)
    paths = [Path(path) for path in _listed(jsonl_path)]
    model = None if model_path is None else Path(model_path)
    layout, lineages = _layout_and_lineages(paths, model)
    vbpe = _open_vbpe(vbpe_path, model, layout)
    if vbpe:
        lineages[vbpe.source] = {**vbpe.lineage, "vbpe": vbpe.fingerprint()}
    lineage = join_lineages(lineages)
    decoder = vbpe if isinstance(vbpe, VisualBPE) else None  # a published one cannot decode
    files = [look_at(path, part_bytes, template) for path in paths]
    made_with = _made_with(files, image_positions, model)
    work = BuildShards(
        Path(output_path), files, part_bytes, layout, lineage, decoder, duplicate_ids, made_with
    )
    workers = min(num_workers, work.num_parts)
    run_in_parts(
        work, RankOf(rank, num_ranks), workers if workers > 1 else 0, overwrite, "build-shards"
    )
    return read_manifest(work.output) if is_complete(work.output) else None


def _listed(paths: Path | str | Sequence[Path | str]) -> Sequence[Path | str]:
    return [paths] if isinstance(paths, Path | str) else paths


def _open_vbpe(
    vbpe_path: Path | str | None, model_path: Path | None, layout: VocabLayout
) -> AnyVBPE | None:
    if vbpe_path is None and model_path and (model_path / "vbpe.json").is_file():
        vbpe_path = model_path
    return None if vbpe_path is None else VisualBPE.load(vbpe_path, layout.num_vq)


def _made_with(
    files: Sequence[TokenFile], image_positions: str | None, model_path: Path | None
) -> dict[str, str]:
    """The facts (made_with.py) that all files and the model to train share, by name. Raises
    InputError when they differ.
    """
    model = {str(model_path): read_manifest(model_path)} if model_path else {}
    its_own = {name: TEMPLATE.of(manifest) for name, manifest in model.items()}
    template = TEMPLATE.join({**its_own, **{str(file.path): file.template for file in files}})
    its_own = {name: IMAGE_POSITIONS.of(manifest) for name, manifest in model.items()}
    positions = {str(file.path): image_positions or file.image_positions for file in files}
    usual = usual_positions(template, model_path)
    return {
        TEMPLATE.name: template,
        IMAGE_POSITIONS.name: IMAGE_POSITIONS.check(
            IMAGE_POSITIONS.join({**its_own, **positions}, usual)
        ),
    }


def _layout_and_lineages(
    paths: list[Path], model_path: Path | None
) -> tuple[VocabLayout, dict[str, dict[str, str]]]:
    """The layout, from the model folder or the manifest beside the files, and each input's lineage.
    Raises InputError when nothing says which vocabulary the ids belong to.
    """
    layout = VocabLayout.load(model_path) if model_path else None
    lineages = {str(model_path): read_manifest(model_path, "model").lineage} if model_path else {}
    for path in paths:
        if not path.is_file():
            found = "is not a file" if path.exists() else "does not exist"
            raise InputError(f"{path} {found}; give a JSONL file, as `beingvl tokenize` makes it")
        manifest = manifest_beside(path)
        if manifest is not None:
            lineages[str(path.parent)] = manifest.lineage
            layout = layout or VocabLayout.from_dict(
                manifest.details["layout"], f"{path.parent}/manifest.json"
            )
    if layout is None:
        raise InputError(
            f"{paths[0]} is not listed in a manifest beside it: say with --model which "
            "vocabulary its ids belong to"
        )
    lineages["the vocabulary layout"] = {"vocab": layout.fingerprint()}
    return layout, lineages


# ---- the work ----


@dataclass
class BuildShards(Work):
    """Each part is the shard of one piece of a file."""

    output: Path
    files: list[TokenFile]
    part_bytes: int
    layout: VocabLayout
    lineage: dict[str, str]
    decoder: VisualBPE | None
    duplicate_ids: str
    made_with: dict[str, str]
    kind = "shards"
    unit = "B"

    @cached_property
    def pieces(self) -> list[Piece]:
        return [piece for file in self.files for piece in file.pieces()]

    @property
    def num_parts(self) -> int:
        return len(self.pieces)

    def size_of_part(self, number: int) -> int:
        return self.pieces[number].stop - self.pieces[number].start

    @property
    def content(self) -> Request:
        contents = [file.content for file in self.files]
        return Request(jsonl=contents, lineage=self.lineage, part_bytes=self.part_bytes)

    def request(self) -> Request:
        request = Request(**self.content, duplicate_ids=self.duplicate_ids)
        for fact in FACTS:
            request |= fact.in_request(self.made_with[fact.name])
        return request

    def request_of_parts(self) -> Request:
        is_decoded = self.decoder is not None
        return Request(parts_version=PARTS_VERSION, **self.content, decoded=is_decoded)

    def write_part(self, number: int, folder: Path, advance: Callable[[int], object]) -> None:
        path, start, stop, lines_before, has_spans = self.pieces[number]
        context = self.layout, self.decoder, advance
        rows = read_rows(path, start, stop, *context, lines_before, has_spans)
        write_shard_of_part(folder, "shard", rows, self.layout)

    def join(self, parts: Parts) -> None:
        sources = [piece.path for piece in self.pieces]
        refuse = self.duplicate_ids == "refuse"
        shards = join_shards(parts, sources, "shard", self.output, refuse_duplicates=refuse)
        largest_id = max((shard.largest_id for shard in shards.values()), default=0)
        merged = "not decoded" if largest_id >= self.layout.first_vbpe_id else "none"
        if self.decoder:
            merged = "decoded"
        details = {
            "request": self.request(),
            "merged_images": merged,
            **self.made_with,
            UNMERGED: max(file.longest for file in self.files),
            "names_categories": self._names_categories(shards.values()),
        }
        manifest = finish_shards(self.output, shards, self.layout, self.lineage, details)
        counts = (f"{manifest.counts[name]:,}" for name in ("samples", "tokens", "target_tokens"))
        print("{}: {} samples, {} tokens, {} of them targets".format(self.output, *counts))
        warn_of_merged(manifest)

    def _names_categories(self, shards: Iterable[ShardFacts]) -> bool:
        """Whether any row names its source; else each has its file's `--mode` default, or none."""
        defaults = {NO_CATEGORY, *(file.default_source for file in self.files)}
        return any(not defaults.issuperset(shard.sources) for shard in shards)

    def check_finished(self) -> None:
        super().check_finished()
        warn_of_merged(read_manifest(self.output))


def warn_of_merged(manifest: Manifest) -> None:
    if manifest.details.get("merged_images") == "not decoded":
        print(
            "warning: the merged images in these shards were never decoded and compared with "
            "their codes; build them again with --vbpe and --overwrite (a published vBPE "
            "cannot decode)"
        )
