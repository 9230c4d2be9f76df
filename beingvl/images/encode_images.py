"""[1] Images -> vq_codes/: every image once through the VQ-GAN, one row of codes each.

  1. open_images        a folder or tar files; all their images, or those that --json_path or
      --list_path names   N sorted keys
  2. read_batches       read, hash and preprocess, in --num_workers processes     pixels [n, 3,
      H, W] float32
  3. VQGAN.encode       the codes of a batch                                                 [n,
      h, w] uint16
  4. write_part         every 4096 images are a part, finished once and for all
      (beingvl/artefact/parts.py)
  5. join_codes         all parts -> codes.npy, keys.jsonl, key_offsets.npy, rejected.jsonl, and
                        manifest.json last

Started by a launcher (`deepspeed --module beingvl encode-images …`, `torchrun -m beingvl
encode-images …`) or as a Slurm array, every rank makes its share of the parts; killed, it is
started again with any number of ranks. An unreadable image is rejected with its reason; past
--max_rejected the run fails. When the disk fails, the run ends after a few tries and goes on with
the same command. The result does not depend on ranks, workers or kills. A finished output with the
same images, by name, size and time (else by content), is reused.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from beingvl.artefact.manifest import (
    already_made,
    hash_bytes,
    is_complete,
    read_manifest,
    start_folder,
    write_atomically,
)
from beingvl.artefact.parts import (
    OvertakenError,
    Parts,
    locked,
    ranks_of,
    refuse_overwrite_of_many,
    remove_parts,
)
from beingvl.errors import InputError
from beingvl.images import vq_codes
from beingvl.images.image_source import ImageSource, listed_images, named_images, open_images
from beingvl.images.vq_codes import REJECTED_FILE, hash_line, key_line, rejected_line, stamp_line
from beingvl.images.vqgan import (
    VQGAN,
    ChameleonImageProcessorPil,
    decode_image,
    to_pixels,
    usable_device,
)

PARTS_VERSION = 2  # of a part's files


def run(args: argparse.Namespace) -> None:
    check_arguments(args)
    rank, num_ranks = ranks_of(args)
    refuse_overwrite_of_many(args.overwrite, num_ranks, args.output_path)
    device, dtype = _device_and_dtype(args)
    images = open_images(args.image_path)
    keys = _keys(args, images)
    vqgan = VQGAN.load(args.vq_path, device, getattr(torch, dtype))
    request = {"vqgan": vqgan.fingerprint(), "dtype": dtype}
    num_parts = -(-len(keys) // args.images_per_part)
    with locked(args.output_path):
        if args.overwrite:
            start_folder(args.output_path, "vq_codes")
            remove_parts(args.output_path)
        is_finished = is_complete(args.output_path)
        if is_finished:
            remove_parts(args.output_path)
        else:
            parts = Parts(
                args.output_path, {"parts_version": PARTS_VERSION, **request, **_split(args, keys)}
            )
            mine = [number for number in parts.missing(num_parts) if number % num_ranks == rank]
    if (
        is_finished
    ):  # without the lock: ranks look at all images side by side, not one after the other
        already_made(
            args.output_path,
            "vq_codes",
            {**request, "images": hash_now(args.output_path, images, keys)},
        )
        return
    with suppress(OvertakenError):
        encode_parts(parts, mine, images, keys, vqgan, args)
    with locked(args.output_path):
        if parts.are_to_be_joined(num_parts, is_complete(args.output_path), rank, num_ranks):
            join_codes(parts, num_parts, len(keys), args, vqgan, request)
            parts.remove()


def check_arguments(args: argparse.Namespace) -> None:
    for name, least in (
        ("batch_size", 1),
        ("images_per_part", 1),
        ("num_workers", 0),
        ("max_rejected", 0),
    ):
        if not getattr(args, name) >= least:  # nor NaN
            raise InputError(f"--{name} is {getattr(args, name)}, expected at least {least}")
    if args.json_path and args.list_path:
        raise InputError(
            "--json_path and --list_path both say which images to encode: give one of them"
        )


def _keys(args: argparse.Namespace, images: ImageSource) -> list[str]:
    if args.json_path:
        return named_images(args.json_path)
    return listed_images(args.list_path) if args.list_path else images.keys()


def _device_and_dtype(args: argparse.Namespace) -> tuple[str, str]:
    """The launcher sets LOCAL_RANK, the number of this rank's GPU on its machine."""
    device = args.device
    if device == "auto":
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"
    device = str(usable_device(device))
    return device, args.dtype if args.dtype != "auto" else "bfloat16" if device.startswith(
        "cuda"
    ) else "float32"


def _split(args: argparse.Namespace, keys: list[str]) -> dict[str, Any]:
    """What decides the bytes of the parts beside the VQ-GAN. A batch's size may change the last
    bit on a GPU.
    """
    names = hash_bytes("\n".join(keys).encode("utf-8", "surrogatepass"))
    return {
        "image names": names,
        "images_per_part": args.images_per_part,
        "batch_size": args.batch_size,
    }


def hash_now(output: Path, images: ImageSource, keys: list[str]) -> str:
    """As `hash_all`; images whose names, sizes and times are those of a finished output are not
    read again.
    """
    details = read_manifest(output, "vq_codes").details
    progress = tqdm(keys, desc="compare images", unit="image", disable=None, leave=False)
    stamps = hash_bytes("".join(stamp_line(key, images.stamp(key)) for key in progress).encode())
    return (
        details["request"]["images"]
        if details.get("image_stamps") == stamps
        else hash_all(images, keys)
    )


def hash_all(images: ImageSource, keys: list[str]) -> str:
    """One hash of the images' names and content."""
    lines = []
    for key in tqdm(keys, desc="hash images", unit="image", disable=None, leave=False):
        try:
            lines.append(hash_line(key, images.read(key)))
        except InputError:  # missing or unreadable: part of what the images are
            lines.append(hash_line(key, None))
    return hash_bytes("".join(lines).encode())


# ---- one part ----


def encode_parts(
    parts: Parts,
    numbers: list[int],
    images: ImageSource,
    keys: list[str],
    vqgan: VQGAN,
    args: argparse.Namespace,
) -> None:
    """Make the parts `numbers`. Raises InputError when too many of all images were rejected
    already.
    """
    size = args.images_per_part
    batches = [
        (number, keys[start : min(start + args.batch_size, (number + 1) * size)])
        for number in numbers
        for start in range(number * size, min((number + 1) * size, len(keys)), args.batch_size)
    ]
    counter = _RejectionLimit(args.output_path, args.max_rejected, len(keys))
    part = PartOfCodes()
    with tqdm(
        total=sum(len(batch) for _, batch in batches),
        desc="encode images",
        unit="image",
        disable=None,
    ) as progress:
        for index, batch in enumerate(
            read_batches(images, [keys for _, keys in batches], vqgan, args.num_workers)
        ):
            number = batches[index][0]
            counter.add(batch.rejected)
            part.add(batch, vqgan.encode(batch.pixels) if batch.keys else None)
            progress.update(len(batch.hashes))
            parts.show_life()
            if index + 1 == len(batches) or batches[index + 1][0] != number:
                write_part(parts, number, part, vqgan.grid)
                part = PartOfCodes()


class PartOfCodes:
    """The images of a part that is being made: rows of codes with their keys, rejections, a hash
    line and a stamp an image.
    """

    def __init__(self) -> None:
        self.keys: list[str] = []
        self.codes: list[np.ndarray] = []
        self.rejected: list[tuple[str, str]] = []
        self.hashes: list[str] = []
        self.stamps: list[str] = []

    def add(self, batch: Batch, codes: np.ndarray | None) -> None:
        self.keys += batch.keys
        self.codes += [] if codes is None else [codes]
        self.rejected += batch.rejected
        self.hashes += batch.hashes
        self.stamps += batch.stamps


def write_part(parts: Parts, number: int, part: PartOfCodes, grid: tuple[int, int]) -> None:
    with parts.writing(number) as folder:
        (folder / "codes").write_bytes(
            b"".join(codes.astype("<u2").tobytes() for codes in part.codes)
        )
        (folder / "keys").write_text("".join(map(key_line, part.keys)), encoding="utf-8")
        (folder / "rejected").write_text(
            "".join(rejected_line(key, why) for key, why in part.rejected), encoding="utf-8"
        )
        (folder / "hashes").write_text("".join(part.hashes))
        (folder / "stamps").write_text("".join(part.stamps))
        (folder / "counts.json").write_text(
            json.dumps({"images": len(part.keys), "rejected": len(part.rejected)})
        )


class _RejectionLimit:
    """Stops a run at the image with which it can no longer succeed, and leaves the reasons in
    rejected.jsonl.
    """

    def __init__(self, output: Path, max_rejected: float, num_images: int) -> None:
        self._output, self._max_rejected, self._num_images = output, max_rejected, num_images
        self._lines: list[str] = []

    def add(self, rejected: list[tuple[str, str]]) -> None:
        self._lines += [rejected_line(key, reason) for key, reason in rejected]
        if rejected and len(self._lines) > self._max_rejected * self._num_images:
            write_atomically(self._output / REJECTED_FILE, "".join(self._lines))
            raise too_many_rejected(
                len(self._lines),
                self._num_images,
                self._max_rejected,
                rejected[-1][1],
                self._output,
            )


def too_many_rejected(
    rejected: int, num_images: int, max_rejected: float, last: str, output: Path
) -> Exception:
    found = f"{rejected} of {num_images} images rejected so far, --max_rejected is {max_rejected:g}"
    remedy = "; images that are repaired now are read again with --overwrite"
    return InputError(f"{found}; the last: {last}; all are in {output / REJECTED_FILE}{remedy}")


def join_codes(
    parts: Parts,
    num_parts: int,
    num_images: int,
    args: argparse.Namespace,
    vqgan: VQGAN,
    request: Mapping[str, Any],
) -> None:
    """All parts to one folder. Raises InputError when too many images of all were rejected, or
    every one.
    """
    output = args.output_path
    counts = parts.read_json(num_parts, "counts.json")
    rows, rejected = (sum(part[name] for part in counts) for name in ("images", "rejected"))
    hashes = {
        vq_codes.REJECTED_FILE: parts.join(num_parts, "rejected", output / vq_codes.REJECTED_FILE)
    }
    if not rows:
        raise InputError(
            f"none of the {num_images} images could be read; the reasons are in "
            f"{output / vq_codes.REJECTED_FILE}; "
            "repaired images are read again with --overwrite"
        )
    if rejected > args.max_rejected * num_images:
        last = json.loads(
            (output / vq_codes.REJECTED_FILE).read_text(encoding="utf-8").split("\n")[-2]
        )
        raise too_many_rejected(rejected, num_images, args.max_rejected, last["reason"], output)
    header = vq_codes.codes_header(rows, vqgan.grid)
    hashes[vq_codes.CODES_FILE] = parts.join(
        num_parts, "codes", output / vq_codes.CODES_FILE, header
    )
    hashes[vq_codes.KEYS_FILE] = parts.join(num_parts, "keys", output / vq_codes.KEYS_FILE)
    images_hash, stamps = (
        parts.join(num_parts, name, parts.folder / name) for name in ("hashes", "stamps")
    )
    details = {"num_codes": vqgan.num_codes, "grid": list(vqgan.grid), "image_stamps": stamps}
    details["request"] = {**request, "images": images_hash}
    vq_codes.finish_codes(
        output,
        {"images": rows, "rejected": rejected},
        {"vqgan": vqgan.fingerprint()},
        details,
        hashes,
    )
    print(f"{output}: codes of {rows} images, {rejected} rejected")


# ---- reading ----


@dataclass(frozen=True)
class Batch:
    """Consecutive images: the readable ones as `pixels` `[len(keys), 3, H, W]`, the others as
    (key, reason).

    `hashes` and `stamps` have one line for each image, read or not, in key order.
    """

    keys: list[str]
    pixels: torch.Tensor
    rejected: list[tuple[str, str]]
    hashes: list[str]
    stamps: list[str]


class ImageReader:
    """Random access to batches, for the worker processes of torch's DataLoader."""

    def __init__(
        self, images: ImageSource, batches: list[list[str]], processor: ChameleonImageProcessorPil
    ) -> None:
        self._images, self._batches, self._processor = images, batches, processor

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, index: int) -> Batch | OSError:
        """A disk that failed is given back, as torch would make a traceback of what is raised in
        a worker process.
        """
        try:
            return self._read(self._batches[index])
        except OSError as error:
            return error

    def _read(self, batch: list[str]) -> Batch:
        keys, pixels, rejected, hashes, stamps = [], [], [], [], []
        for key in batch:
            data = None
            stamps.append(
                stamp_line(key, self._images.stamp(key))
            )  # first: a file that changes meanwhile is read again
            try:
                data = self._images.read(key)
                pixels.append(to_pixels(self._processor, decode_image(data, key)))
                keys.append(key)
            except InputError as error:
                rejected.append((key, str(error)))
            hashes.append(hash_line(key, data))
        return Batch(
            keys, torch.stack(pixels) if pixels else torch.empty(0), rejected, hashes, stamps
        )


def read_batches(
    images: ImageSource, batches: list[list[str]], vqgan: VQGAN, num_workers: int
) -> Iterator[Batch]:
    """The batches in their order, read ahead by `num_workers` processes. Raises OSError when the
    disk fails.
    """
    for batch in DataLoader(
        ImageReader(images, batches, vqgan.processor), batch_size=None, num_workers=num_workers
    ):
        if isinstance(batch, OSError):
            raise batch
        yield batch
