"""What shards hold.

shard_folders    the folders behind a path
folder_parts     counts, sources, mixture, lengths, kinds, unused rows, examples of one folder
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from markupsafe import Markup

from beingvl.artefact.files import write_atomically
from beingvl.artefact.manifest import is_complete, join_lineages, read_manifest
from beingvl.data.arrow_shards import Sample, ShardReader
from beingvl.data.conversation import open_tokenizer
from beingvl.data.packing import PackingPlan
from beingvl.data.stage_data import data_of
from beingvl.errors import InputError
from beingvl.images.pictures import to_png
from beingvl.images.vqgan import VQGAN
from beingvl.report.kit import Parts, bars, facts, folded, image, page, sections, soft, table
from beingvl.report.vbpe import load_decoder
from beingvl.stage.stage_config import load_stage_config
from beingvl.vbpe.published import LegacyVisualBPE
from beingvl.vbpe.visual_bpe import VisualBPE
from beingvl.vocab import TOKEN_KINDS

INSTEAD = {
    "jsonl": "build shards of its files with `beingvl build-shards` and give those",
    "vq_codes": "give shards of samples that were tokenized with it; `beingvl report vbpe "
    "--codes` shows codes",
    "stage": "give the shards that it was trained on; `beingvl report train` shows a stage",
    "config": "give shards, and this file with --deepspeed_config",
}


@dataclass(frozen=True)
class DataOptions:
    """What a section about shards is made with. `vqgan` has a decoder; merged images need `vbpe`
    too. The tokenizer of `model_path` shows text. `stage` is a stage's JSON.
    """

    model_path: Path | None = None
    vqgan: VQGAN | None = None
    vbpe: VisualBPE | LegacyVisualBPE | None = None
    stage: Path | None = None
    sequence_length: int = 4096
    num_examples: int = 6


def report_data(
    shards: Sequence[Path],
    *,
    output_path: Path = Path("data_report.html"),
    model_path: Path | None = None,
    vbpe_path: Path | None = None,
    vq_path: Path | None = None,
    deepspeed_config: Path | None = None,
    sequence_length: int = 4096,
    num_examples: int = 6,
) -> Path:
    """Write a page about shard folders, or folders of them; returns its path.

    deepspeed_config: a stage's JSON, to show what its mixture draws. sequence_length: for the
    packing without a stage. num_examples: of each folder. Raises InputError for what is not a
    folder of shards, and for a VQ-GAN or vBPE that the shards were not made with.
    """
    for name, value in (("sequence_length", sequence_length), ("num_examples", num_examples)):
        if value < 1:
            raise InputError(f"--{name} is {value}, expected at least 1")
    options = DataOptions(
        model_path=model_path,
        vqgan=load_decoder(vq_path) if vq_path else None,
        vbpe=VisualBPE.load(vbpe_path) if vbpe_path else None,
        stage=deepspeed_config,
        sequence_length=sequence_length,
        num_examples=num_examples,
    )
    folders = [folder for path in shards for folder in shard_folders(path)]
    parts = {
        str(folder): sections(folder_parts(ShardReader(folder), options)) for folder in folders
    }
    write_atomically(output_path, page("Being-VL: data", parts))
    print(output_path)
    return output_path


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
        raise InputError(f"{path} is not a folder of shards; {INSTEAD[kind]}")
    return [path]


def folder_parts(shards: ShardReader, options: DataOptions) -> Parts:
    """Everything about one folder."""
    used = count_ids(shards)
    lengths = np.asarray(shards.lengths)
    parts = {
        "": folder_facts(shards, lengths, options),
        "Sources": sources_table(shards),
    }
    if options.stage:
        parts["Mixture"] = mixture_section(shards, options.stage)
    return parts | {
        "Lengths": histogram(lengths),
        "Kinds of tokens": kinds_of_tokens(used, shards),
        "New rows that never occur": coverage_table(used, shards),
        "Examples": examples(shards, options),
    }


def folder_facts(shards: ShardReader, lengths: np.ndarray, options: DataOptions) -> Markup:
    counts = shards.manifest.counts
    percentiles = np.percentile(lengths, (1, 25, 50, 75, 99)).astype(int)
    values = {
        "samples": f"{counts['samples']:,}",
        "tokens": f"{counts['tokens']:,}",
        "target tokens": f"{counts['target_tokens']:,}",
        "tokens in the longest sample": f"{counts['longest_sample_tokens']:,}",
        "lengths in tokens, percentiles 1, 25, 50, 75, 99": ", ".join(map(str, percentiles)),
    }
    length = options.sequence_length
    if options.stage:  # the mixture's section says it of the stage's own sequences
        pass
    elif lengths.max() > length:
        values[f"samples longer than {length}"] = f"{(lengths > length).sum():,}"
    else:
        plan = PackingPlan(lambda start, stop: lengths[start:stop], len(lengths), length)
        values[f"full: {plan.num_sequences:,} sequences of {length}"] = f"{plan.efficiency:.2%}"
    return facts(values)


def count_ids(shards: ShardReader) -> np.ndarray:
    """`[vocabulary]` int64: how often every id occurs."""
    total = np.zeros(shards.layout.size, np.int64)
    for ids in shards.all_ids():
        total += np.bincount(ids, minlength=len(total))
    return total


def sources_table(shards: ShardReader) -> Markup:
    counts = shards.manifest.counts
    rows = [
        (
            name,
            f"{entry['samples']:,}",
            f"{entry['samples'] / counts['samples']:.1%}",
            f"{entry['tokens'] / counts['tokens']:.1%}",
        )
        for name, entry in shards.manifest.details["sources"].items()
    ]
    return table(["source", "samples", "share of samples", "share of tokens"], rows)


def mixture_section(shards: ShardReader, config_path: Path) -> Markup:
    """What the run of a stage draws, in as many optimizer steps as it takes, and how full its
    sequences are. Raises InputError when the file is not a stage's JSON, or does not fit the
    shards.
    """
    config = load_stage_config(config_path)
    block, data = config.beingvl, data_of(config, shards)
    steps = min(data.num_steps, block.max_steps or data.num_steps)
    rows = [
        (
            name,
            f"{block.mixture.get(name, 0):g}",
            f"{share.samples:,}",
            f"{share.share_of_samples:.3%}",
            f"{share.share_of_tokens:.3%}",
            f"{share.samples / len(members):.2f}",
        )
        for (name, share), members in zip(
            data.realised_shares(steps).items(), shards.members, strict=True
        )
    ]
    head = ["source", f"weight, by {block.mixture_by}", "samples drawn", "share of samples"]
    head += ["share of tokens", "times through it"]
    fact = (
        f"{steps:,} steps of {config.sequences_per_step:,} sequences of "
        f"{block.sequence_length:,} tokens, which are {data.plan.efficiency:.2%} full"
    )
    return soft(fact) + table(head, rows)


def histogram(lengths: np.ndarray) -> Markup:
    counts, edges = np.histogram(lengths, bins=min(16, max(1, int(np.ptp(lengths)))))
    names = [f"from {edge:.0f} tokens" for edge in edges[:-1]]
    return bars(dict(zip(names, counts.tolist(), strict=True)))


def kinds_of_tokens(used: np.ndarray, shards: ShardReader) -> Markup:
    kinds = shards.layout.token_kinds(np.arange(len(used)))
    counts = np.bincount(kinds, weights=used, minlength=len(TOKEN_KINDS)).astype(int)
    return bars(dict(zip(TOKEN_KINDS, counts.tolist(), strict=True)))


def coverage_table(used: np.ndarray, shards: ShardReader) -> Markup:
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
        rows.append((name, f"{stop - start:,}", f"{len(never):,}", shortened(ranges_of(never))))
    return table(["rows", "in the vocabulary", "never occur", "their ids"], rows, "words")


def ranges_of(ids: np.ndarray) -> list[str]:
    """Ascending ids in words: 1, 2, 3, 7 become `1 to 3` and `7`."""
    runs = np.split(ids, np.flatnonzero(np.diff(ids) > 1) + 1) if len(ids) else []
    return [f"{run[0]} to {run[-1]}" if len(run) > 1 else str(run[0]) for run in runs]


def shortened(words: list[str], shown: int = 6) -> str:
    """All words; those behind the first few are shown on demand."""
    first, rest = ", ".join(words[:shown]), ", ".join(words[shown:])
    return folded(f"{first} …", rest) if rest else first


# ---- examples ----


def examples(shards: ShardReader, options: DataOptions) -> Markup:
    """Some samples with their text and images. Raises InputError for a VQ-GAN or vBPE that the
    shards were not made with.
    """
    lineages = {str(shards.folder): shards.manifest.lineage}
    if options.vqgan is not None:
        lineages["the VQ-GAN"] = {"vqgan": options.vqgan.fingerprint()}
    if options.vbpe is not None:
        own = {"vbpe": options.vbpe.fingerprint()}
        lineages[options.vbpe.source] = {**options.vbpe.lineage, **own}
    join_lineages(lineages)
    rows = []
    for index in spread_over_sources(shards.members, options.num_examples):
        sample = shards[index]
        pictures = [picture_of(ids, options) for ids in images_of(sample.input_ids, shards)]
        shown = Markup("").join(image(to_png(pixels)) for pixels in pictures if pixels is not None)
        text = text_of(sample, shards, options.model_path)
        rows.append((shown, sample.id, sample.category, text))
    header = "text" if options.model_path else "text ids (--model_path shows them as text)"
    return table(["image", "id", "source", header], rows, "words")


def spread_over_sources(members: Sequence[np.ndarray], count: int) -> list[int]:
    """At most `count` samples, of every source in turn, evenly over the source's own (`members`:
    sample numbers of each).
    """
    shares = [0] * len(members)
    # The smallest first: what it lacks, the others have.
    for source in sorted(range(len(members)), key=lambda source: len(members[source])):
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


def images_of(ids: np.ndarray, shards: ShardReader) -> list[np.ndarray]:
    """The image ids of every image of a sample: between two images there is always another
    token.
    """
    is_image = shards.layout.is_image_token(ids)
    runs = np.split(np.arange(len(ids)), np.flatnonzero(np.diff(is_image)) + 1)
    return [shards.layout.token_to_image_ids(ids[run]) for run in runs if is_image[run[0]]]


def picture_of(image_ids: np.ndarray, options: DataOptions) -> np.ndarray | None:
    """The picture of one image's ids `[n]`; None when they are not exactly one grid, or merged by
    an unknown vBPE.
    """
    if options.vqgan is None:
        return None
    height, width = options.vqgan.grid
    vbpe = options.vbpe
    if len(image_ids) == height * width and image_ids.max() < options.vqgan.num_codes:
        grid = image_ids.reshape(height, width)
    elif (
        isinstance(vbpe, VisualBPE)
        and image_ids.max() < vbpe.num_ids
        and vbpe.sizes[image_ids].sum() == height * width
    ):
        grid = vbpe.decode(image_ids, height, width)
    else:
        return None
    return options.vqgan.decode(grid[None])[0]


def text_of(sample: Sample, shards: ShardReader, model_path: Path | None) -> str:
    """The sample's text; without a tokenizer its first ids."""
    ids = sample.input_ids[~shards.layout.is_image_token(sample.input_ids)]
    if model_path is None:
        return " ".join(map(str, ids[:40].tolist()))
    return open_tokenizer(model_path).decode(ids.tolist(), skip_special_tokens=False)
