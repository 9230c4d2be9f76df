"""[4] JSONL token rows (ours or the published files) -> memory-mapped Arrow shards.

The sequence of a row is token_0 + image + token_1, where image is token_image_new when the row has it, else token_image.
A published file without target_spans is accepted: its targets are token_1. A file that `beingvl tokenize` wrote brings its
vocabulary and lineage in the manifest beside it; for any other file --model_path says which vocabulary its ids belong to.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from beingvl.data.arrow_shards import Sample
    from beingvl.vocab import VocabLayout


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--jsonl_path", type=Path, nargs="+", required=True, help="JSONL files of token rows")
    parser.add_argument("--output_path", type=Path, required=True, help="shard folder to write")
    parser.add_argument(
        "--model_path", type=Path, help="model folder whose vocabulary the ids belong to, for files without a manifest"
    )
    parser.add_argument("--rows_per_shard", type=int, default=65536, help="rows a shard")
    parser.add_argument("--overwrite", action="store_true", help="replace a finished output of other inputs")


def run(args: argparse.Namespace) -> None:
    from tqdm import tqdm

    from beingvl.data.arrow_shards import ShardWriter
    from beingvl.manifest import already_made, hash_file

    layout, lineage = _layout_and_lineage(args.jsonl_path, args.model_path)
    request = {"jsonl": [hash_file(path) for path in args.jsonl_path], "lineage": lineage, "rows_per_shard": args.rows_per_shard}
    if already_made(args.output_path, "shards", request, args.overwrite):
        return
    writer = ShardWriter(args.output_path, layout, args.rows_per_shard)
    for path in args.jsonl_path:
        with tqdm(
            total=path.stat().st_size, desc=f"build-shards {path.name}", unit="B", unit_scale=True, disable=None
        ) as progress:
            for sample, num_bytes in read_samples(path):
                writer.add(sample)
                progress.update(num_bytes)
    manifest = writer.finish(lineage, {"request": request})
    samples, tokens, targets = (manifest.counts[name] for name in ("samples", "tokens", "target_tokens"))
    print(f"{args.output_path}: {samples:,} samples, {tokens:,} tokens, {targets:,} of them targets")


def _layout_and_lineage(paths: list[Path], model_path: Path | None) -> tuple[VocabLayout, dict[str, str]]:
    from beingvl.errors import InputError
    from beingvl.manifest import is_complete, join_lineages, read_manifest
    from beingvl.vocab import VocabLayout

    layout = VocabLayout.load(model_path) if model_path else None
    lineages = {str(model_path): read_manifest(model_path, "model").lineage} if model_path else {}
    for path in paths:
        if not path.is_file():
            raise InputError(f"{path} does not exist; make it with `beingvl tokenize`")
        if is_complete(path.parent):
            manifest = read_manifest(path.parent, "jsonl")
            lineages[str(path.parent)] = manifest.lineage
            layout = layout or VocabLayout.from_dict(manifest.details["layout"], f"{path.parent}/manifest.json")
    if layout is None:
        raise InputError(f"{paths[0]} has no manifest beside it: say with --model_path which vocabulary its ids belong to")
    return layout, {**join_lineages(lineages), "vocab": layout.fingerprint()}


def read_samples(path: Path) -> Iterator[tuple[Sample, int]]:
    """(sample, bytes of its line) for every line. Raises InputError that names file and line."""
    from beingvl.errors import InputError

    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                yield parse_row(line), len(line)
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                found = f"missing field {error}" if isinstance(error, KeyError) else str(error)
                raise InputError(
                    f"{path}, line {number}: not a token row ({found}); make the file again with `beingvl tokenize`"
                ) from error


def parse_row(line: bytes | str) -> Sample:
    """One JSONL line to a sample."""
    import json

    import numpy as np

    from beingvl.data.arrow_shards import Sample

    row = json.loads(line)
    image = row["token_image_new"] if row.get("token_image_new") is not None else row.get("token_image") or []
    input_ids = np.array([*row["token_0"], *image, *row["token_1"]], np.int64)
    if input_ids.size and (input_ids.min() < 0 or input_ids.max() >= 2**31):
        raise ValueError(f"token ids {input_ids.min()} … {input_ids.max()} are not 32-bit ids")
    spans = row.get("target_spans")
    if spans is None:
        spans = [(len(input_ids) - len(row["token_1"]), len(input_ids))]
    name = row.get("image") or ""
    return Sample(
        id=str(row["id"]),
        image=name if isinstance(name, str) else json.dumps(name),
        category=row.get("category") or "default",
        input_ids=input_ids.astype(np.int32),
        target_spans=np.array(spans, np.int32).reshape(-1, 2),
    )


if __name__ == "__main__":
    import sys

    from beingvl.cli import main

    sys.exit(main(["build-shards", *sys.argv[1:]]))
