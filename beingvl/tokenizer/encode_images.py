"""[1] Images -> vq_codes/: every image once through the VQ-GAN, one row of codes each.

  1. find_images or named_images   all images below IMAGE_PATH, or those that --json_path names, sorted     N keys
  2. read_batches                  read, hash and preprocess, in --num_workers processes    pixels [n, 3, H, W] float32
  3. VQGAN.encode                  the codes of a batch                                                [n, h, w] uint16
  4. CodeWriter                    codes.npy, keys.jsonl, rejected.jsonl, and manifest.json last

An unreadable image is rejected with its reason; past --max_rejected the run fails. Rows are in key order, whatever the batch
size and the number of workers.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from beingvl.tokenizer.vqgan import VQGAN, ChameleonImageProcessorPil


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--image_path", type=Path, required=True, help="folder of images, searched recursively")
    parser.add_argument("--vq_path", type=Path, required=True, help="VQ-GAN folder")
    parser.add_argument("--output_path", type=Path, required=True, help="folder to write")
    parser.add_argument("--json_path", type=Path, help="LLaVA JSON or JSONL: encode only the images it names")
    parser.add_argument("--batch_size", type=int, default=64, help="images per forward pass")
    parser.add_argument("--num_workers", type=int, default=0, help="processes that read images; 0 reads in this one")
    parser.add_argument("--max_rejected", type=float, default=0.01, help="share of unreadable images, 0 … 1, that is tolerated")
    parser.add_argument("--device", default="cpu", help="torch device")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32", help="of the encoder")
    parser.add_argument("--overwrite", action="store_true", help="replace codes of other images or of another VQ-GAN")


def run(args: argparse.Namespace) -> None:
    import torch
    from tqdm import tqdm

    from beingvl.manifest import already_made, hash_bytes, is_complete
    from beingvl.tokenizer.vq_codes import CodeWriter, find_images, hash_images
    from beingvl.tokenizer.vqgan import VQGAN

    check_arguments(args)
    keys = named_images(args.json_path) if args.json_path else find_images(args.image_path)
    vqgan = VQGAN.load(args.vq_path, args.device, getattr(torch, args.dtype))
    request = {"vqgan": vqgan.fingerprint(), "dtype": args.dtype}
    if is_complete(args.output_path) and not args.overwrite:
        already_made(args.output_path, "vq_codes", {**request, "images": hash_images(args.image_path, keys)})
        return
    writer = CodeWriter(args.output_path, len(keys), vqgan.grid, args.max_rejected)
    hashes: list[str] = []
    with writer, tqdm(total=len(keys), desc="encode images", unit="image", disable=None) as progress:
        for batch in read_batches(args.image_path, keys, vqgan, args.batch_size, args.num_workers):
            for key, reason in batch.rejected:
                writer.reject(key, reason)
            if batch.keys:
                writer.add(batch.keys, vqgan.encode(batch.pixels))
            hashes += batch.hashes
            progress.update(len(batch.hashes))
        request["images"] = hash_bytes("".join(hashes).encode())
        details = {"num_codes": vqgan.num_codes, "grid": list(vqgan.grid), "request": request}
        writer.finish({"vqgan": vqgan.fingerprint()}, details)
    print(f"{args.output_path}: codes of {writer.num_rows} images, {writer.num_rejected} rejected")


def check_arguments(args: argparse.Namespace) -> None:
    from beingvl.errors import InputError

    for name, least in (("batch_size", 1), ("num_workers", 0), ("max_rejected", 0)):
        if getattr(args, name) < least:
            raise InputError(f"--{name} is {getattr(args, name)}, expected at least {least}")
    if not args.image_path.is_dir():
        raise InputError(f"--image_path {args.image_path} is not a folder")


def named_images(json_path: Path) -> list[str]:
    """Sorted keys of the images that a LLaVA JSON array or JSONL file names. Raises InputError for a malformed file."""
    from beingvl.errors import InputError

    text = json_path.read_text(encoding="utf-8")
    try:
        rows = json.loads(text) if text.lstrip().startswith("[") else [json.loads(line) for line in text.splitlines() if line]
    except json.JSONDecodeError as error:
        raise InputError(f"{json_path} is neither a JSON array nor JSONL ({error})") from error
    keys: set[str] = set()
    for number, row in enumerate(rows, 1):
        image = row.get("image") if isinstance(row, dict) else 0
        named = [image] if isinstance(image, str) else image or []
        if not isinstance(row, dict) or not isinstance(named, list) or not all(isinstance(key, str) for key in named):
            raise InputError(f"{json_path}, row {number}: expected an object whose `image` is a path or a list of paths")
        keys.update(named)
    if not keys:
        raise InputError(f"{json_path} names no images: there is nothing to encode")
    return sorted(keys)


@dataclass(frozen=True)
class Batch:
    """Consecutive images: the readable ones as `pixels` `[len(keys), 3, H, W]`, the others as (key, reason).

    `hashes` has one line for each image, read or not, in key order.
    """

    keys: list[str]
    pixels: torch.Tensor
    rejected: list[tuple[str, str]]
    hashes: list[str]


class ImageReader:
    """Random access to batches, for the worker processes of torch's DataLoader."""

    def __init__(self, folder: Path, batches: list[list[str]], processor: ChameleonImageProcessorPil) -> None:
        self._folder, self._batches, self._processor = folder, batches, processor

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, index: int) -> Batch:
        import torch

        from beingvl.errors import InputError
        from beingvl.tokenizer.vq_codes import hash_line
        from beingvl.tokenizer.vqgan import decode_image, to_pixels

        keys, pixels, rejected, hashes = [], [], [], []
        for key in self._batches[index]:
            data = None
            try:
                data = self._read(key)
                pixels.append(to_pixels(self._processor, decode_image(data, key)))
                keys.append(key)
            except InputError as error:
                rejected.append((key, str(error)))
            hashes.append(hash_line(key, data))
        return Batch(keys, torch.stack(pixels) if pixels else torch.empty(0), rejected, hashes)

    def _read(self, key: str) -> bytes:
        from beingvl.errors import InputError

        if PurePosixPath(key).is_absolute() or ".." in PurePosixPath(key).parts:
            raise InputError(f"{key} leaves the image folder")
        try:
            return (self._folder / key).read_bytes()
        except OSError as error:
            raise InputError(f"{key}: {error.strerror}") from error


def read_batches(folder: Path, keys: list[str], vqgan: VQGAN, batch_size: int, num_workers: int) -> Iterator[Batch]:
    """All images in key order, `batch_size` at a time, read ahead by `num_workers` processes."""
    from torch.utils.data import DataLoader

    batches = [keys[start : start + batch_size] for start in range(0, len(keys), batch_size)]
    reader = ImageReader(folder, batches, vqgan.processor)
    yield from DataLoader(reader, batch_size=None, num_workers=num_workers)


if __name__ == "__main__":
    import sys

    from beingvl.cli import main

    sys.exit(main(["encode-images", *sys.argv[1:]]))
