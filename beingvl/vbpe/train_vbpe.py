"""[2] Learn a vBPE vocabulary from VQ codes: vq_codes/ (or .npy files) -> vbpe/ (vbpe.json and a
manifest), or vbpe.json alone.

--data_path takes folders written by `beingvl encode-images`, .npy files, or folders of .npy files,
of [N, H, W] or [N, H * W] uint16, int32 or int64; sizes may differ between files. The learnt
vocabulary is a pure function of codes and options.

`--import_pkl vbpe.pkl` converts a published pickled vocabulary instead of learning one.
"""

from __future__ import annotations

import argparse
import math
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from beingvl.artefact.hashes import hash_file
from beingvl.artefact.manifest import (
    MANIFEST_FILE,
    already_made,
    is_complete,
    join_lineages,
    read_manifest,
    start_folder,
    write_manifest,
)
from beingvl.errors import InputError
from beingvl.vbpe.grids import MAX_CODES, MAX_IDS, MAX_SIDE
from beingvl.vbpe.published import LegacyVisualBPE, import_published
from beingvl.vbpe.trainer import Trainer
from beingvl.vbpe.vbpe_file import VBPE_FILE
from beingvl.vbpe.visual_bpe import VisualBPE

CHUNK = 4096  # images that are looked at at once
REPORT_FOLDER = "vbpe_report"  # where `beingvl report vbpe` writes by default


def run(args: argparse.Namespace) -> None:
    if args.import_pkl:
        return _import(args)
    if not args.data_path:
        raise InputError(
            "--data_path is missing: give VQ codes to learn from (or --import_pkl to "
            "convert a published vocabulary)"
        )
    _check_options(args)
    codes = open_codes(args.data_path, args.init_size, args.vocab_pad, args.vocab_end, args.grid)
    names = ("num_merges", "alpha", "sigma", "min_count", "max_images", "seed", "grid")
    request = {
        "codes": codes.hashes,
        "num_codes": codes.num_codes,
        "vocab_pad": codes.pad,
        "lineage": codes.lineage,
    }
    output = Output(args.output_path, request | {name: getattr(args, name) for name in names})
    if output.is_made(args.overwrite):
        return
    usage = count_codes(codes)
    output.prepare()
    if args.validate_data:
        _print_data(codes, usage)
    vbpe = train(codes, sample_images(codes, args.max_images, args.seed), args, output.file)
    output.write(vbpe)
    _print_result(vbpe, usage, args.num_merges, output.file)


def _import(args: argparse.Namespace) -> None:
    vbpe = import_published(args.import_pkl, args.init_size, args.vocab_pad)
    request = {
        "import_pkl": hash_file(args.import_pkl),
        "init_size": args.init_size,
        "vocab_pad": args.vocab_pad,
    }
    output = Output(args.output_path, request)
    if output.is_made(args.overwrite):
        return
    output.prepare()
    output.write(vbpe)
    found = f"published vocabulary of {vbpe.num_codes} codes and {vbpe.num_merges} merges"
    print(f"{output.file}: {found} (legacy: it cannot be decoded)")


class Output:
    """Where the vocabulary goes: a folder of its own with a manifest, or one `.json` file among
    others.
    """

    def __init__(self, path: Path, request: dict[str, Any]) -> None:
        self.folder = None if path.suffix == ".json" else path
        self.file = path / VBPE_FILE if self.folder else path
        self._request = request

    def is_made(self, overwrite: bool) -> bool:
        """Whether there is nothing to do. Raises InputError where something would be lost."""
        if self.folder is None:
            if self.file.is_dir() or is_complete(self.file.parent):
                found = "is a folder" if self.file.is_dir() else "lies in a folder with a manifest"
                raise InputError(f"{self.file} {found}; choose another name")
            if self.file.exists() and not overwrite:
                raise InputError(
                    f"{self.file} exists; choose another name or add --overwrite (in a folder, "
                    "equal work is reused)"
                )
            return False
        if self.folder.exists() and not self.folder.is_dir():
            raise InputError(f"{self.folder} is a file; give a folder, or --output_path FILE.json")
        ours = (self.file.name, _partial_path(self.file).name, MANIFEST_FILE, REPORT_FOLDER)
        others = sorted(
            path.name
            for path in self.folder.glob("*")
            if path.name not in ours and path.suffix != ".tmp"
        )
        if others:
            raise InputError(
                f"{self.folder} holds {others[0]!r} too; give vBPE a folder of its own, or a "
                "file: --output_path FILE.json"
            )
        if self.file.exists() and not is_complete(self.folder) and not overwrite:
            raise InputError(
                f"{self.folder} holds a vocabulary without a manifest; choose another folder "
                "or add --overwrite"
            )
        return already_made(self.folder, "vbpe", self._request, overwrite)

    def prepare(self) -> None:
        """Make the place ready, once the inputs are known to be good: from here on a folder is
        incomplete.
        """
        self.file.parent.mkdir(parents=True, exist_ok=True)
        if self.folder:
            start_folder(self.folder, "vbpe")
            shutil.rmtree(
                self.folder / REPORT_FOLDER, ignore_errors=True
            )  # of the vocabulary before

    def write(self, vbpe: VisualBPE | LegacyVisualBPE) -> None:
        vbpe.save(self.file)
        _partial_path(self.file).unlink(missing_ok=True)
        if self.folder:
            counts = {"codes": vbpe.num_codes, "merges": vbpe.num_merges}
            write_manifest(self.folder, "vbpe", counts, vbpe.lineage, {"request": self._request})


def _check_options(args: argparse.Namespace) -> None:
    lowest = {
        "num_merges": 0,
        "alpha": 0,
        "min_count": 1,
        "max_images": 1,
        "save_intermediate": 1,
        "vocab_pad": 0,
    }
    for name, least in lowest.items():
        value = getattr(args, name)
        if value is not None and not least <= value < float("inf"):
            raise InputError(f"--{name} is {value}, expected at least {least}")
    if not 0 < args.sigma < float("inf"):
        raise InputError(f"--sigma is {args.sigma}, expected more than 0")


# ---- reading codes ----


@dataclass
class Codes:
    """Opened code files. `arrays` are [N, H, W], memory-mapped, holding code + `pad`."""

    paths: list[Path]
    arrays: list[np.ndarray]
    hashes: list[str]
    num_codes: int
    pad: int = 0
    lineage: dict[str, str] = field(default_factory=dict)

    @property
    def num_images(self) -> int:
        return sum(len(array) for array in self.arrays)


def open_codes(
    paths: Sequence[Path],
    num_codes: int | None = None,
    pad: int = 0,
    end: int | None = None,
    grid: Sequence[int] | None = None,
) -> Codes:
    """Open code files and folders (see the module docstring) without reading the codes.

    Raises InputError for what is not an array of integers `[N, H, W]` or `[N, H * W]`, and for
    sizes that contradict each other.
    """
    files: list[tuple[Path, str]] = []
    lineages: dict[str, dict[str, str]] = {}
    sizes: dict[str, int] = {} if num_codes is None else {"--init_size": num_codes}
    if end is not None:
        sizes["--vocab_end less --vocab_pad"] = end - pad
    for path in paths:
        if not path.exists():
            raise InputError(
                f"{path} does not exist; expected VQ codes, made with `beingvl encode-images`"
            )
        if (path / "codes.npy").exists() or (path / "manifest.json").exists():
            manifest = read_manifest(path, "vq_codes")
            files.append((path / "codes.npy", str(manifest.files["codes.npy"]["hash"])))
            lineages[str(path)] = manifest.lineage
            sizes[str(path)] = int(manifest.details["num_codes"])
            continue
        found = sorted(path.glob("*.npy")) if path.is_dir() else [path]
        if not found:
            raise InputError(
                f"{path} holds neither codes.npy nor other .npy files; make it with `beingvl "
                "encode-images`"
            )
        files += [(file, hash_file(file)) for file in found]
    if len(set(sizes.values())) > 1:
        raise InputError(
            "the number of codes is not clear: "
            f"{', '.join(f'{name} says {size}' for name, size in sizes.items())}"
        )
    arrays = [_open_array(file, grid) for file, _ in files]
    known = next(iter(sizes.values()), None)
    if known is None:
        known = max(int(array.max()) for array in arrays) - pad + 1
        print(f"Number of codes: {known} (the largest code in the files + 1; --init_size sets it)")
    _check_num_codes(known)
    return Codes(
        [file for file, _ in files],
        arrays,
        [hash for _, hash in files],
        known,
        pad,
        join_lineages(lineages),
    )


def _check_num_codes(num_codes: int) -> None:
    if not 1 <= num_codes <= MAX_CODES:
        raise InputError(
            f"{num_codes} codes, expected 1 to {MAX_CODES}; are --init_size, --vocab_pad "
            "and --vocab_end right?"
        )


def _open_array(path: Path, grid: Sequence[int] | None) -> np.ndarray:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OSError, SyntaxError) as error:
        raise InputError(
            f"{path} is no readable .npy file of codes, it may be cut off ({error}); make it again"
        ) from error
    expected = "expected integer codes [N, H, W] or [N, H * W]"
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "iu":
        raise InputError(
            f"{path} holds {getattr(array, 'dtype', type(array).__name__)}, {expected}"
        )
    if array.size == 0:
        raise InputError(f"{path} is empty (shape {list(array.shape)}), {expected}")
    if array.ndim == 2:
        height, width = grid or [math.isqrt(array.shape[1])] * 2
        if height * width != array.shape[1]:
            raise InputError(
                f"{path} has {array.shape[1]} codes per image, which is not {height} x "
                f"{width}: give --grid H W"
            )
        array = array.reshape(-1, height, width)
    if array.ndim != 3:
        raise InputError(f"{path} has shape {list(array.shape)}, {expected}")
    if grid and list(array.shape[1:]) != list(grid):
        raise InputError(
            f"{path} has grids of {array.shape[1]} x {array.shape[2]}, --grid says "
            f"{grid[0]} x {grid[1]}"
        )
    if max(array.shape[1:]) > MAX_SIDE:
        raise InputError(
            f"{path} has grids of {array.shape[1]} x {array.shape[2]}, expected at most "
            f"{MAX_SIDE} on each side"
        )
    return array


def count_codes(codes: Codes) -> np.ndarray:
    """How often every code occurs, int64 `[num_codes]`. Raises InputError for a code outside the
    code book.
    """
    usage = np.zeros(codes.num_codes, np.int64)
    with tqdm(total=codes.num_images, desc="check codes", unit="image", disable=None) as progress:
        for path, array in zip(codes.paths, codes.arrays, strict=True):
            for start in range(0, len(array), CHUNK):
                chunk = np.asarray(array[start : start + CHUNK])
                low, high = int(chunk.min()) - codes.pad, int(chunk.max()) - codes.pad
                if low < 0 or high >= codes.num_codes:
                    wrong = (
                        chunk < codes.pad
                        if low < 0
                        else chunk.astype(np.int64) - codes.pad >= codes.num_codes
                    )
                    image = start + int(np.argmax(wrong.reshape(len(chunk), -1).any(axis=1)))
                    raise InputError(
                        _outside(path, image, low + codes.pad, high + codes.pad, codes)
                    )
                usage += np.bincount(
                    chunk.ravel() - codes.pad if codes.pad else chunk.ravel(),
                    minlength=codes.num_codes,
                )
                progress.update(len(chunk))
    return usage


def _outside(path: Path, image: int, low: int, high: int, codes: Codes) -> str:
    expected = f"expected {codes.pad} … {codes.pad + codes.num_codes - 1}"
    if codes.pad and high < codes.num_codes:
        hint = f"; they are raw already: leave out --vocab_pad {codes.pad}"
    elif not codes.pad and low >= codes.num_codes:
        hint = (
            "; if the files hold code + offset, give the offset as --vocab_pad (their "
            f"smallest id is {low})"
        )
    else:
        hint = "; the files are not of this code book, or are damaged"
    return f"{path}, image {image}: codes {low} … {high}, {expected}{hint}"


def sample_images(codes: Codes, max_images: int | None, seed: int) -> list[np.ndarray]:
    """The arrays to learn from: all images, or a sample without replacement that depends only on
    the seed; raw codes.
    """
    chosen = None
    if max_images is not None and max_images < codes.num_images:
        chosen = np.sort(
            np.random.default_rng(seed).choice(codes.num_images, max_images, replace=False)
        )
    arrays, first = [], 0
    for array in codes.arrays:
        part = array
        if chosen is not None:
            part = array[chosen[(chosen >= first) & (chosen < first + len(array))] - first]
        first += len(array)
        if len(part):
            arrays.append(np.asarray(part) - codes.pad if codes.pad else part)
    return arrays


# ---- learning ----


def train(
    codes: Codes, arrays: list[np.ndarray], args: argparse.Namespace, output: Path
) -> VisualBPE:
    """Learn `args.num_merges` merges, or as many as there are, with a progress bar; continues
    from an intermediate file.
    """
    if codes.num_codes + args.num_merges > MAX_IDS:
        raise InputError(
            f"--num_merges {args.num_merges} and {codes.num_codes} codes, expected at most "
            f"{MAX_IDS} together"
        )
    partial = _partial_path(output)
    options = _parameters(codes, arrays, args)
    learnt = (
        _read_partial(partial, codes, options, args.num_merges)
        if args.save_intermediate and partial.exists()
        else None
    )
    trainer = Trainer(
        arrays,
        codes.num_codes,
        args.alpha,
        args.sigma,
        args.min_count,
        learnt.tables if learnt else None,
    )

    def vocabulary() -> VisualBPE:
        grid = (
            tuple(arrays[0].shape[1:]) if len({array.shape[1:] for array in arrays}) == 1 else None
        )
        parameters = options | {"num_cells": trainer.num_cells, "num_tokens": trainer.num_tokens}
        return VisualBPE(
            codes.num_codes, trainer.merges, codes.lineage, parameters, grid, str(output)
        )

    every = args.save_intermediate or args.num_merges
    more, batch = True, 64
    with tqdm(
        total=args.num_merges,
        initial=trainer.num_merges,
        desc="learn merges",
        unit="merge",
        disable=None,
    ) as progress:
        while more and trainer.num_merges < args.num_merges:
            before, started = trainer.num_merges, time.perf_counter()
            save_at = (before // every + 1) * every
            more = trainer.learn(min(before + batch, save_at, args.num_merges))
            batch = (
                min(4096, batch * 2)
                if time.perf_counter() - started < 0.25
                else max(16, batch // 2)
            )
            progress.update(trainer.num_merges - before)
            progress.set_postfix(
                count=trainer.best_count,
                compression=f"{trainer.num_cells / trainer.num_tokens:.3f}",
            )
            if args.save_intermediate and trainer.num_merges == save_at < args.num_merges:
                vocabulary().save(partial)
    return vocabulary()


def _partial_path(output: Path) -> Path:
    return output.with_suffix(".partial.json")


def _parameters(codes: Codes, arrays: list[np.ndarray], args: argparse.Namespace) -> dict[str, Any]:
    """What the result depends on, to be stored with it."""
    return {
        "alpha": args.alpha,
        "sigma": args.sigma,
        "min_count": args.min_count,
        "max_images": args.max_images,
        "seed": args.seed,
        "num_images": sum(len(array) for array in arrays),
        "codes": codes.hashes,
    }


def _read_partial(path: Path, codes: Codes, options: dict[str, Any], num_merges: int) -> VisualBPE:
    learnt = VisualBPE.load(path)
    differing = [name for name, value in options.items() if learnt.parameters.get(name) != value]
    if learnt.num_codes != codes.num_codes:
        differing.append("number of codes")
    if differing or not isinstance(learnt, VisualBPE):
        raise InputError(
            f"{path} was made with other {', '.join(differing)}; use the same options, or "
            "delete it to begin again"
        )
    if learnt.num_merges > num_merges:
        raise InputError(
            f"{path} already has {learnt.num_merges} merges, more than --num_merges "
            f"{num_merges}; delete it to begin again"
        )
    print(f"Continuing from {path}: {learnt.num_merges} merges")
    return learnt


# ---- telling ----


def _print_data(codes: Codes, usage: np.ndarray) -> None:
    for path, array in zip(codes.paths, codes.arrays, strict=True):
        print(f"{path}: {len(array)} images of {array.shape[1]} x {array.shape[2]}, {array.dtype}")
    share = usage.max() / usage.sum()
    print(
        f"{codes.num_images} images, {usage.sum()} cells; all codes are 0 … "
        f"{codes.num_codes - 1} above --vocab_pad {codes.pad}"
    )
    print(
        f"{(usage > 0).sum()} of {codes.num_codes} codes used; the most frequent one "
        f"covers {share:.1%} of all cells"
    )


def _print_result(vbpe: VisualBPE, usage: np.ndarray, requested: int, output: Path) -> None:
    cells, tokens, images = (
        vbpe.parameters[name] for name in ("num_cells", "num_tokens", "num_images")
    )
    sizes = vbpe.sizes[vbpe.num_codes :]
    rows = [
        ("images", f"{images}"),
        ("cells", f"{cells}"),
        ("tokens", f"{tokens}  ({tokens / images:.1f} per image)"),
        ("compression", f"{cells / tokens:.3f} cells per token"),
        ("unused codes", f"{(usage == 0).sum()} of {vbpe.num_codes}"),
    ]
    for low, high in ((2, 2), (3, 3), (4, 4), (5, 8), (9, 16), (17, 1 << 62)):
        inside = (sizes >= low) & (sizes <= high)
        name = (
            f"{low} cells"
            if low == high
            else f"{low} to {high} cells"
            if high < 1 << 62
            else f"{low} cells or more"
        )
        rows.append(
            (f"merges of {name}", f"{inside.sum()}  ({inside.mean() if len(sizes) else 0:.1%})")
        )
    print(
        f"\n{output}: {vbpe.num_merges} merges over {vbpe.num_codes} codes, alpha "
        f"{vbpe.parameters['alpha']}"
    )
    if vbpe.num_merges < requested:
        print(
            f"Stopped before {requested} merges: no pair is left that occurs "
            f"{vbpe.parameters['min_count']} times (--min_count)"
        )
    for name, value in rows:
        print(f"  {name:<28}{value}")
