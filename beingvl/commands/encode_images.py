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
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from beingvl.artefact.parts import add_rank_arguments

    parser.add_argument(
        "--image_path",
        type=Path,
        nargs="+",
        required=True,
        help="folder of images, searched recursively; or tar files",
    )
    parser.add_argument("--vq_path", type=Path, required=True, help="VQ-GAN folder")
    parser.add_argument("--output_path", type=Path, required=True, help="folder to write")
    parser.add_argument(
        "--json_path", type=Path, help="LLaVA JSON or JSONL: encode only the images it names"
    )
    parser.add_argument(
        "--list_path", type=Path, help="text file, one image a line: encode only these"
    )
    parser.add_argument("--batch_size", type=int, default=64, help="images per forward pass")
    parser.add_argument(
        "--images_per_part",
        type=int,
        default=4096,
        help="images that are finished, or lost by a kill, together",
    )
    parser.add_argument(
        "--num_workers", type=int, default=0, help="processes that read images; 0 reads in this one"
    )
    parser.add_argument(
        "--max_rejected",
        type=float,
        default=0.01,
        help="share of unreadable images, 0 … 1, that is tolerated",
    )
    parser.add_argument(
        "--device", default="auto", help="torch device; auto is this rank's GPU, else cpu"
    )
    parser.add_argument(
        "--dtype",
        choices=["auto", "float32", "bfloat16", "float16"],
        default="auto",
        help="of the encoder; auto is bfloat16 on a GPU, float32 on a CPU",
    )
    add_rank_arguments(parser)
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace codes of other images or of another VQ-GAN",
    )


def run(args: argparse.Namespace) -> None:
    from beingvl.images.encode_images import run as step

    step(args)
