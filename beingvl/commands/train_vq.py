"""Train a small VQ-GAN on a folder of images, so that trying beingvl needs no download.

  1. load_pixels       all images below IMAGE_PATH, preprocessed, in memory
      pixels [N, 3, H, W]
  2. train_steps       an auto-encoder without quantisation
      latents on the unit sphere
  3. cluster           spherical k-means of its latents
      [num_codes, embed_dim]
  4. train_steps       with quantisation, starting from that code book
  5. measure           PSNR and codes used on held-out images, a picture of reconstructions

Steps 2 and 3 matter: a code book started at random collapses to a few codes. Latents and code
vectors have length 1 because transformers' JanusVQVAE normalises code vectors when it decodes, so
the folder works there unchanged.

This is for small images and demonstrations (reconstruction loss only). For photographs bring a
published VQ-GAN.
"""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--image_path",
        type=Path,
        required=True,
        help="folder of images to train on, searched recursively",
    )
    parser.add_argument("--output_path", type=Path, required=True, help="VQ-GAN folder to write")
    parser.add_argument(
        "--validation_path",
        type=Path,
        help="folder of held-out images; without it one in ten of IMAGE_PATH",
    )
    parser.add_argument(
        "--image_size",
        type=int,
        default=16,
        help="side in pixels: shortest edge is resized to it, then cropped",
    )
    parser.add_argument(
        "--grid", type=int, default=8, help="side in codes; image_size / grid is a power of two"
    )
    parser.add_argument("--num_codes", type=int, default=64, help="size of the code book")
    parser.add_argument("--embed_dim", type=int, default=4, help="length of a code vector")
    parser.add_argument("--base_channels", type=int, default=64, help="channels, a multiple of 32")
    parser.add_argument(
        "--num_res_blocks", type=int, default=0, help="further residual blocks per resolution"
    )
    parser.add_argument(
        "--steps",
        type=int,
        default=600,
        help="optimizer steps, half of them before there are codes",
    )
    parser.add_argument("--batch_size", type=int, default=16, help="images per step")
    parser.add_argument(
        "--learning_rate",
        type=float,
        default=5e-3,
        help="at its peak; warm-up, then cosine, in each half",
    )
    parser.add_argument(
        "--max_images",
        type=int,
        default=20_000,
        help="use at most so many images, drawn with the seed",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of initialisation, batches and clusters"
    )
    parser.add_argument(
        "--num_threads", type=int, default=0, help="CPU threads; 0 is torch's choice"
    )
    parser.add_argument("--device", default="cpu", help="torch device")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace a VQ-GAN that was trained otherwise"
    )


def run(args: argparse.Namespace) -> None:
    from beingvl.images.train_vq import run as step

    step(args)
