"""LLaVA JSON + images (or vq_codes/) + vbpe.json -> token rows in JSONL, or Arrow shards at once.

  1. survey       one pass over the JSON: where each part starts, and whether there are images
                  (llava_json.py)
  2. image codes  given, or encoded now with the model folder's own VQ-GAN
  3. Tokenize     a part is `rows_per_part` rows; broken lines and malformed rows go to
                  rejected.jsonl with index and reason (row_tokenizer.py)
  4. join         NAME_base (VQ codes) and NAME_vbpe (merged), one token row per sample: each is a
                  JSONL file or a shard folder (dataset_folder.py)

Shards are written directly from the arrays; they equal the shards that build-shards would make from
the JSONL.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import simdjson

from beingvl.artefact.files import printable
from beingvl.artefact.hashes import hash_file
from beingvl.artefact.manifest import Manifest, join_lineages, read_manifest, start_folder
from beingvl.artefact.parts import Parts, wait_until_complete
from beingvl.artefact.ranks import RankOf
from beingvl.artefact.request import Request
from beingvl.artefact.work import Work, run_in_parts
from beingvl.data.build_shards import PARTS_VERSION
from beingvl.data.collect_rows import open_rows
from beingvl.data.conversation import CUT_CHARACTER, TextEncoder
from beingvl.data.dataset_folder import (
    DEFAULT_CATEGORY,
    REJECTED_FILE,
    DatasetFolder,
    add_counts,
    with_images,
)
from beingvl.data.llava_json import (
    BrokenRow,
    Survey,
    image_keys,
    named_images,
    rows_of_part,
    survey,
)
from beingvl.data.made_with import DEFAULT, IMAGE_POSITIONS, TEMPLATE, UNMERGED
from beingvl.data.positions import usual_positions
from beingvl.data.row_tokenizer import RowTokenizer, TokenizedRow, fit
from beingvl.data.shard_columns import Row, ShardColumns
from beingvl.data.shard_writer import finish_shards, join_shards, write_shard_of_part
from beingvl.data.token_rows import NOT_A_ROW, head_of, parse_object
from beingvl.errors import InputError, check_at_least
from beingvl.images.vq_codes import CodeFolder, DamagedError
from beingvl.vbpe.visual_bpe import AnyVBPE, load_for_layout
from beingvl.vocab import VocabLayout

COUNTS = ("rows", "rejected", "truncated", "longest_sample_tokens", "rows_with_category")


def tokenize(
    json_path: Path | str | Sequence[Path | str],
    model_path: Path | str,
    output_path: Path | str,
    *,
    row_format: str | None = None,
    image_path: Path | str | Sequence[Path | str] | None = None,
    vq_codes: Path | str | None = None,
    vbpe_path: Path | str | None = None,
    vbpe_init_size: int | None = None,
    vbpe_vocab_pad: int | None = None,
    vbpe_vocab_end: int | None = None,
    mode: str = "sft",
    dataset_name: str = "data",
    template: str | None = None,
    image_positions: str | None = None,
    format: str = "jsonl",
    max_length: int | None = None,
    too_long: str = "reject",
    rows_per_part: int = 4096,
    duplicate_ids: str = "refuse",
    max_rejected: float = 0.01,
    exif: str | None = None,
    batch_size: int = 16,
    num_workers: int = 1,
    torch_dtype: str = "auto",
    rank: int = 0,
    num_ranks: int = 1,
    overwrite: bool = False,
) -> Manifest | None:
    """Add the dataset `dataset_name` to the folder `output_path`; a finished dataset of the same
    rows is reused.

    Args:
        json_path: rows in any format that `collect_rows` reads: JSON, JSONL, CSV, parquet, Arrow,
            tar of pairs; files, folders or patterns.
        row_format: dialect of the rows; None detects it from the first rows.
        model_path: Being-VL model folder: tokenizer, vocabulary layout, VQ-GAN.
        image_path: folder that the rows' image paths are relative to; encodes the images now. Not
            needed for pictures inside tables or tar files.
        vq_codes: output folder of `encode_images`, instead of `image_path`.
        vbpe_path: vbpe.json; without it, only the variant `base` is written.
        vbpe_init_size, vbpe_vocab_pad, vbpe_vocab_end: only checked, see `load_for_layout`.
        mode: category of rows that name none: "pt" is foundation, "sft" instruction.
        template: chat template, "default" or "being-vl-0.5"; None takes the model's.
        image_positions: position ids of image tokens, "running" or "anchor" (positions.py); None
            takes the model's, or the default for a base model.
        format: "jsonl", or "arrow" to write shard folders directly.
        max_length: longest sample allowed, in tokens; the longer of a row's two variants counts.
        too_long: "reject" or "truncate" longer samples.
        rows_per_part: rows per part; a kill loses at most the unfinished parts.
        duplicate_ids: "refuse" two rows with the same id in shards, or "keep" both.
        max_rejected: tolerated share of rejected rows, 0 … 1.
        exif: for images that are encoded now, as in `encode_images`; None applies it, except for
            the template "being-vl-0.5", whose data ignores it.
        batch_size, torch_dtype: of the VQ-GAN, as in `encode_images`, if images are encoded now.
        num_workers: processes that tokenize or decode images.
        rank, num_ranks: this process among those that share the work.

    Returns the manifest, or None when other ranks have not finished their parts yet. Raises
    InputError saying what is wrong with the inputs.
    """
    model_path, output = Path(model_path), Path(output_path)
    check_at_least(1, rows_per_part=rows_per_part, max_length=max_length)
    check_at_least(0, num_workers=num_workers, max_rejected=max_rejected)
    if not dataset_name or Path(dataset_name).name != dataset_name:
        raise InputError(
            f"--dataset_name is {dataset_name!r}, expected a file name without folders"
        )
    layout = VocabLayout.load(model_path)
    sizes = vbpe_init_size, vbpe_vocab_pad, vbpe_vocab_end
    vbpe = load_for_layout(vbpe_path, layout, *sizes) if vbpe_path else None
    model = read_manifest(model_path, "model")
    template = TEMPLATE.check(template or TEMPLATE.of(model) or DEFAULT)
    image_positions = IMAGE_POSITIONS.check(
        image_positions or IMAGE_POSITIONS.of(model) or usual_positions(template, model_path)
    )
    collected = open_rows(
        json_path,
        output.with_name(f"{output.name}_{dataset_name}_rows"),
        row_format=row_format,
        rank=RankOf(rank, num_ranks),
        overwrite=overwrite,
    )
    json_path = collected.path
    rows = survey(json_path, rows_per_part)
    if rows.names_images and not vq_codes:
        vq_codes = output.with_name(f"{output.name}_{dataset_name}_vq_codes")
        _encode_now(
            json_path,
            image_path or collected.containers,
            model_path / "vqgan",
            vq_codes,
            batch_size=batch_size,
            num_workers=num_workers,
            max_rejected=max_rejected,
            exif=exif or ("ignore" if template == "being-vl-0.5" else "apply"),
            dtype=torch_dtype,
            rank=rank,
            num_ranks=num_ranks,
            overwrite=overwrite,
        )
    work = Tokenize(
        json_path,
        rows,
        model_path,
        Path(vq_codes) if vq_codes and rows.names_images else None,
        vbpe,
        output,
        Options(mode, dataset_name, template, max_length, too_long, format, rows_per_part),
        image_positions,
        max_rejected,
        duplicate_ids,
    )
    workers = min(num_workers, work.num_parts)
    run_in_parts(
        work, RankOf(rank, num_ranks), workers if workers > 1 else 0, overwrite, "tokenize"
    )
    return read_manifest(output) if work.is_finished() else None


def _encode_now(
    json_path: Path, images: Any, vq_path: Path, vq_codes: Path, **options: Any
) -> None:
    """Encode the images named in the rows, and wait for the other ranks' parts."""
    if not images:
        raise InputError(
            f"{json_path} names images: give --codes, or --image_path to encode them now"
        )
    # Only this needs torch, which takes a second to import.
    from beingvl.images.encode_images import encode_images

    encode_images(images, vq_path, vq_codes, keys=named_images(json_path), **options)
    wait_until_complete(vq_codes)


# ---- the work ----


class Options(NamedTuple):
    """What determines the token rows, besides the inputs."""

    mode: str
    dataset_name: str
    template: str
    max_length: int | None
    too_long: str
    format: str
    rows_per_part: int


@dataclass
class Tokenize(Work):
    """Each part is `rows_per_part` dataset rows."""

    json_path: Path
    rows: Survey
    model_path: Path
    codes_path: Path | None
    vbpe: AnyVBPE | None
    output: Path
    options: Options
    image_positions: str
    max_rejected: float
    duplicate_ids: str
    kind = "jsonl"
    unit = "row"

    def __post_init__(self) -> None:
        """Raises InputError if the inputs contradict each other."""
        self.layout = VocabLayout.load(self.model_path)
        self.dataset = DatasetFolder(self.output, self.options.dataset_name, self.layout)
        self.parts_folder = self.dataset.parts_name
        lineages = {str(self.model_path): read_manifest(self.model_path, "model").lineage}
        self.codes_hash = None
        if self.codes_path:
            manifest = CodeFolder(self.codes_path).manifest
            lineages[str(self.codes_path)] = manifest.lineage
            self.codes_hash = manifest.content_hash
        if self.vbpe:
            own = {"vbpe": self.vbpe.fingerprint()}
            lineages[self.vbpe.source] = {**self.vbpe.lineage, **own}
        self.lineage = join_lineages(lineages)
        self.content = hash_file(self.json_path)

    # ---- as run_in_parts asks ----

    @property
    def num_parts(self) -> int:
        return len(self.rows.starts)

    def size_of_part(self, number: int) -> int:
        size = self.options.rows_per_part
        return min(size, self.rows.num_rows - number * size)

    def request(self) -> Request:
        inputs = {"json": self.content, "codes": self.codes_hash, "lineage": self.lineage}
        positions = IMAGE_POSITIONS.in_request(self.image_positions)
        return Request(**inputs, **self.options._asdict(), **positions)

    def request_of_parts(self) -> Request:
        return Request(parts_version=PARTS_VERSION, **self.request())

    def is_finished(self) -> bool:
        return self.dataset.is_finished(self.lineage)

    def check_finished(self) -> None:
        self.dataset.check_finished(self.request())

    def start_over(self) -> None:
        self.dataset.remove()

    def prepare(self) -> None:
        self.parser = simdjson.Parser()
        self.tokenizer = RowTokenizer(
            TextEncoder(self.model_path, self.layout),
            self.layout,
            CodeFolder(self.codes_path) if self.codes_path else None,
            self.vbpe,
            self.options.template,
            DEFAULT_CATEGORY[self.options.mode],
        )

    # ---- one part ----

    def write_part(self, number: int, folder: Path, advance: Callable[[int], object]) -> None:
        first, name = number * self.options.rows_per_part, self.options.dataset_name
        counts = Counter(dict.fromkeys(COUNTS, 0))
        made: dict[str, list[Any]] = {variant: [] for variant in self.variants}
        rejected = []
        rows = rows_of_part(self.json_path, self.rows.starts[number], self.size_of_part(number))
        self.tokenizer.encode_images(rows)
        for index, row in enumerate(rows, first):
            try:
                if isinstance(row, BrokenRow):
                    raise InputError(row.reason)
                nameless = row.get("id") in (None, "")
                named = {**row, "id": f"{self.json_path.name}-{index + 1}"} if nameless else row
                options = self.options
                tokenized, truncated = fit(
                    self.tokenizer(named), options.max_length, options.too_long
                )
                written = self._written(tokenized)
            except DamagedError:
                raise
            except InputError as error:
                id_ = None if isinstance(row, BrokenRow) else row.get("id")
                shown = id_ if isinstance(id_, int | None) else printable(str(id_))
                entry = {"dataset": name, "index": index, "id": shown}
                rejected.append(_line({**entry, "reason": printable(str(error))}) + b"\n")
            else:
                counts["rows"] += 1
                counts["truncated"] += truncated
                counts["rows_with_category"] += bool(row.get("category"))
                counts[f"rows_with_{len(image_keys(row))}_images"] += 1
                longest = max(counts["longest_sample_tokens"], tokenized.num_tokens)
                counts["longest_sample_tokens"] = longest
                for variant, value in written.items():
                    made[variant].append(value)
        advance(len(rows))
        counts["rejected"] = len(rejected)
        for variant, values in made.items():
            if self.options.format == "arrow":
                write_shard_of_part(folder, variant, ShardColumns.of_rows(values), self.layout)
            else:
                (folder / f"{variant}.jsonl").write_bytes(b"".join(values))
        (folder / REJECTED_FILE).write_bytes(b"".join(rejected))
        (folder / "counts.json").write_text(json.dumps(counts))

    @property
    def variants(self) -> list[str]:
        return ["base", "vbpe"] if self.vbpe else ["base"]

    def _written(self, row: TokenizedRow) -> dict[str, Row | bytes]:
        """Variant -> its shard row or JSONL line. Raises InputError for values because of which
        `beingvl build-shards` would refuse the whole file: NaN, integers of more than 64 bits, half
        a surrogate pair, an `image` that is not a path.
        """
        try:
            line = _line(row.head)
            head = head_of(parse_object(self.parser, line))
        except UnicodeEncodeError as error:
            raise InputError(f"a text {CUT_CHARACTER}") from error
        except NOT_A_ROW as error:
            raise InputError(f"it cannot be a token row ({error})") from error
        written: dict[str, Row | bytes] = {}
        for variant, sample in row.variants.items():
            if self.options.format == "arrow":
                spans = np.array(sample.target_spans, np.int32).ravel()
                written[variant] = Row(*head, sample[:3], spans)
                continue
            fields: dict[str, Any] = {"token_0": sample.token_0.tolist()}
            fields["token_image"] = row.codes.tolist()
            if variant == "vbpe":
                fields["token_image_new"] = sample.image.tolist()
            fields["token_1"] = sample.token_1.tolist()
            fields["target_spans"] = sample.target_spans
            written[variant] = line[:-1] + b"," + _line(fields)[1:] + b"\n"
        return written

    # ---- all parts ----

    def join(self, parts: Parts) -> None:
        """Raises InputError if too many rows were rejected, or if ids in shards repeat."""
        counts = add_counts(parts.read_json(self.num_parts, "counts.json"))
        listing = parts.folder / REJECTED_FILE
        parts.join(self.num_parts, REJECTED_FILE, listing)
        rejected = listing.read_text(encoding="utf-8").split("\n")[:-1]
        if len(rejected) > self.max_rejected * self.rows.num_rows:
            raise InputError(
                f"{len(rejected)} of {self.rows.num_rows} rows of {self.json_path} were rejected, "
                f"more than {self.max_rejected:.1%} (--max_rejected); the first: {rejected[0]}; "
                f"all are in {listing}"
            )
        self.dataset.delete_files()
        hashes: dict[str, str] = {}
        for variant in self.variants:
            if self.options.format == "arrow":
                hashes |= self._join_shards(parts, variant, counts)
            else:
                file = self.dataset.file(variant)
                hashes[file.name] = parts.join(self.num_parts, f"{variant}.jsonl", file)
        entry = {"request": self.request(), "counts": counts, "lineage": self.lineage}
        self.dataset.finish(entry, [f"{line}\n" for line in rejected], hashes)
        print(
            f"{self.output}: {counts['rows']} rows of {self.options.dataset_name}"
            f"{with_images(counts)}, {counts['rejected']} rejected, {counts['truncated']} truncated"
        )

    def _join_shards(self, parts: Parts, variant: str, counts: Mapping[str, int]) -> dict[str, str]:
        """Returns the files' hashes, by their paths in the output folder."""
        folder = start_folder(self.dataset.shards(variant), "shards")
        sources = [self.json_path] * self.num_parts
        refuse = self.duplicate_ids == "refuse"
        shards = join_shards(parts, sources, variant, folder, refuse_duplicates=refuse)
        details = {
            "request": self.request(),
            TEMPLATE.name: self.options.template,
            IMAGE_POSITIONS.name: self.image_positions,
            UNMERGED: counts["longest_sample_tokens"],
            "names_categories": counts["rows_with_category"] > 0,
        }
        manifest = finish_shards(folder, shards, self.layout, self.lineage, details)
        return {
            f"{folder.name}/{name}": str(entry["hash"]) for name, entry in manifest.files.items()
        }


def _line(value: dict) -> bytes:
    """Raises ValueError for NaN, UnicodeEncodeError for half a surrogate pair."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
