"""A page about the contents of shards.

shard_folders    the shard folders for a path
data_section     one folder's counts, sources, mixture, lengths, kinds, unused rows, examples
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from beingvl.artefact.files import write_atomically
from beingvl.artefact.manifest import is_complete, join_lineages, read_manifest
from beingvl.artefact.progress import progress
from beingvl.data.arrow_shards import ShardReader
from beingvl.data.conversation import open_tokenizer
from beingvl.data.packing import PackingPlan
from beingvl.data.shard_columns import Sample
from beingvl.data.stage_data import data_of
from beingvl.errors import InputError, check_at_least
from beingvl.images.vqgan import VQGAN
from beingvl.report.kit import page, render
from beingvl.report.vbpe import load_decoder
from beingvl.stage.mixture import fit_mixture
from beingvl.stage.stage_config import StageConfig, load_stage_config
from beingvl.vbpe.published import LegacyVisualBPE
from beingvl.vbpe.visual_bpe import VisualBPE
from beingvl.vocab import TOKEN_KINDS

INSTEAD = {
    "jsonl": "build shards of its files with `beingvl build-shards` and give those",
    "vq_codes": "give shards of samples that were tokenized with it; `beingvl report vbpe "
    "--codes` shows codes",
    "stage": "give the shards that it was trained on; `beingvl report train` shows a stage",
    "config": "give shards, and this file with --config",
}


@dataclass(frozen=True)
class DataOptions:
    """Inputs of a section about shards. `vqgan` has a decoder; merged images also need `vbpe`. The
    tokenizer in `model_path` decodes text.
    """

    model_path: Path | None = None
    vqgan: VQGAN | None = None
    vbpe: VisualBPE | LegacyVisualBPE | None = None
    stage: StageConfig | None = None
    sequence_length: int = 4096
    num_examples: int = 6


def report_data(
    shards: Sequence[Path | str],
    *,
    output_path: Path | str = "data_report.html",
    model_path: Path | str | None = None,
    vbpe_path: Path | str | None = None,
    vq_path: Path | str | None = None,
    deepspeed_config: Path | str | None = None,
    overrides: Sequence[str] = (),
    sequence_length: int = 4096,
    num_examples: int = 6,
) -> Path:
    """Write a page about shard folders, or folders that contain them; returns its path.

    deepspeed_config: a stage's JSON, to show what its mixture draws; `overrides` (KEY=VALUE) change
    its keys. sequence_length: for packing without a stage. num_examples: per folder. Raises
    InputError for anything but shards, and for a VQ-GAN or vBPE that the shards were not made with.
    """
    check_at_least(1, sequence_length=sequence_length, num_examples=num_examples)
    folders = [folder for path in shards for folder in shard_folders(Path(path))]
    options = DataOptions(
        model_path=Path(model_path) if model_path else None,
        vqgan=load_decoder(vq_path) if vq_path else None,
        vbpe=VisualBPE.load(vbpe_path, _num_codes(folders)) if vbpe_path else None,
        stage=load_stage_config(deepspeed_config, overrides) if deepspeed_config else None,
        sequence_length=sequence_length,
        num_examples=num_examples,
    )
    body = Markup("").join(
        Markup("<h2>{}</h2>{}").format(folder, data_section(ShardReader(folder), options))
        for folder in folders
    )
    target = Path(output_path)
    write_atomically(target, page("Being-VL: data", body))
    print(target)
    return target


def _num_codes(folders: Sequence[Path]) -> int | None:
    return ShardReader(folders[0]).layout.num_vq if folders else None


def shard_folders(path: Path) -> list[Path]:
    """`path`, or the shard folders in it. Raises InputError that says what to give instead."""
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


def data_section(shards: ShardReader, options: DataOptions, level: int = 3) -> Markup:
    """Everything about one folder, with headings of `level`. Raises InputError for a VQ-GAN or vBPE
    that the shards were not made with.
    """
    used, lengths = count_ids(shards), np.asarray(shards.lengths)
    kinds = shards.layout.token_kinds(np.arange(len(used)))
    of_kinds = np.bincount(kinds, weights=used, minlength=len(TOKEN_KINDS)).astype(int)
    bins = min(16, max(1, int(np.ptp(lengths))))
    of_lengths, edges = np.histogram(lengths, bins=bins)
    return render(
        "data.html",
        level=level,
        shards=shards,
        percentiles=np.percentile(lengths, (1, 25, 50, 75, 99)).astype(int),
        packing=None if options.stage else packing(lengths, options.sequence_length),
        mixture=drawn_by_stage(shards, options.stage) if options.stage else None,
        lengths={
            f"from {edge:.0f} tokens": int(count)
            for edge, count in zip(edges[:-1], of_lengths, strict=True)
        },
        kinds=dict(zip(TOKEN_KINDS, of_kinds.tolist(), strict=True)),
        coverage=coverage(used, shards),
        examples=examples(shards, options),
        has_tokenizer=options.model_path is not None,
    )


def count_ids(shards: ShardReader) -> np.ndarray:
    """`[vocabulary]` int64: how often every id occurs."""
    total = np.zeros(shards.layout.size, np.int64)
    what: Any = {"unit": "shard", "total": len(shards.manifest.details["rows"])}
    for ids in progress(shards.all_ids(), name="count ids", **what, leave=False):
        total += np.bincount(ids, minlength=len(total))
    return total


def packing(lengths: np.ndarray, sequence_length: int) -> str:
    if lengths.max() > sequence_length:
        return f"{(lengths > sequence_length).sum()} samples are longer than {sequence_length}"
    plan = PackingPlan(lambda start, stop: lengths[start:stop], len(lengths), sequence_length)
    return f"{plan.num_sequences:,} sequences of {sequence_length}, {plan.efficiency:.2%} full"


def drawn_by_stage(shards: ShardReader, config: StageConfig) -> dict[str, Any]:
    """What a stage's mixture draws over all its optimizer steps. Raises InputError if it does not
    fit the shards.
    """
    config, note = fit_mixture(config, shards.manifest)
    data = data_of(config, shards)
    steps = min(data.num_steps, config.beingvl.max_steps or data.num_steps)
    words = (
        f"{steps:,} steps of {config.sequences_per_step:,} sequences of "
        f"{config.beingvl.sequence_length:,} tokens, which are {data.plan.efficiency:.2%} full"
    )
    if data.plan.num_sequences < config.sequences_per_step:
        words = (
            f"{data.plan.num_sequences:,} sequences, fewer than the {config.sequences_per_step:,} "
            "of one step: training would refuse them"
        )
    words += note and f"; {note}"
    return {"words": words, "block": config.beingvl, "shares": data.realised_shares(steps)}


def coverage(used: np.ndarray, shards: ShardReader) -> dict[str, tuple[int, int, list[str]]]:
    """Group of vocabulary rows -> their number, how many never occur, and which ones."""
    layout = shards.layout
    ranges = {
        "specials": (layout.num_text, layout.first_image_id),
        "VQ codes": (layout.first_image_id, layout.first_vbpe_id),
        "vBPE ids": (layout.first_vbpe_id, layout.size),
        "all new rows": (layout.num_text, layout.size),
    }
    found = {}
    for name, (start, stop) in ranges.items():
        never = start + np.flatnonzero(used[start:stop] == 0)
        found[name] = (stop - start, len(never), ranges_of(never))
    return found


def ranges_of(ids: np.ndarray) -> list[str]:
    """Ascending ids as ranges: 1, 2, 3, 7 become `1 to 3` and `7`."""
    runs = np.split(ids, np.flatnonzero(np.diff(ids) > 1) + 1) if len(ids) else []
    return [f"{run[0]} to {run[-1]}" if len(run) > 1 else str(run[0]) for run in runs]


# ---- examples ----


def examples(
    shards: ShardReader, options: DataOptions
) -> list[tuple[Sample, str, list[np.ndarray]]]:
    """Some samples with their text and images."""
    lineages = {str(shards.folder): shards.manifest.lineage}
    if options.vqgan is not None:
        lineages["the VQ-GAN"] = {"vqgan": options.vqgan.fingerprint()}
    if options.vbpe is not None:
        own = {"vbpe": options.vbpe.fingerprint()}
        lineages[options.vbpe.source] = {**options.vbpe.lineage, **own}
    join_lineages(lineages)
    shown = []
    for index in spread_over_sources(shards.members, options.num_examples):
        sample = shards[index]
        pictures = [picture_of(ids, options) for ids in images_of(sample.input_ids, shards)]
        known = [picture for picture in pictures if picture is not None]
        shown.append((sample, text_of(sample, shards, options.model_path), known))
    return shown


def spread_over_sources(members: Sequence[np.ndarray], count: int) -> list[int]:
    """At most `count` samples, shared out among the sources (`members`), evenly spread in each."""
    shares = [0] * len(members)
    # Smallest first: larger sources make up for what it lacks.
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
    """The ids of each image in a sample; there is always a non-image token between two images."""
    is_image = shards.layout.is_image_token(ids)
    runs = np.split(np.arange(len(ids)), np.flatnonzero(np.diff(is_image)) + 1)
    return [shards.layout.token_to_image_ids(ids[run]) for run in runs if is_image[run[0]]]


def picture_of(image_ids: np.ndarray, options: DataOptions) -> np.ndarray | None:
    """The picture for an image's ids `[n]`; None if they form no grid, or need a vBPE not given."""
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
    """The sample's text, or its first ids if there is no tokenizer."""
    ids = sample.input_ids[~shards.layout.is_image_token(sample.input_ids)]
    if model_path is None:
        return " ".join(map(str, ids[:40].tolist()))
    tokenizer, layout = open_tokenizer(model_path), shards.layout
    text = tokenizer.decode(ids.tolist(), skip_special_tokens=False)
    roles = {"bos": layout.bos_id, "eos": layout.eos_id, "separator": layout.sep_id}
    roles |= {"image": layout.boi_id, "end of image": layout.eoi_id}
    for role, token_id in roles.items():
        text = text.replace(tokenizer.decode([token_id], skip_special_tokens=False), f" [{role}] ")
    return " ".join(text.split())
