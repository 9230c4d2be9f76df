"""Open, count and sample memory-mapped files of VQ codes to learn merges from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from beingvl.artefact.hashes import hash_file
from beingvl.artefact.manifest import MANIFEST_FILE, join_lineages, read_manifest
from beingvl.artefact.progress import progress as show_progress
from beingvl.errors import InputError, is_out_of_files
from beingvl.images.vq_codes import CODES_FILE
from beingvl.vbpe.grids import MAX_CODES, MAX_SIDE

CHUNK = 4096  # images processed at once
HELD_OUT_EVERY = 20


@dataclass
class Codes:
    """Open code files. `arrays` are [N, H, W], memory-mapped, and hold code + `pad`."""

    paths: list[Path]
    arrays: list[np.ndarray]
    hashes: list[str]
    num_codes: int
    pad: int
    lineage: dict[str, str]

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
    """Open folders from `encode-images`, .npy files and folders of .npy files, without reading
    their codes.

    Raises InputError unless all are arrays of integers `[N, H, W]` or `[N, H * W]`, and if sizes
    contradict each other.
    """
    hashes: dict[Path, str] = {}
    lineages: dict[str, dict[str, str]] = {}
    sizes = {"--init_size": num_codes, "--vocab_end less --vocab_pad": end and end - pad}
    for path in paths:
        if not path.exists():
            made_by = "expected VQ codes, made with `beingvl encode-images`"
            raise InputError(f"{path} does not exist; {made_by}")
        if (path / CODES_FILE).exists() or (path / MANIFEST_FILE).exists():
            manifest = read_manifest(path, "vq_codes")
            hashes[path / CODES_FILE] = str(manifest.files[CODES_FILE]["hash"])
            lineages[str(path)] = {**manifest.lineage}
            lineages[str(path)].pop("exif", None)  # merges do not depend on the orientation
            sizes[str(path)] = int(manifest.details["num_codes"])
            continue
        found = sorted(path.glob("*.npy")) if path.is_dir() else [path]
        if not found:
            raise InputError(
                f"{path} holds neither {CODES_FILE} nor other .npy files; make it with `beingvl "
                "encode-images`"
            )
        hashes |= {file: hash_file(file) for file in found}
    arrays = [_open_array(file, grid) for file in hashes]
    known = {name: size for name, size in sizes.items() if size is not None}
    if len(set(known.values())) > 1:
        said = ", ".join(f"{name} says {size}" for name, size in known.items())
        raise InputError(f"the number of codes is not clear: {said}")
    num_codes = next(iter(known.values()), None)
    if num_codes is None:
        num_codes = max(int(array.max()) for array in arrays) - pad + 1
        print(f"Number of codes: {num_codes} (the largest in the files + 1; --init_size sets it)")
    if not 1 <= num_codes <= MAX_CODES:
        raise InputError(
            f"{num_codes} codes, expected 1 to {MAX_CODES}; are --init_size, --vocab_pad and "
            "--vocab_end right?"
        )
    return Codes(
        list(hashes), arrays, list(hashes.values()), num_codes, pad, join_lineages(lineages)
    )


def _open_array(path: Path, grid: Sequence[int] | None) -> np.ndarray:
    expected = "expected integer codes [N, H, W] or [N, H * W]"
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OSError, SyntaxError) as error:
        if is_out_of_files(error):
            raise
        raise InputError(
            f"{path} is not a readable .npy file of codes ({error}); make it again"
        ) from error
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "iu":
        found = getattr(array, "dtype", type(array).__name__)
        raise InputError(f"{path} holds {found}, {expected}")
    if array.ndim == 2:
        height, width = grid or [math.isqrt(array.shape[1])] * 2
        if height * width != array.shape[1]:
            raise InputError(
                f"{path} has {array.shape[1]} codes per image, which is not {height} x {width}: "
                "give --grid H W"
            )
        array = array.reshape(-1, height, width)
    if array.ndim != 3 or array.size == 0:
        raise InputError(f"{path} has shape {list(array.shape)}, {expected}")
    found = f"{path} has grids of {array.shape[1]} x {array.shape[2]}"
    if grid and array.shape[1:] != tuple(grid):
        raise InputError(f"{found}, --grid says {grid[0]} x {grid[1]}")
    if max(array.shape[1:]) > MAX_SIDE:
        raise InputError(f"{found}, expected at most {MAX_SIDE} on each side")
    return array


def count_codes(codes: Codes) -> np.ndarray:
    """How often each code occurs, int64 `[num_codes]`. Raises InputError for unknown codes."""
    usage = np.zeros(codes.num_codes, np.int64)
    with show_progress(total=codes.num_images, name="check codes", unit="image") as progress:
        for path, array, expected in zip(codes.paths, codes.arrays, codes.hashes, strict=True):
            if hash_file(path) != expected:
                raise InputError(f"{path} changed after it was written; make it again")
            for start in range(0, len(array), CHUNK):
                chunk = array[start : start + CHUNK]
                _check_codes(path, start, chunk, codes)
                raw = chunk.ravel() - codes.pad if codes.pad else chunk.ravel()
                usage += np.bincount(raw, minlength=codes.num_codes)
                progress.update(len(chunk))
    return usage


def _check_codes(path: Path, start: int, chunk: np.ndarray, codes: Codes) -> None:
    low, high, end = int(chunk.min()), int(chunk.max()), codes.pad + codes.num_codes
    if codes.pad <= low and high < end:
        return
    wrong = ((chunk < codes.pad) | (chunk >= end)).any(axis=(1, 2))
    where = f"{path}, image {start + int(wrong.argmax())}: codes {low} … {high}"
    if codes.pad and high < codes.num_codes:
        hint = f"they are raw already: leave out --vocab_pad {codes.pad}"
    elif not codes.pad and low >= codes.num_codes:
        hint = (
            "if the files hold code + offset, give the offset as --vocab_pad (their smallest id "
            f"is {low})"
        )
    else:
        hint = "the files are not of this code book, or are damaged"
    raise InputError(f"{where}, expected {codes.pad} … {end - 1}; {hint}")


def sample_images(codes: Codes, max_images: int | None, seed: int) -> list[np.ndarray]:
    """The arrays of raw codes to learn from: all images, or a sample drawn with the seed."""
    chosen = None
    if max_images is not None and max_images < codes.num_images:
        rng = np.random.default_rng(seed)
        chosen = np.sort(rng.choice(codes.num_images, max_images, replace=False))
    arrays, first = [], 0
    for array in codes.arrays:
        last = first + len(array)
        part = array
        if chosen is not None:
            part = array[chosen[(chosen >= first) & (chosen < last)] - first]
        if len(part):
            arrays.append(part - codes.pad if codes.pad else part)
        first = last
    return arrays


def hold_out(arrays: Sequence[np.ndarray]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Hold out every 20th image, counted over all arrays: (images to learn from, held-out images).
    Raises InputError if there are fewer than 20 images.
    """
    others, held = [], []
    first = 0
    for array in arrays:
        is_held = (first + np.arange(len(array))) % HELD_OUT_EVERY == HELD_OUT_EVERY - 1
        others.append(array[~is_held])
        held.append(array[is_held])
        first += len(array)
    if first < HELD_OUT_EVERY:
        raise InputError(
            f"--num_merges auto holds out every {HELD_OUT_EVERY}th image, and there are {first}; "
            "give codes of other images as --held_out"
        )
    return [array for array in others if len(array)], [array for array in held if len(array)]
