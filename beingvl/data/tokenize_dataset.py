"""[3] LLaVA JSON + images (or vq_codes/) + vbpe.json -> token rows in JSONL, or straight to
Arrow shards.

Steps, in order:
  1. image codes      from --vq_codes, or encoded now with the model folder's VQ-GAN into
                      OUTPUT_DIR_NAME_vq_codes
  2. stream_rows      one row after the other, whatever the size of the file; every 4096 rows
                      are a part (beingvl/artefact/parts.py)
  3. tokenize_part    in --num_workers processes; a broken line or malformed row goes to
                      rejected.jsonl with index and reason
  4. join             NAME_base.jsonl (VQ codes) and NAME_vbpe.jsonl (merged), one row a sample;
                      --format arrow: folders of shards
  5. manifest.json    last; several datasets may share OUTPUT_DIR, each is added to the manifest
                      when it is finished

A row: id, image, category, conversations, token_0, token_image (codes), token_image_new (merged),
token_1, and target_spans (start, end) in token_0 + image + token_1. Ranks, workers and kills do not
change a byte.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import simdjson
from tqdm import tqdm

from beingvl.artefact.files import printable
from beingvl.artefact.hashes import hash_file
from beingvl.artefact.manifest import join_lineages, read_manifest, start_folder
from beingvl.artefact.parts import (
    OvertakenError,
    Parts,
    locked,
    ranks_of,
    refuse_overwrite_of_many,
    remove_parts,
    run_in_processes,
    wait_until_complete,
)
from beingvl.commands.main import main
from beingvl.data.arrow_shards import finish_shards, write_shard
from beingvl.data.build_shards import PARTS_VERSION, link_shards, refuse_duplicates
from beingvl.data.conversation import CUT_CHARACTER, TextEncoder
from beingvl.data.dataset_folder import REJECTED_FILE, DatasetFolder
from beingvl.data.llava_json import BrokenRow, stream_rows, stream_rows_and_broken
from beingvl.data.llava_json import image_keys as image_keys  # evaluate reads the same files
from beingvl.data.row_tokenizer import RowTokenizer, fit, num_tokens
from beingvl.data.token_rows import NOT_A_ROW, RowReader, hash_ids, parse_row
from beingvl.errors import InputError
from beingvl.images.vq_codes import CodeFolder
from beingvl.vbpe.published import LegacyVisualBPE
from beingvl.vbpe.visual_bpe import VisualBPE
from beingvl.vocab import VocabLayout

DEFAULT_CATEGORY = {"pt": "foundation", "sft": "instruction"}


def run(args: argparse.Namespace) -> None:
    check_arguments(args)
    rank, num_ranks = ranks_of(args)
    refuse_overwrite_of_many(args.overwrite, num_ranks, args.output_dir)
    layout = VocabLayout.load(args.model_path)
    codes = _open_codes(args, rank, num_ranks)
    vbpe = _open_vbpe(args.vbpe_path, layout) if args.vbpe_path else None
    request = _request(args, codes, vbpe)
    output = DatasetFolder(args.output_dir, args.dataset_name, layout)
    with locked(args.output_dir):
        if args.overwrite:
            output.remove()
        if output.is_made_by(request):
            remove_parts(output.folder, output.parts_name)
            return
        parts_request = {"parts_version": PARTS_VERSION, **request}
        parts = Parts(args.output_dir, parts_request, output.parts_name)
        finished = (
            parts.finished()
        )  # now: when this rank comes to them, another one may have joined and removed them
    num_rows = None
    with suppress(OvertakenError):
        num_rows = tokenize_parts(finished, args, codes, parts_request, rank, num_ranks)
    with locked(args.output_dir):
        is_joined = output.is_made_by(request, quiet=True)
        if num_rows is None and not is_joined:
            raise parts.removed()
        if num_rows is None:
            parts.remove()
            return
        num_parts = -(-num_rows // args.rows_per_part)
        if parts.are_to_be_joined(num_parts, is_joined, rank, num_ranks):
            join_dataset(output, parts, num_parts, num_rows, args, request)


def check_arguments(args: argparse.Namespace) -> None:
    for name, least in (("rows_per_part", 1), ("num_workers", 0), ("max_rejected", 0)):
        if not getattr(args, name) >= least:  # nor NaN
            raise InputError(f"--{name} is {getattr(args, name)}, expected at least {least}")
    if not args.dataset_name or Path(args.dataset_name).name != args.dataset_name:
        raise InputError(
            f"--dataset_name is {args.dataset_name!r}, expected a file name without folders"
        )
    if args.max_length is not None and args.max_length < 1:
        raise InputError(f"--max_length is {args.max_length}, expected at least 1")


def _request(
    args: argparse.Namespace, codes: CodeFolder | None, vbpe: VisualBPE | LegacyVisualBPE | None
) -> dict[str, Any]:
    names = (
        "mode",
        "dataset_name",
        "template",
        "max_length",
        "too_long",
        "format",
        "rows_per_part",
    )
    return {
        "json": hash_file(args.json_path),
        "codes": codes.manifest.content_hash if codes else None,
        "lineage": join_lineages(_lineages(args, codes, vbpe)),
        **{name: getattr(args, name) for name in names},
    }


def read_rows(path: Path) -> list[dict]:
    """All rows of a LLaVA JSON array or a JSONL file. Raises InputError that says where it is
    damaged.
    """
    return list(stream_rows(path))


# ---- one part ----


@dataclass
class _Process:
    """What a worker process needs for every part."""

    parts: Parts
    tokenizer: RowTokenizer
    parser: simdjson.Parser
    layout: VocabLayout
    args: argparse.Namespace


_process: _Process  # set by prepare_process, in each worker process


def prepare_process(
    args: argparse.Namespace, request: dict[str, Any], codes_path: Path | None
) -> None:
    global _process
    layout = VocabLayout.load(args.model_path)
    codes = CodeFolder(codes_path) if codes_path else None
    vbpe = _open_vbpe(args.vbpe_path, layout) if args.vbpe_path else None
    encoder = TextEncoder(args.model_path, layout)
    tokenizer = RowTokenizer(
        encoder, layout, codes, vbpe, args.template, DEFAULT_CATEGORY[args.mode]
    )
    _process = _Process(
        Parts(args.output_dir, request, f"{args.dataset_name}.parts.tmp"),
        tokenizer,
        simdjson.Parser(),
        layout,
        args,
    )


def tokenize_parts(
    finished: set[int],
    args: argparse.Namespace,
    codes: CodeFolder | None,
    request: dict[str, Any],
    rank: int,
    num_ranks: int,
) -> int:
    """Make this rank's parts but those that are `finished`; returns the number of rows in the
    file.
    """
    num_rows = 0

    def tasks() -> Iterator[tuple[int, list[dict | BrokenRow]]]:
        nonlocal num_rows
        rows = stream_rows_and_broken(args.json_path)
        for number in count():
            chunk = list(islice(rows, args.rows_per_part))
            num_rows += len(chunk)
            if chunk and number % num_ranks == rank and number not in finished:
                yield number, chunk
            if len(chunk) < args.rows_per_part:
                return

    prepared = (args, request, codes.path if codes else None)
    workers = args.num_workers if args.num_workers > 1 else 0
    with tqdm(desc="tokenize", unit="row", disable=None) as progress:
        for done in run_in_processes(tokenize_part, tasks(), workers, prepare_process, prepared):
            progress.update(done)
    return num_rows


def tokenize_part(task: tuple[int, list[dict | BrokenRow]]) -> int:
    """One part: rows to token rows of every variant. Returns the number of rows."""
    number, rows = task
    args, tokenizer = _process.args, _process.tokenizer
    counts = {"rows": 0, "rejected": 0, "truncated": 0, "longest_sample_tokens": 0}
    made: dict[str, list[bytes]] = {variant: [] for variant in tokenizer.variants}
    ids, rejected = [], []
    for index, row in enumerate(rows, number * args.rows_per_part):
        try:
            if isinstance(row, BrokenRow):
                raise InputError(row.reason)
            nameless = row.get("id") in (None, "")
            named = {**row, "id": f"{args.dataset_name}-{index}"} if nameless else row
            variants, truncated = fit(tokenizer(named), args.max_length, args.too_long)
            lines = {variant: readable_line(fields) for variant, fields in variants.items()}
        except InputError as error:
            id_ = None if isinstance(row, BrokenRow) else row.get("id")
            name = id_ if isinstance(id_, int | None) else printable(str(id_))
            reason = printable(str(error))
            rejected.append(
                _line({"dataset": args.dataset_name, "index": index, "id": name, "reason": reason})
            )
            continue
        counts["rows"] += 1
        counts["truncated"] += truncated
        counts["longest_sample_tokens"] = max(
            counts["longest_sample_tokens"], *map(num_tokens, variants.values())
        )
        ids.append(variants["base"]["id"])
        for variant, line in lines.items():
            made[variant].append(line)
    counts["rejected"] = len(rejected)
    with _process.parts.writing(number) as folder:
        for variant, variant_lines in made.items():
            path = folder / f"{variant}.jsonl"
            path.write_bytes(b"".join(variant_lines))
            if args.format == "arrow":
                _write_shard(folder, variant, path)
                path.unlink()
        if args.format == "arrow":
            (folder / "id_hashes").write_bytes(hash_ids(pa.array(ids, pa.string())).tobytes())
        (folder / "rejected.jsonl").write_bytes(b"".join(rejected))
        (folder / "counts.json").write_text(json.dumps(counts))
    return len(rows)


def readable_line(fields: dict[str, Any]) -> bytes:
    """A token row's line. Raises InputError for what `beingvl build-shards` would refuse, and
    all other rows of the file with it: NaN, integers of more than 64 bits, half a character
    anywhere in the row, an `image` that is no path.
    """
    try:
        line = _line(fields)
        parse_row(_process.parser, line)
        return line
    except UnicodeEncodeError as error:
        raise InputError(f"a text {CUT_CHARACTER}") from error
    except NOT_A_ROW as error:
        raise InputError(f"it cannot be a token row ({error})") from error


def _write_shard(folder: Path, variant: str, path: Path) -> None:
    """Rows in a JSONL file to a shard: the same bytes with and without the detour of `beingvl
    build-shards`.
    """
    size = path.stat().st_size
    summary = (
        write_shard(
            folder / f"{variant}.arrow",
            RowReader(_process.layout).read(path, 0, size),
            _process.layout,
        )
        if size
        else None
    )
    (folder / f"{variant}.json").write_text(json.dumps(summary))


# ---- all parts ----


def join_dataset(
    output: DatasetFolder,
    parts: Parts,
    num_parts: int,
    num_rows: int,
    args: argparse.Namespace,
    request: dict[str, Any],
) -> None:
    """All parts to the dataset's files. Raises InputError when too many rows were rejected, or
    ids of shards repeat.
    """
    counts = {"rows": 0, "rejected": 0, "truncated": 0, "longest_sample_tokens": 0}
    for part in parts.read_json(num_parts, "counts.json"):
        for name, value in part.items():
            counts[name] = (
                max(counts[name], value) if name.startswith("longest") else counts[name] + value
            )
    listing = parts.folder / REJECTED_FILE
    parts.join(num_parts, "rejected.jsonl", listing)
    rejected = listing.read_text(encoding="utf-8").split("\n")[:-1]
    _check_rejected(listing, rejected, num_rows, args)
    if args.format == "arrow" and args.duplicate_ids == "refuse":
        refuse_duplicates(parts, [args.json_path] * num_parts, "base.arrow")
    output.delete_files()
    hashes: dict[str, str] = {}
    for variant in ("base", "vbpe") if args.vbpe_path else ("base",):
        if args.format == "arrow":
            hashes |= _join_shards(output, parts, num_parts, variant, request)
        else:
            hashes[output.file(variant).name] = parts.join(
                num_parts, f"{variant}.jsonl", output.file(variant)
            )
    entry = {"request": request, "counts": counts, "lineage": request["lineage"]}
    output.finish(entry, [f"{line}\n" for line in rejected], hashes)
    parts.remove()
    print(
        f"{output.folder}: {counts['rows']} rows of {output.name}, "
        f"{counts['rejected']} rejected, {counts['truncated']} cut"
    )


def _check_rejected(
    listing: Path, rejected: list[str], num_rows: int, args: argparse.Namespace
) -> None:
    if len(rejected) > args.max_rejected * num_rows:
        found = (
            f"{len(rejected)} of {num_rows} rows of {args.json_path} were rejected, more "
            f"than {args.max_rejected:.1%}"
        )
        raise InputError(
            f"{found} (--max_rejected); the first: {rejected[0]}; all are in {listing}"
        )


def _join_shards(
    output: DatasetFolder, parts: Parts, num_parts: int, variant: str, request: dict[str, Any]
) -> dict[str, str]:
    """Returns the hashes of the files, by their paths in the output folder."""
    folder = start_folder(output.shards(variant), "shards")
    shards = link_shards(parts, num_parts, folder, variant)
    manifest = finish_shards(
        folder, shards, output.layout, request["lineage"], {"request": request}
    )
    return {f"{folder.name}/{name}": str(entry["hash"]) for name, entry in manifest.files.items()}


def _open_codes(args: argparse.Namespace, rank: int, num_ranks: int) -> CodeFolder | None:
    """The image codes the rows need: given, or made now by step 1 with the model folder's own
    VQ-GAN.
    """
    rows = stream_rows_and_broken(args.json_path)
    if not any(isinstance(row, dict) and row.get("image") for row in rows):
        return None
    if args.vq_codes:
        return CodeFolder(args.vq_codes)
    if not args.image_path:
        raise InputError(
            f"{args.json_path} names images: give --vq_codes, or --image_path to encode them now"
        )
    folder = args.output_dir.with_name(f"{args.output_dir.name}_{args.dataset_name}_vq_codes")
    command = [
        "encode-images",
        f"--image_path={args.image_path}",
        f"--json_path={args.json_path}",
        f"--output_path={folder}",
    ]
    command += [
        f"--vq_path={args.model_path / 'vqgan'}",
        f"--batch_size={args.batch_size}",
        f"--num_workers={args.num_workers}",
    ]
    command += [
        f"--dtype={args.torch_dtype}",
        f"--rank={rank}",
        f"--num_ranks={num_ranks}",
        f"--max_rejected={args.max_rejected}",
        *(["--overwrite"] if args.overwrite else []),
    ]
    if main(command):
        raise InputError(f"encoding the images of {args.json_path} failed, see above")
    if num_ranks > 1:
        wait_until_complete(folder)
    return CodeFolder(folder)


def _open_vbpe(path: Path, layout: VocabLayout) -> VisualBPE | LegacyVisualBPE:
    vbpe = VisualBPE.load(path)
    if vbpe.num_codes != layout.num_vq or vbpe.num_merges > layout.num_merges:
        found = f"{path} has {vbpe.num_codes} codes and {vbpe.num_merges} merges"
        raise InputError(
            f"{found}, the model's vocabulary has room for {layout.num_vq} and {layout.num_merges}"
        )
    return vbpe


def _lineages(
    args: argparse.Namespace, codes: CodeFolder | None, vbpe: VisualBPE | LegacyVisualBPE | None
) -> dict[str, dict[str, str]]:
    lineages = {str(args.model_path): read_manifest(args.model_path, "model").lineage}
    if codes:
        lineages[str(codes.path)] = codes.manifest.lineage
    if vbpe:
        lineages[str(args.vbpe_path)] = {**vbpe.lineage, "vbpe": vbpe.fingerprint()}
    return lineages


def _line(value: dict) -> bytes:
    return (
        json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")) + "\n"
    ).encode()
