"""[2] VQ codes -> vbpe/: learn which neighbouring codes to merge.

    open_codes      folders and files, memory-mapped                      [N, H, W] each
    count_codes     how often each code occurs; checks every code         int64 [num_codes]
    sample_images   all images, or --max_images of them
    Trainer.learn   the merges, in batches, each followed by progress     int32 [R, 4]
    _judge          finds on held-out images where more merges stop paying off; `auto` stops there
    Output          vbpe.json, and its manifest if it has a folder of its own

The vocabulary is a pure function of codes and options.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np

from beingvl.artefact.files import make_folder
from beingvl.artefact.hashes import hash_file
from beingvl.artefact.manifest import (
    MANIFEST_FILE,
    already_made,
    is_complete,
    join_lineages,
    start_folder,
    write_manifest,
)
from beingvl.artefact.owner import OWNER, owned
from beingvl.artefact.progress import progress as show_progress
from beingvl.artefact.request import Request
from beingvl.errors import InputError, check_at_least
from beingvl.vbpe.code_files import (
    Codes,
    count_codes,
    hold_out,
    open_codes,
    sample_images,
)
from beingvl.vbpe.compression import Compression, count_used
from beingvl.vbpe.grids import MAX_IDS
from beingvl.vbpe.published import LegacyVisualBPE, import_published
from beingvl.vbpe.trainer import Trainer
from beingvl.vbpe.vbpe_file import VBPE_FILE
from beingvl.vbpe.visual_bpe import AnyVBPE, VisualBPE

MOST_MERGES = 8192  # the maximum for `auto`, and the default
REPORT_FOLDER = "vbpe_report"  # default output of `beingvl report vbpe`


def train_vbpe(
    data_path: Path | str | Sequence[Path | str],
    output_path: Path | str,
    *,
    num_merges: int | Literal["auto"] = MOST_MERGES,
    alpha: float = 0.3,
    sigma: float = 1.0,
    min_count: int = 2,
    init_size: int | None = None,
    vocab_pad: int = 0,
    vocab_end: int | None = None,
    grid: Sequence[int] | None = None,
    max_images: int | None = None,
    seed: int = 0,
    held_out: Sequence[Path | str] = (),
    validate_data: bool = False,
    save_intermediate: int | None = None,
    overwrite: bool = False,
) -> VisualBPE:
    """Learn a vBPE vocabulary and write it; a finished folder of the same codes and options is
    reused.

    Args:
        data_path: folders written by `encode_images`, .npy files, or folders of .npy files.
        output_path: a folder for vbpe.json and its manifest, or FILE.json without a manifest.
        num_merges: merges to learn; fewer if no more pairs occur `min_count` times. "auto" learns
            up to 8192 and keeps those that pay off on held-out images (compression.py).
        alpha: weight of spatial consistency relative to frequency; 0 means frequency alone.
        sigma: how far apart, in cells, a pair's offsets may be and still count as similar.
        init_size: number of codes (None: the folder's, else the largest code + 1).
        vocab_pad, vocab_end: files hold code + vocab_pad, below vocab_end.
        grid: (height, width) of files `[N, H * W]` (None: square).
        max_images, seed: learn from a sample.
        held_out: codes of different images, to measure on; "auto" without them holds out every 20th
            image.
        save_intermediate: number of merges between saves; the same call continues from the last.
    """
    most = MOST_MERGES if num_merges == "auto" else num_merges
    check_at_least(0, num_merges=most, alpha=alpha, seed=seed, vocab_pad=vocab_pad)
    check_at_least(
        1, min_count=min_count, max_images=max_images, save_intermediate=save_intermediate
    )
    if not 0 < sigma < math.inf:
        raise InputError(f"--sigma is {sigma}, expected more than 0")
    paths = [data_path] if isinstance(data_path, Path | str) else data_path
    codes = open_codes([Path(path) for path in paths], init_size, vocab_pad, vocab_end, grid)
    if codes.num_codes + most > MAX_IDS:
        found = f"--num_merges {most} and {codes.num_codes} codes"
        raise InputError(f"{found}, expected at most {MAX_IDS} together")
    options: dict[str, Any] = {"alpha": float(alpha), "sigma": float(sigma), "min_count": min_count}
    options |= {"max_images": max_images, "seed": seed}
    request = Request(codes=codes.hashes, num_codes=codes.num_codes, vocab_pad=vocab_pad)
    request |= {"lineage": codes.lineage, "num_merges": num_merges, **options, "grid": grid}
    others = _open_held_out(held_out, codes, grid)
    if others:
        request |= {"held_out": others.hashes}
    output = Output(Path(output_path), request)
    with output.making(overwrite) as is_new:
        if not is_new:
            return cast(VisualBPE, VisualBPE.load(output.file))
        usage = count_codes(codes)
        arrays, held = _choose_images(codes, others, options, holds_out=num_merges == "auto")
        output.prepare()
        if validate_data:
            _print_data(codes, usage)
        vbpe = _learn(arrays, codes, output, most, options, save_intermediate)
        if vbpe.num_merges < most:
            print(
                f"{vbpe.num_merges} merges instead of {most}: no other pair occurs {min_count} "
                "times (--min_count)"
            )
        vbpe = _judge(vbpe, held, arrays, num_merges == "auto")
        output.write(vbpe)
    _print_result(vbpe, usage, output.file)
    return vbpe


def import_vbpe(
    pickle_path: Path | str,
    output_path: Path | str,
    *,
    init_size: int | None = None,
    vocab_pad: int = 0,
    overwrite: bool = False,
) -> LegacyVisualBPE:
    """Convert a published pickled vocabulary to vbpe.json; see `train_vbpe` for the arguments."""
    vbpe = import_published(pickle_path, init_size, vocab_pad or None)
    request = Request(import_pkl=hash_file(Path(pickle_path)), init_size=init_size)
    output = Output(Path(output_path), request | {"vocab_pad": vbpe.parameters["vocab_pad"]})
    with output.making(overwrite) as is_new:
        if not is_new:
            return vbpe
        output.prepare()
        output.write(vbpe)
        found = f"published vocabulary of {vbpe.num_codes} codes and {vbpe.num_merges} merges"
        print(f"{output.file}: {found} (legacy: it cannot be decoded)")
    return vbpe


class Output:
    """Where the vocabulary goes: a folder of its own with a manifest, or one `.json` file."""

    def __init__(self, path: Path, request: Mapping[str, Any]) -> None:
        self.folder = None if path.suffix == ".json" else path
        self.file = path / VBPE_FILE if self.folder else path
        if self.folder and path.is_file():
            raise InputError(
                f"{path} is a file, expected a folder to write {VBPE_FILE} in; choose another name"
            )
        self.partial = self.file.with_suffix(".partial.json")
        self._request = request

    @contextmanager
    def making(self, overwrite: bool) -> Iterator[bool]:
        """Own the output and yield True, or yield False if there is nothing to do."""
        if self._is_made(overwrite):
            yield False
            return
        name = OWNER if self.folder else f".{self.file.name}{OWNER}"
        with owned(self.folder or self.file.parent, name=name):
            yield not self._is_made(overwrite)  # another process may have finished it just now

    def _is_made(self, overwrite: bool) -> bool:
        """Whether there is nothing to do. Raises InputError if something would be overwritten."""
        if self.folder is None:
            if self.file.is_dir() or is_complete(self.file.parent):
                found = "is a folder" if self.file.is_dir() else "is in a folder with a manifest"
                raise InputError(f"{self.file} {found}; choose another name")
            if self.file.exists() and not overwrite:
                raise InputError(f"{self.file} exists; choose another name or add --overwrite")
            return False
        ours = (self.file.name, self.partial.name, MANIFEST_FILE, REPORT_FOLDER)
        for path in sorted(self.folder.glob("*")):
            if path.name not in ours and path.suffix != ".tmp":
                raise InputError(
                    f"{self.folder} holds {path.name!r} too; give vBPE a folder of its own, or a "
                    "file: --output FILE.json"
                )
        if self.file.exists() and not is_complete(self.folder) and not overwrite:
            raise InputError(
                f"{self.folder} holds a vocabulary without a manifest; choose another folder or "
                "add --overwrite"
            )
        return already_made(self.folder, "vbpe", self._request, overwrite)

    def prepare(self) -> None:
        """Prepare the output, once the inputs are known to be good."""
        if self.folder:
            start_folder(self.folder, "vbpe")
            # It describes the previous vocabulary.
            shutil.rmtree(self.folder / REPORT_FOLDER, ignore_errors=True)
        else:
            make_folder(self.file.parent)

    def write(self, vbpe: AnyVBPE) -> None:
        vbpe.save(self.file)
        self.partial.unlink(missing_ok=True)
        if self.folder:
            counts = {"codes": vbpe.num_codes, "merges": vbpe.num_merges}
            write_manifest(self.folder, "vbpe", counts, vbpe.lineage, {"request": self._request})
            if self.folder.suffix:
                print(f"{self.folder} is a folder that holds {VBPE_FILE}: give it as --vbpe")


# ---- images ----


def _open_held_out(
    paths: Sequence[Path | str], codes: Codes, grid: Sequence[int] | None
) -> Codes | None:
    if not paths:
        return None
    files = [Path(path) for path in paths]
    others = open_codes(files, codes.num_codes, codes.pad, grid=grid)
    join_lineages({"--codes": codes.lineage, "--held_out": others.lineage})
    return others


def _choose_images(
    codes: Codes, others: Codes | None, options: Mapping[str, Any], holds_out: bool
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """The images to learn from, and those to measure on, if any."""
    arrays = sample_images(codes, options["max_images"], options["seed"])
    if others:
        count_codes(others)
        return arrays, sample_images(others, None, 0)
    return hold_out(arrays) if holds_out else (arrays, [])


def _judge(
    vbpe: VisualBPE, held: Sequence[np.ndarray], arrays: Sequence[np.ndarray], takes_knee: bool
) -> VisualBPE:
    """The vocabulary with its compression of held-out images; with `takes_knee`, only the merges
    up to the knee.
    """
    if not held:
        return vbpe
    curve = Compression.measure(vbpe, held)
    print(f"On {curve.num_images} held-out images, {curve.describe()}")
    parameters = vbpe.parameters | {"held_out": curve.to_dict()}
    if not takes_knee:
        return replace(vbpe, parameters=parameters)
    shorter = replace(vbpe, merges=vbpe.merges[: curve.knee], parameters=parameters)
    shorter.parameters["num_tokens"] = int(count_used(shorter, arrays).sum())
    return shorter


# ---- learning ----


def _learn(
    arrays: Sequence[np.ndarray],
    codes: Codes,
    output: Output,
    num_merges: int,
    options: dict[str, Any],
    save_intermediate: int | None,
) -> VisualBPE:
    """Learn `num_merges` merges, or as many as possible; continues from an intermediate file."""
    parameters = options | {"num_images": sum(map(len, arrays)), "codes": codes.hashes}
    learnt = None
    if save_intermediate and output.partial.exists():
        learnt = _read_partial(output.partial, codes.num_codes, parameters, num_merges).tables
    priority = options["alpha"], options["sigma"], options["min_count"]
    trainer = Trainer(arrays, codes.num_codes, *priority, learnt)
    shapes = {array.shape[1:] for array in arrays}
    grid = shapes.pop() if len(shapes) == 1 else None

    def vocabulary() -> VisualBPE:
        found = {"num_cells": trainer.num_cells, "num_tokens": trainer.num_tokens}
        described = codes.lineage, parameters | found, grid, str(output.file)
        return VisualBPE(codes.num_codes, trainer.merges, *described)

    _learn_in_batches(
        trainer, num_merges, save_intermediate, lambda: vocabulary().save(output.partial)
    )
    return vocabulary()


def _learn_in_batches(
    trainer: Trainer, num_merges: int, save_every: int | None, save: Callable[[], None]
) -> None:
    """Learn with a progress bar that is updated about four times a second."""
    every = save_every or num_merges
    more, batch = True, 64
    with show_progress(
        name="learn merges", unit="merge", total=num_merges, initial=trainer.num_merges
    ) as progress:
        while more and trainer.num_merges < num_merges:
            before, started = trainer.num_merges, time.perf_counter()
            save_at = (before // every + 1) * every
            more = trainer.learn(min(before + batch, save_at, num_merges))
            fast = time.perf_counter() - started < 0.25
            batch = min(4096, batch * 2) if fast else max(16, batch // 2)
            progress.update(trainer.num_merges - before)
            compression = f"{trainer.num_cells / trainer.num_tokens:.3f}"
            progress.set_postfix(count=trainer.best_count, compression=compression)
            if save_every and trainer.num_merges == save_at < num_merges:
                save()


def _read_partial(
    path: Path, num_codes: int, parameters: Mapping[str, Any], num_merges: int
) -> VisualBPE:
    learnt = cast(VisualBPE, VisualBPE.load(path))  # a published one has other parameters
    asked = Request({**parameters, "number of codes": num_codes})
    found = {name: learnt.parameters.get(name) for name in parameters}
    if difference := asked.difference(found | {"number of codes": learnt.num_codes}):
        raise InputError(
            f"{path} was made with {difference}; use the same options, or delete it to begin again"
        )
    if learnt.num_merges > num_merges:
        raise InputError(
            f"{path} already has {learnt.num_merges} merges, more than --num_merges {num_merges}; "
            "delete it to begin again"
        )
    print(f"Continuing from {path}: {learnt.num_merges} merges")
    return learnt


# ---- telling ----


def _print_data(codes: Codes, usage: np.ndarray) -> None:
    for path, array in zip(codes.paths, codes.arrays, strict=True):
        print(f"{path}: {len(array)} images of {array.shape[1]} x {array.shape[2]}, {array.dtype}")
    share = usage.max() / usage.sum()
    print(
        f"{codes.num_images} images, {usage.sum()} cells; all codes are 0 … {codes.num_codes - 1} "
        f"above --vocab_pad {codes.pad}"
    )
    print(
        f"{(usage > 0).sum()} of {codes.num_codes} codes used; the most frequent one covers "
        f"{share:.1%} of all cells"
    )


def _print_result(vbpe: VisualBPE, usage: np.ndarray, output: Path) -> None:
    found = vbpe.parameters
    cells, tokens, images = found["num_cells"], found["num_tokens"], found["num_images"]
    alpha = found["alpha"]
    print(f"\n{output}: {vbpe.num_merges} merges over {vbpe.num_codes} codes, alpha {alpha}")
    rows = {
        "images": images,
        "cells": cells,
        "tokens": f"{tokens}  ({tokens / images:.1f} per image)",
        "compression": f"{cells / tokens:.3f} codes per token, on the images learnt from",
        "unused codes": f"{(usage == 0).sum()} of {vbpe.num_codes}",
    }
    sizes = vbpe.sizes[vbpe.num_codes :]
    names = ("2", "3", "4", "5 to 8", "9 to 16", "17 or more")
    groups = np.bincount(np.searchsorted([2, 3, 4, 8, 16], sizes), minlength=len(names))
    for name, count in zip(names, groups, strict=True):
        rows[f"merges of {name} cells"] = f"{count}  ({count / max(1, len(sizes)):.1%})"
    for name, value in rows.items():
        print(f"  {name:<28}{value}")
