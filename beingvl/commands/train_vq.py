"""Train a small VQ-GAN on a folder of images, so that trying beingvl needs no download.

    beingvl train-vq --image_path images/ --output vqgan/

Trains an auto-encoder, clusters its latents with k-means, then trains on with that code book. For
small images and demonstrations (reconstruction loss only). For photographs use a published VQ-GAN.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from beingvl.commands.options import options_of
from beingvl.commands.parser import FILE

OPTIONS = {
    "image_size": (16, "side in pixels: the shortest edge is resized to it, then cropped"),
    "grid": (8, "side in codes; image_size / grid is a power of two"),
    "num_codes": (64, "size of the code book"),
    "embed_dim": (4, "length of a code vector"),
    "base_channels": (64, "channels, a multiple of 32"),
    "num_res_blocks": (0, "additional residual blocks per resolution"),
    "steps": (600, "optimizer steps; the first half trains without codes"),
    "batch_size": (16, "images per step"),
    "learning_rate": (5e-3, "peak learning rate; each half has a warm-up, then a cosine"),
    "max_images": (20_000, "use at most this many images, drawn with the seed"),
    "seed": (0, "seed of initialisation, batches and clusters"),
    "num_threads": (0, "CPU threads; 0 is torch's choice"),
    "device": ("auto", "torch device; auto is this rank's GPU, else cpu"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    images = "folder of training images, searched recursively; or a tar file or table of them"
    parser.add_argument("--image_path", type=FILE, required=True, help=images)
    folder = "VQ-GAN folder to write"
    parser.add_argument("--output", dest="output_path", type=Path, required=True, help=folder)
    held_out = "folder of held-out images; default: one in ten of IMAGE_PATH"
    parser.add_argument("--validation_path", type=FILE, help=held_out)
    for name, (default, help_text) in OPTIONS.items():
        parser.add_argument(f"--{name}", type=type(default), default=default, help=help_text)
    other = "replace a VQ-GAN that was trained with other settings"
    parser.add_argument("--overwrite", action="store_true", help=other)


def run(args: argparse.Namespace) -> None:
    # torch is imported here, so that --help is instant.
    from beingvl.images.train_vq import train_vq

    train_vq(**options_of(args))
