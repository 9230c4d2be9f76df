"""[1] Images -> vq_codes/: runs every image through the VQ-GAN once.

    beingvl encode-images --image_path images/ --vqgan vqgan/ --output vq_codes/

Started by a launcher (`deepspeed --module beingvl encode-images …`, `torchrun --nproc-per-node N -m
beingvl encode-images …`) or as a Slurm array, every rank does its share of the parts; after a kill,
start it again with any number of ranks. Unreadable images are rejected with a reason; beyond
--max_rejected the run fails. If the disk fails, the run ends after a few retries; the same command
continues it. The result does not depend on ranks, workers or kills. A finished output for
images of equal names, sizes and times (else equal content) is reused.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from beingvl.artefact.ranks import RankOf
from beingvl.commands.options import (
    ENCODER,
    ENCODER_DTYPES,
    EXIF,
    add_rank_arguments,
    add_row_format,
    options_of,
    share,
)
from beingvl.commands.parser import FILE, PLACE, VQGAN
from beingvl.errors import InputError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    images = "folder of images, searched recursively; or tar files or tables that hold them"
    add("--image_path", type=PLACE, nargs="+", help=images)
    add("--vqgan", dest="vq_path", type=VQGAN, required=True, help="VQ-GAN folder")
    add("--output", dest="output_path", type=Path, required=True, help="folder to write")
    named = "dataset rows, in any format that tokenize reads: encode only the images they name"
    add("--json_path", type=PLACE, nargs="+", help=named)
    add_row_format(parser)
    add("--list_path", type=FILE, help="text file, one image per line: encode only these")
    add("--batch_size", type=int, default=64, help="images per forward pass")
    part = "images per part; a kill loses only unfinished parts"
    add("--images_per_part", type=int, default=4096, help=part)
    add("--num_workers", type=int, default=0, help="image-reading processes; 0: only this one")
    add("--max_rejected", type=share, default=0.01, help="tolerated share of unreadable images")
    add("--exif", choices=["apply", "ignore"], default="apply", help=EXIF)
    add("--device", default="auto", help="torch device; auto is this rank's GPU, else cpu")
    add("--dtype", choices=ENCODER_DTYPES, default="auto", help=ENCODER)
    add_rank_arguments(parser)
    other = "replace codes of different images or of a different VQ-GAN"
    add("--overwrite", action="store_true", help=other)


def run(args: argparse.Namespace) -> None:
    # torch is imported here, so that --help is instant.
    from beingvl.data.collect_rows import open_rows
    from beingvl.data.llava_json import named_images
    from beingvl.images.encode_images import encode_images
    from beingvl.images.image_source import listed_images

    if args.json_path and args.list_path:
        raise InputError(
            "--json_path and --list_path both say which images to encode: give one of them"
        )
    keys = listed_images(args.list_path) if args.list_path else None
    options = options_of(args, "json_path", "row_format", "list_path")
    if args.json_path:
        rows = open_rows(
            args.json_path,
            args.output_path.with_name(f"{args.output_path.name}_rows"),
            row_format=args.row_format,
            rank=RankOf(options["rank"], options["num_ranks"]),
            overwrite=args.overwrite,
        )
        keys = named_images(rows.path)
        options["image_path"] = args.image_path or rows.containers
    if not options["image_path"]:
        raise InputError("give --image_path: a folder of images, tar files, or tables with images")
    encode_images(keys=keys, **options)
