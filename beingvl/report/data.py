"""What shards hold, as one self-contained HTML page.

    beingvl report data shards/… --output_path page.html [--deepspeed_config stage1.json] [--vq_path
    vqgan/ --vbpe_path vbpe/]

Counts, lengths, packing efficiency, the histogram of token kinds, which of the new rows never
occur, and decoded examples; with a stage's JSON what its mixture draws; with a VQ-GAN that has a
decoder, and the vBPE they were made with, the examples' images too. A folder that holds folders of
shards, as `beingvl tokenize --format arrow` writes it, stands for all of them.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from beingvl.artefact.files import write_atomically
from beingvl.artefact.manifest import is_complete, join_lineages, read_manifest
from beingvl.data.arrow_shards import Sample, ShardReader
from beingvl.data.conversation import open_tokenizer
from beingvl.data.loader import TrainingData, open_mixture
from beingvl.data.packing import PackingPlan
from beingvl.errors import InputError
from beingvl.images.vqgan_pictures import Pictures
from beingvl.vocab import TOKEN_KINDS

STYLE = """
:root { color-scheme: light dark; --ink: #1f2328; --soft: #59636e; --line: #d1d9e0; --paper: #fff; --bar: #4c8eda }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --soft: #9198a1; --line: #3d444d; --paper: #0d1117 } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper) }
body { max-width: 62rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.6rem } h2 { font-size: 1.15rem; margin-top: 2rem } p { color: var(--soft) }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
td, th { padding: .3rem 1.2rem .3rem 0; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top }
.bar { background: var(--bar); height: .8rem; min-width: 1px }
"""
# not in STYLE, for pages that show these tables in a style of their own
IMAGE_STYLE = "width: 8rem; image-rendering: pixelated"


def run(args: argparse.Namespace) -> None:
    for name in ("sequence_length", "num_examples"):
        if getattr(args, name) < 1:
            raise InputError(f"--{name} is {getattr(args, name)}, expected at least 1")
    folders = [folder for path in args.shards for folder in shard_folders(path)]
    body = "".join(folder_section(ShardReader(folder), args) for folder in folders)
    head = (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'><title>Being-VL: "
        f"data</title><style>{STYLE}</style></head>"
    )
    write_atomically(args.output_path, f"{head}<body><h1>Being-VL: data</h1>{body}</body></html>\n")
    print(args.output_path)


INSTEAD = {
    "jsonl": "build shards of its files with `beingvl build-shards` and give those",
    "vq_codes": "give shards of samples that were tokenized with it; `beingvl report vbpe "
    "--codes` shows codes",
    "stage": "give the shards that it was trained on; `beingvl report train` shows a stage",
    "config": "give shards, and this file with --deepspeed_config",
}


def shard_folders(path: Path) -> list[Path]:
    """`path`, or the shard folders in it. Raises InputError that says what to give in its place."""
    kind = read_manifest(path).kind if is_complete(path) else None
    if kind is None and path.is_file():
        kind = {".jsonl": "jsonl", ".json": "config"}.get(path.suffix)
    elif kind is None and (path / "metrics.jsonl").is_file():
        kind = "stage"
    if kind in (None, "jsonl") and path.is_dir():
        inside = [
            folder
            for folder in sorted(path.iterdir())
            if is_complete(folder) and read_manifest(folder).kind == "shards"
        ]
        if inside:
            return inside
    if kind in INSTEAD:
        raise InputError(f"{path} is no folder of shards; {INSTEAD[kind]}")
    return [path]


def folder_section(shards: ShardReader, args: argparse.Namespace) -> str:
    """Everything about one folder, as HTML."""
    used = count_ids(shards)
    lengths = np.asarray(shards.lengths)
    counts = shards.manifest.counts
    percentiles = ", ".join(f"{int(np.percentile(lengths, p))}" for p in (1, 25, 50, 75, 99))
    facts = [("samples", f"{counts['samples']:,}"), ("tokens", f"{counts['tokens']:,}")]
    facts += [
        ("target tokens", f"{counts['target_tokens']:,}"),
        ("longest sample", f"{counts['longest_sample_tokens']:,} tokens"),
    ]
    facts += [("lengths in tokens, percentiles 1, 25, 50, 75, 99", percentiles)]
    if not args.deepspeed_config:  # else the mixture's section says it of the stage's own sequences
        facts += [("packing", packing_fact(lengths, args.sequence_length))]
    parts = [
        f"<h2>{escape(str(shards.folder))}</h2>",
        table([], facts),
        "<h2>Sources</h2>",
        sources_table(shards),
    ]
    if args.deepspeed_config:
        parts += ["<h2>Mixture</h2>", mixture_section(shards, args.deepspeed_config)]
    parts += [
        "<h2>Lengths</h2>",
        histogram(lengths),
        "<h2>Kinds of tokens</h2>",
        kinds_table(used, shards),
    ]
    parts += [
        "<h2>New rows that never occur</h2>",
        coverage_table(used, shards),
        "<h2>Examples</h2>",
        examples(shards, args),
    ]
    return "".join(parts)


def count_ids(shards: ShardReader) -> np.ndarray:
    """`[vocabulary]` int64: how often every id occurs."""
    total = np.zeros(shards.layout.size, np.int64)
    for ids in shards.all_ids():
        total += np.bincount(ids, minlength=len(total))
    return total


def packing_fact(lengths: np.ndarray, sequence_length: int) -> str:
    if lengths.max() > sequence_length:
        return f"{int((lengths > sequence_length).sum())} samples are longer than {sequence_length}"
    plan = PackingPlan(lambda start, stop: lengths[start:stop], len(lengths), sequence_length)
    return f"{plan.num_sequences:,} sequences of {sequence_length}, {plan.efficiency:.2%} full"


def table(head: list[str], rows: list[Any]) -> str:
    top = f"<tr>{''.join(f'<th>{escape(name)}</th>' for name in head)}</tr>" if head else ""
    return f"<table>{top}{''.join('<tr>' + ''.join(f'<td>{cell}</td>' for cell in row) + '</tr>' for row in rows)}</table>"


def sources_table(shards: ShardReader) -> str:
    counts = shards.manifest.counts
    rows = [
        (
            escape(name),
            f"{e['samples']:,}",
            f"{e['samples'] / counts['samples']:.1%}",
            f"{e['tokens'] / counts['tokens']:.1%}",
        )
        for name, e in shards.manifest.details["sources"].items()
    ]
    return table(["source", "samples", "share of samples", "share of tokens"], rows)


def mixture_section(shards: ShardReader, config_path: Path) -> str:
    """What the run of a stage draws, in as many optimizer steps as it takes, and how full its
    sequences are.

    Raises InputError when the file is no stage's JSON, or does not fit the shards.
    """
    try:
        config = json.loads(config_path.read_text())
        stage, per_step = config["beingvl"], int(config["train_batch_size"])
        weights, epochs, length = (
            dict(stage["mixture"]),
            float(stage["epochs"]),
            int(stage["sequence_length"]),
        )
    except (ValueError, KeyError, TypeError) as error:
        expected = "train_batch_size and beingvl's mixture, epochs and sequence_length"
        raise InputError(
            f"{config_path} is not a stage's JSON with {expected} ({error!r})"
        ) from error
    by = stage.get("mixture_by", "samples")
    mixture = open_mixture(shards, weights, by, stage.get("seed", 0))
    num_samples = round(epochs * mixture.num_samples)
    data = TrainingData(
        shards, mixture, num_samples, length, per_step, packing=stage.get("packing", True)
    )
    steps = min(data.num_steps, stage.get("max_steps") or data.num_steps)
    rows = [
        (
            escape(name),
            f"{weights.get(name, 0):g}",
            f"{share.samples:,}",
            f"{share.share_of_samples:.3%}",
            f"{share.share_of_tokens:.3%}",
            f"{share.samples / len(shards.members[n]):.2f}",
        )
        for n, (name, share) in enumerate(data.realised_shares(steps).items())
    ]
    head = [
        "source",
        f"weight, by {by}",
        "samples drawn",
        "share of samples",
        "share of tokens",
        "times through it",
    ]
    fact = (
        f"{steps:,} steps of {per_step:,} sequences of {length:,} tokens, which are "
        f"{data.plan.efficiency:.2%} full"
    )
    return f"<p>{fact}</p>{table(head, rows)}"


def bars(rows: list[tuple[str, int]]) -> str:
    largest = max(1, *(count for _, count in rows))
    shown = [
        (
            name,
            f"{n:,}",
            f"<div class='bar' style='width:{20 * n / largest:.2f}rem'></div>" if n else "",
        )
        for name, n in rows
    ]
    return table([], shown)


def histogram(lengths: np.ndarray) -> str:
    counts, edges = np.histogram(lengths, bins=min(16, max(1, int(np.ptp(lengths)))))
    return bars(
        [
            (f"from {edge:.0f} tokens", int(count))
            for edge, count in zip(edges, counts, strict=False)
        ]
    )


def kinds_table(used: np.ndarray, shards: ShardReader) -> str:
    kinds = np.bincount(
        shards.layout.token_kinds(np.arange(len(used))), weights=used, minlength=len(TOKEN_KINDS)
    )
    return bars([(name, int(count)) for name, count in zip(TOKEN_KINDS, kinds, strict=True)])


def coverage_table(used: np.ndarray, shards: ShardReader) -> str:
    layout = shards.layout
    ranges = {
        "specials": (layout.num_text, layout.first_image_id),
        "VQ codes": (layout.first_image_id, layout.first_vbpe_id),
        "vBPE ids": (layout.first_vbpe_id, layout.size),
        "all new rows": (layout.num_text, layout.size),
    }
    rows = []
    for name, (start, stop) in ranges.items():
        never = start + np.flatnonzero(used[start:stop] == 0)
        rows.append((name, f"{stop - start:,}", f"{len(never):,}", folded(ranges_of(never))))
    return table(["rows", "in the vocabulary", "never occur", "their ids"], rows)


def ranges_of(ids: np.ndarray) -> list[str]:
    """Ascending ids in words: 1, 2, 3, 7 become `1 to 3` and `7`."""
    runs = np.split(ids, np.flatnonzero(np.diff(ids) > 1) + 1) if len(ids) else []
    return [f"{run[0]} to {run[-1]}" if len(run) > 1 else str(run[0]) for run in runs]


def folded(words: list[str], shown: int = 6) -> str:
    """All words; those behind the first few are shown on demand."""
    first, rest = ", ".join(words[:shown]), ", ".join(words[shown:])
    return f"<details><summary>{first} …</summary>{rest}</details>" if rest else first


def images_of(ids: np.ndarray, shards: ShardReader) -> list[np.ndarray]:
    """The image ids of every image of a sample: between two images there is always another
    token.
    """
    is_image = shards.layout.is_image_token(ids)
    runs = np.split(np.arange(len(ids)), np.flatnonzero(np.diff(is_image)) + 1)
    return [shards.layout.token_to_image_ids(ids[run]) for run in runs if is_image[run[0]]]


def examples(shards: ShardReader, args: argparse.Namespace) -> str:
    """Some samples with their text and images. Raises InputError for a VQ-GAN or vBPE that the
    shards were not made with.
    """
    pictures = Pictures(args.vq_path, args.vbpe_path)
    join_lineages({str(shards.folder): shards.manifest.lineage, **pictures.lineages})
    rows = []
    for index in spread_over_sources(shards.members, args.num_examples):
        sample = shards[index]
        urls = [pictures.data_url(image_ids) for image_ids in images_of(sample.input_ids, shards)]
        shown = "".join(f"<img alt='' style='{IMAGE_STYLE}' src='{url}'>" for url in urls if url)
        rows.append(
            (
                shown,
                escape(sample.id),
                escape(sample.category),
                escape(text_of(sample, shards, args.model_path)),
            )
        )
    header = "text" if args.model_path else "text ids (--model_path shows them as text)"
    return table(["image", "id", "source", header], rows)


def spread_over_sources(members: Sequence[np.ndarray], count: int) -> list[int]:
    """At most `count` samples, of every source in turn, evenly over the source's own (`members`:
    sample numbers of each).
    """
    shares = [0] * len(members)
    for source in sorted(
        range(len(members)), key=lambda source: len(members[source])
    ):  # what a small one lacks, others have
        num_left = sum(
            share == 0 and len(own) > 0 for share, own in zip(shares, members, strict=True)
        )
        shares[source] = min(len(members[source]), -(-(count - sum(shares)) // max(1, num_left)))
    spread = [
        own[np.linspace(0, len(own) - 1, share).astype(int)]
        for own, share in zip(members, shares, strict=True)
        if share
    ]
    return sorted(int(index) for own in spread for index in own)


def text_of(sample: Sample, shards: ShardReader, model_path: Path | None) -> str:
    """The sample's text; without a tokenizer its first ids."""
    ids = sample.input_ids[~shards.layout.is_image_token(sample.input_ids)]
    if model_path is None:
        return " ".join(map(str, ids[:40].tolist()))
    return open_tokenizer(model_path).decode(ids.tolist(), skip_special_tokens=False)
