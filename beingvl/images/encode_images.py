"""[1] Images -> vq_codes/: encode every image with the VQ-GAN into one row of codes.

    open_images        a folder or tar files; all keys, or the given ones       N sorted keys
    EncodeImages       the work: `images_per_part` images are a part
      read_batches     read, hash and crop, in `num_workers` processes          [n, 3, H, W] uint8
      VQGAN.encode     the codes of a batch                                     [n, h, w] uint16
      join             codes.npy, keys.jsonl, key_offsets.npy, rejected.jsonl

The result does not depend on ranks, workers or kills.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader

from beingvl.artefact.files import write_atomically
from beingvl.artefact.hashes import hash_bytes
from beingvl.artefact.manifest import Manifest, is_complete, read_manifest
from beingvl.artefact.parts import Parts
from beingvl.artefact.progress import progress as show_progress
from beingvl.artefact.ranks import RankOf
from beingvl.artefact.request import Request
from beingvl.artefact.work import Work, killed_worker, run_in_parts
from beingvl.errors import InputError, check_at_least
from beingvl.images import vq_codes
from beingvl.images.decode import decode_image
from beingvl.images.image_source import ImageSource, open_images
from beingvl.images.preprocess import EXIF, Preprocess
from beingvl.images.vq_codes import (
    REJECTED_FILE,
    code_hash,
    hash_line,
    key_line,
    rejected_line,
    stamp_line,
)
from beingvl.images.vqgan import VQGAN, usable_device

FILES_OF_WORKER = 6  # open files per worker: pipes to and from it, and those that start it
PART_FILES = ("codes", "code_hashes", "keys", "rejected", "hashes", "stamps")


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
    exif: str = "apply",
    device: str = "auto",
    dtype: str = "auto",
    rank: int = 0,
    num_ranks: int = 1,
    overwrite: bool = False,
) -> Manifest | None:
    """Write the codes of images to the folder `output_path`; a finished folder of the same images
    is reused.

    Args:
        image_path: a folder of images, searched recursively, tar files, or tables that contain
            images; local paths or URLs.
        keys: the images to encode, by their path in the folder or tar; None takes all.
        images_per_part: images per part; a kill loses at most the unfinished parts.
        num_workers: processes that read images; 0 reads in this process.
        max_rejected: tolerated share of unreadable images, 0 … 1.
        exif: "apply" turns images as their EXIF orientation says, "ignore" leaves them as stored.
        device, dtype: "auto" is this rank's GPU in bfloat16, else the CPU in float32.
        rank, num_ranks: this process among those that share the work.

    Returns the manifest, or None when other ranks have not finished their parts yet. Raises
    InputError if the inputs are wrong, and OSError if the disk fails.
    """
    check_at_least(1, batch_size=batch_size, images_per_part=images_per_part)
    check_at_least(0, num_workers=num_workers, max_rejected=max_rejected)
    if exif not in EXIF:
        raise InputError(f"--exif is {exif!r}, expected one of {', '.join(EXIF)}")
    device, dtype = _device_and_dtype(device, dtype)
    paths = [image_path] if isinstance(image_path, Path | str) else image_path
    images = open_images(paths)
    chosen = images.keys() if keys is None else sorted(set(keys))
    if not chosen:
        raise InputError("no image is asked for: there is nothing to encode")
    work = EncodeImages(
        images,
        chosen,
        VQGAN.load(vq_path, device, getattr(torch, dtype), exif=exif),
        Path(output_path),
        batch_size,
        images_per_part,
        num_workers,
        max_rejected,
    )
    run_in_parts(work, RankOf(rank, num_ranks), overwrite=overwrite, name="encode images")
    return read_manifest(work.output) if is_complete(work.output) else None


def _device_and_dtype(device: str, dtype: str) -> tuple[str, str]:
    device = str(usable_device(device))
    if dtype == "auto":
        dtype = "bfloat16" if device.startswith("cuda") else "float32"
    return device, dtype


# ---- the work ----


@dataclass
class EncodeImages(Work):
    """Each part is `images_per_part` images in the files `PART_FILES`. The last two have one line
    per image, even if it could not be read.
    """

    images: ImageSource
    keys: list[str]
    vqgan: VQGAN
    output: Path
    batch_size: int
    images_per_part: int
    num_workers: int
    max_rejected: float
    kind = "vq_codes"
    unit = "image"
    rejected: list[str] = field(default_factory=list)  # lines of all parts made by this process

    def __post_init__(self) -> None:
        self.elsewhere = self.images.elsewhere(self.keys)  # taken before anything is read

    @property
    def num_parts(self) -> int:
        return -(-len(self.keys) // self.images_per_part)

    def keys_of_part(self, number: int) -> list[str]:
        first = number * self.images_per_part
        return self.keys[first : first + self.images_per_part]

    def size_of_part(self, number: int) -> int:
        return len(self.keys_of_part(number))

    def request_of_parts(self) -> Request:
        """Includes the batch size, which may change the last bit on a GPU."""
        names = hash_bytes("\n".join(self.keys).encode("utf-8", "surrogatepass"))
        sizes = {"images_per_part": self.images_per_part, "batch_size": self.batch_size}
        there = {f"content of {place}": found for place, found in self.elsewhere.items()}
        return Request(**self._encoder(), **{"image names": names}, **there, **sizes)

    def request(self) -> Request:
        return Request(**self._encoder(), images=self._hash_images())

    def _encoder(self) -> dict[str, str]:
        """Omits exif "ignore", which is what older versions did without an option."""
        exif = self.vqgan.preprocessing.exif
        named = {} if exif == "ignore" else {"exif": exif}
        return {"vqgan": self.vqgan.fingerprint(), "dtype": self.vqgan.dtype, **named}

    def _hash_images(self) -> str:
        """One hash of all images' names and content. If names, sizes and times equal those of the
        finished output, the images are not read again.
        """
        details = read_manifest(self.output, self.kind).details
        progress = show_progress(self.keys, name="compare images", unit="image", leave=False)
        stamps = "".join(stamp_line(key, self.images.stamp(key)) for key in progress)
        if details.get("image_stamps") == hash_bytes(stamps.encode()):
            return details["request"]["images"]
        lines = []
        for key in show_progress(self.keys, name="hash images", unit="image", leave=False):
            try:
                lines.append(hash_line(key, self.images.read(key)))
            except InputError:  # missing or unreadable, which is part of the hash
                lines.append(hash_line(key, None))
        return hash_bytes("".join(lines).encode())

    def write_part(self, number: int, folder: Path, advance: Callable[[int], object]) -> None:
        """Raises InputError as soon as this process has rejected too many images."""
        keys, size = self.keys_of_part(number), self.batch_size
        batches = [keys[start : start + size] for start in range(0, len(keys), size)]
        counts = {"images": 0, "rejected": 0}
        with naming_killed_workers(), ExitStack() as stack:
            files = {n: stack.enter_context(open(folder / n, "wb")) for n in PART_FILES}
            for batch in read_batches(self.images, batches, self.vqgan, self.num_workers):
                rejected = [rejected_line(key, reason) for key, reason in batch.rejected]
                if batch.keys:
                    pixels = self.vqgan.preprocessing.to_pixels(batch.cropped)
                    codes = self.vqgan.encode(pixels)
                    files["codes"].write(codes.astype("<u2").tobytes())
                    files["code_hashes"].write(b"".join(map(code_hash, batch.keys, codes)))
                files["keys"].write("".join(map(key_line, batch.keys)).encode())
                files["rejected"].write("".join(rejected).encode())
                files["hashes"].write("".join(batch.hashes).encode())
                files["stamps"].write("".join(batch.stamps).encode())
                counts["images"] += len(batch.keys)
                counts["rejected"] += len(rejected)
                self.rejected += rejected
                if rejected and len(self.rejected) > self.max_rejected * len(self.keys):
                    write_atomically(self.output / REJECTED_FILE, "".join(self.rejected))
                    raise self._too_many(len(self.rejected), self.rejected[-1])
                advance(len(batch.hashes))
        (folder / "counts.json").write_text(json.dumps(counts))

    def _too_many(self, num_rejected: int, last_line: str) -> InputError:
        return InputError(
            f"{num_rejected} of {len(self.keys)} images rejected so far, --max_rejected is "
            f"{self.max_rejected:g}; the last: {json.loads(last_line)['reason']}; all are in "
            f"{self.output / REJECTED_FILE}; repair them and start again with --overwrite, or "
            "raise --max_rejected"
        )

    def join(self, parts: Parts) -> None:
        """Raises InputError if too many or all images were rejected, or if images in an object
        store changed meanwhile.
        """
        for place, now in self.images.elsewhere(self.keys).items():
            if now != self.elsewhere[place]:
                raise InputError(
                    f"{place} changed while its images were read; start again with --overwrite "
                    "when it is complete"
                )

        def join(name: str, target: Path, head: bytes = b"") -> str:
            return parts.join(self.num_parts, name, target, head)

        output = self.output
        found = parts.read_json(self.num_parts, "counts.json")
        counts = {name: sum(part[name] for part in found) for name in ("images", "rejected")}
        hashes = {REJECTED_FILE: join("rejected", output / REJECTED_FILE)}
        if not counts["images"]:
            raise InputError(
                f"none of the {len(self.keys)} images could be read; the reasons are in "
                f"{output / REJECTED_FILE}; repair them and start again with --overwrite"
            )
        if counts["rejected"] > self.max_rejected * len(self.keys):
            lines = (output / REJECTED_FILE).read_text(encoding="utf-8").split("\n")
            raise self._too_many(counts["rejected"], lines[-2])
        for name, file, dtype, shape in (
            ("codes", vq_codes.CODES_FILE, "<u2", self.vqgan.grid),
            ("code_hashes", vq_codes.CODE_HASHES_FILE, "<u8", ()),
        ):
            header = vq_codes.npy_header(dtype, counts["images"], *shape)
            hashes[file] = join(name, output / file, header)
        hashes[vq_codes.KEYS_FILE] = join("keys", output / vq_codes.KEYS_FILE)
        images = join("hashes", parts.folder / "hashes")
        details = {
            "num_codes": self.vqgan.num_codes,
            "grid": list(self.vqgan.grid),
            "image_stamps": join("stamps", parts.folder / "stamps"),
            "request": Request(**self._encoder(), images=images),
        }
        exif = self.vqgan.preprocessing.exif
        lineage = {"vqgan": self.vqgan.fingerprint(), "exif": exif}
        vq_codes.finish_codes(output, counts, lineage, details, hashes)
        print(f"{output}: codes of {counts['images']} images, {counts['rejected']} rejected")


# ---- reading ----


@dataclass(frozen=True)
class Batch:
    """Consecutive images: readable ones `cropped`, each `[3, H, W]` uint8, the others `rejected` as
    (key, reason). No tensors, because torch sends them through /dev/shm, which is small in
    containers.

    `hashes` and `stamps` have one line per image, readable or not, in key order.
    """

    keys: list[str]
    cropped: list[np.ndarray]
    rejected: list[tuple[str, str]]
    hashes: list[str]
    stamps: list[str]


class ImageReader:
    """Random access to batches, for the worker processes of torch's DataLoader."""

    def __init__(
        self, images: ImageSource, batches: list[list[str]], preprocessing: Preprocess
    ) -> None:
        self._images, self._batches, self._preprocessing = images, batches, preprocessing

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, index: int) -> Batch | OSError:
        """Disk errors are returned: raised in a torch worker, they would print a traceback."""
        try:
            return self._read(self._batches[index])
        except OSError as error:
            return error

    def _read(self, batch: list[str]) -> Batch:
        found = Batch([], [], [], [], [])
        for key in batch:
            data = None
            # Taken before reading: a file that changes meanwhile is then read again next time.
            found.stamps.append(stamp_line(key, self._images.stamp(key)))
            try:
                data = self._images.read(key)
                found.cropped.append(self._preprocessing.crop(decode_image(data, key), key))
                found.keys.append(key)
            except InputError as error:
                found.rejected.append((key, str(error)))
            found.hashes.append(hash_line(key, data))
        return found


def read_batches(
    images: ImageSource, batches: list[list[str]], vqgan: VQGAN, num_workers: int
) -> Iterator[Batch]:
    """The batches in order, prefetched. Raises OSError if the disk fails, or up front if
    `num_workers` would open too many files: workers that torch had started would print tracebacks.
    """
    with ExitStack() as files:
        for _ in range(FILES_OF_WORKER * num_workers):
            files.enter_context(open(os.memfd_create("room"), "rb"))
    reader = ImageReader(images, batches, vqgan.preprocessing)
    for batch in DataLoader(reader, batch_size=None, num_workers=num_workers):
        if isinstance(batch, OSError):
            raise batch
        yield batch


@contextmanager
def naming_killed_workers() -> Iterator[None]:
    """torch raises this error wherever this process happens to be when the signal arrives."""
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker (pid"):
            raise
        raise killed_worker(" ".join(str(error).split())) from error
