"""[1] Images -> vq_codes/: every image once through the VQ-GAN, one row of codes each.

    open_images        a folder or tar files; all keys, or those asked for      N sorted keys
    EncodeImages       the work: `images_per_part` images are a part
      read_batches     read, hash and preprocess, in `num_workers` processes    [n, 3, H, W] float32
      VQGAN.encode     the codes of a batch                                     [n, h, w] uint16
      join             codes.npy, keys.jsonl, key_offsets.npy, rejected.jsonl

The result does not depend on ranks, workers or kills.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from beingvl.artefact.files import write_atomically
from beingvl.artefact.hashes import hash_bytes
from beingvl.artefact.manifest import (
    Manifest,
    already_made,
    is_complete,
    read_manifest,
    start_folder,
)
from beingvl.artefact.parts import (
    OvertakenError,
    Parts,
    locked,
    refuse_overwrite_of_many,
    remove_parts,
)
from beingvl.errors import InputError
from beingvl.images import vq_codes
from beingvl.images.image_source import ImageSource, open_images
from beingvl.images.vq_codes import REJECTED_FILE, hash_line, key_line, rejected_line, stamp_line
from beingvl.images.vqgan import (
    VQGAN,
    ChameleonImageProcessorPil,
    decode_image,
    to_pixels,
    usable_device,
)


def encode_images(
    image_path: Path | str | Sequence[Path | str],
    vq_path: Path | str,
    output_path: Path | str,
    *,
    keys: Sequence[str] | None = None,
    batch_size: int = 64,
    images_per_part: int = 4096,
    num_workers: int = 0,
    max_rejected: float = 0.01,
    device: str = "auto",
    dtype: str = "auto",
    rank: int = 0,
    num_ranks: int = 1,
    overwrite: bool = False,
) -> Manifest | None:
    """Write the codes of images to the folder `output_path`; a finished one of the same images is
    reused.

    Args:
        image_path: a folder of images, searched recursively, or tar files.
        keys: which images, by their path below the folder or in the tar; None takes all.
        images_per_part: images that are finished, or lost by a kill, together.
        num_workers: processes that read images; 0 reads in this one.
        max_rejected: share of unreadable images, 0 … 1, that is tolerated.
        device, dtype: "auto" is this rank's GPU in bfloat16, else the CPU in float32.
        rank, num_ranks: this process among those that share the work.

    Returns the manifest, or None when other ranks have not finished their parts yet. Raises
    InputError for what is wrong with the inputs, and OSError when the disk fails.
    """
    sizes = {"batch_size": batch_size, "images_per_part": images_per_part}
    for name, size in sizes.items():
        if size < 1:
            raise InputError(f"--{name} is {size}, expected at least 1")
    for name, value in {"num_workers": num_workers, "max_rejected": max_rejected}.items():
        if not value >= 0:  # nor NaN
            raise InputError(f"--{name} is {value}, expected at least 0")
    output = Path(output_path)
    refuse_overwrite_of_many(overwrite, num_ranks, output)
    device, dtype = _device_and_dtype(device, dtype)
    paths = [image_path] if isinstance(image_path, Path | str) else image_path
    images = open_images([Path(path) for path in paths])
    keys = images.keys() if keys is None else sorted(set(keys))
    if not keys:
        raise InputError("no image is asked for: there is nothing to encode")
    vqgan = VQGAN.load(vq_path, device, getattr(torch, dtype))
    request = {"vqgan": vqgan.fingerprint(), "dtype": dtype}
    split = {"image names": hash_bytes("\n".join(keys).encode("utf-8", "surrogatepass")), **sizes}
    work = EncodeImages(images, keys, vqgan, output, sizes, num_workers, max_rejected)
    with locked(output):
        if overwrite:
            start_folder(output, "vq_codes")
            remove_parts(output)
        is_finished = is_complete(output)
        if is_finished:
            remove_parts(output)
        else:
            parts = Parts(output, {**request, **split})
            mine = [n for n in parts.missing(work.num_parts) if n % num_ranks == rank]
    if is_finished:  # without the lock: ranks look at all images side by side
        already_made(output, "vq_codes", {**request, "images": hash_now(output, images, keys)})
        return read_manifest(output)
    with suppress(OvertakenError):
        for number in mine:
            with parts.writing(number) as folder:
                work.write_part(folder, number)
    with locked(output):
        if parts.are_to_be_joined(work.num_parts, is_complete(output), rank, num_ranks):
            join_codes(parts, work, request)
            parts.remove()
    return read_manifest(output) if is_complete(output) else None


def _device_and_dtype(device: str, dtype: str) -> tuple[str, str]:
    """The launcher sets LOCAL_RANK, the number of this rank's GPU on its machine."""
    if device == "auto":
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"
    device = str(usable_device(device))
    if dtype == "auto":
        dtype = "bfloat16" if device.startswith("cuda") else "float32"
    return device, dtype


def hash_now(output: Path, images: ImageSource, keys: list[str]) -> str:
    """One hash of the images' names and content; images whose names, sizes and times are those
    of the finished output are not read again.
    """
    details = read_manifest(output, "vq_codes").details
    progress = tqdm(keys, desc="compare images", unit="image", disable=None, leave=False)
    stamps = hash_bytes("".join(stamp_line(key, images.stamp(key)) for key in progress).encode())
    if details.get("image_stamps") == stamps:
        return details["request"]["images"]
    lines = []
    for key in tqdm(keys, desc="hash images", unit="image", disable=None, leave=False):
        try:
            lines.append(hash_line(key, images.read(key)))
        except InputError:  # missing or unreadable: part of what the images are
            lines.append(hash_line(key, None))
    return hash_bytes("".join(lines).encode())


# ---- the work ----


class EncodeImages:
    """Encoding as work in parts; a part is the files codes, keys, rejected, hashes and stamps."""

    def __init__(
        self,
        images: ImageSource,
        keys: list[str],
        vqgan: VQGAN,
        output: Path,
        sizes: dict[str, int],
        num_workers: int,
        max_rejected: float,
    ) -> None:
        self.images, self.keys, self.vqgan, self.output = images, keys, vqgan, output
        self.batch_size, self.images_per_part = sizes["batch_size"], sizes["images_per_part"]
        self.num_workers, self.max_rejected = num_workers, max_rejected
        self.num_parts = -(-len(keys) // self.images_per_part)
        self._rejected: list[str] = []  # lines of all parts that this process has made

    def write_part(self, folder: Path, number: int) -> None:
        """Raises InputError as soon as too many of all images were rejected by this process."""
        first = number * self.images_per_part
        keys = self.keys[first : first + self.images_per_part]
        batches = [
            keys[start : start + self.batch_size] for start in range(0, len(keys), self.batch_size)
        ]
        files = {
            name: open(folder / name, "wb")
            for name in ("codes", "keys", "rejected", "hashes", "stamps")
        }
        counts = {"images": 0, "rejected": 0}
        progress = tqdm(total=len(keys), desc=f"part {number}", unit="image", disable=None)
        for batch in read_batches(self.images, batches, self.vqgan, self.num_workers):
            rejected = [rejected_line(key, reason) for key, reason in batch.rejected]
            if batch.keys:
                files["codes"].write(self.vqgan.encode(batch.pixels).astype("<u2").tobytes())
            for name, lines in {
                "keys": map(key_line, batch.keys),
                "rejected": rejected,
                "hashes": batch.hashes,
                "stamps": batch.stamps,
            }.items():
                files[name].write("".join(lines).encode())
            counts["images"] += len(batch.keys)
            counts["rejected"] += len(rejected)
            self._refuse_many_rejected(rejected)
            progress.update(len(batch.hashes))
        progress.close()
        for file in files.values():
            file.close()
        (folder / "counts.json").write_text(json.dumps(counts))

    def _refuse_many_rejected(self, lines: list[str]) -> None:
        self._rejected += lines
        if lines and len(self._rejected) > self.max_rejected * len(self.keys):
            write_atomically(self.output / REJECTED_FILE, "".join(self._rejected))
            self.refuse_rejected(len(self._rejected), self._rejected[-1])

    def refuse_rejected(self, num_rejected: int, last_line: str) -> None:
        """Raises InputError when more images were rejected than --max_rejected allows."""
        if num_rejected > self.max_rejected * len(self.keys):
            raise InputError(
                f"{num_rejected} of {len(self.keys)} images rejected so far, --max_rejected is "
                f"{self.max_rejected:g}; the last: {json.loads(last_line)['reason']}; all are in "
                f"{self.output / REJECTED_FILE}; images that are repaired now are read again with "
                "--overwrite"
            )


def join_codes(parts: Parts, work: EncodeImages, request: dict[str, Any]) -> None:
    """All parts to one folder. Raises InputError when too many images were rejected, or all."""
    output, vqgan = work.output, work.vqgan

    def join(name: str, target: Path, head: bytes = b"") -> str:
        return parts.join(work.num_parts, name, target, head)

    found = parts.read_json(work.num_parts, "counts.json")
    rows, rejected = (sum(part[name] for part in found) for name in ("images", "rejected"))
    hashes = {REJECTED_FILE: join("rejected", output / REJECTED_FILE)}
    if not rows:
        raise InputError(
            f"none of the {len(work.keys)} images could be read; the reasons are in "
            f"{output / REJECTED_FILE}; repaired images are read again with --overwrite"
        )
    if rejected:
        lines = (output / REJECTED_FILE).read_text(encoding="utf-8").split("\n")
        work.refuse_rejected(rejected, lines[-2])
    header = vq_codes.codes_header(rows, vqgan.grid)
    hashes[vq_codes.CODES_FILE] = join("codes", output / vq_codes.CODES_FILE, header)
    hashes[vq_codes.KEYS_FILE] = join("keys", output / vq_codes.KEYS_FILE)
    details = {
        "num_codes": vqgan.num_codes,
        "grid": list(vqgan.grid),
        "image_stamps": join("stamps", parts.folder / "stamps"),
        "request": {**request, "images": join("hashes", parts.folder / "hashes")},
    }
    counts = {"images": rows, "rejected": rejected}
    vq_codes.finish_codes(output, counts, {"vqgan": vqgan.fingerprint()}, details, hashes)
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
        """An error of the disk is returned: torch would turn one that is raised in a worker
        process into a traceback.
        """
        try:
            return self._read(self._batches[index])
        except OSError as error:
            return error

    def _read(self, batch: list[str]) -> Batch:
        keys, pixels, rejected, hashes, stamps = [], [], [], [], []
        for key in batch:
            data = None
            # The stamp comes first, so that a file that changes meanwhile is read again.
            stamps.append(stamp_line(key, self._images.stamp(key)))
            try:
                data = self._images.read(key)
                pixels.append(to_pixels(self._processor, decode_image(data, key)))
                keys.append(key)
            except InputError as error:
                rejected.append((key, str(error)))
            hashes.append(hash_line(key, data))
        stacked = torch.stack(pixels) if pixels else torch.empty(0)
        return Batch(keys, stacked, rejected, hashes, stamps)


def read_batches(
    images: ImageSource, batches: list[list[str]], vqgan: VQGAN, num_workers: int
) -> Iterator[Batch]:
    """The batches in their order, read ahead by `num_workers` processes. Raises OSError when the
    disk fails.
    """
    reader = ImageReader(images, batches, vqgan.processor)
    for batch in DataLoader(reader, batch_size=None, num_workers=num_workers):
        if isinstance(batch, OSError):
            raise batch
        yield batch
