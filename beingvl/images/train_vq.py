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
import io
import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm
from transformers import JanusVQVAE, JanusVQVAEConfig

from beingvl.artefact.manifest import already_made
from beingvl.errors import InputError
from beingvl.images.vq_codes import find_images, hash_images
from beingvl.images.vqgan import (
    MAX_CODES,
    VQGAN,
    make_processor,
    read_image,
    to_pixels,
    usable_device,
)

COMMITMENT = 0.25
"""Weight of pulling latents to their code vector, against pulling the code vector to its latents
(van den Oord et al. 2017).
"""
WARMUP_STEPS = 20
CLUSTER_IMAGES, CLUSTER_ROUNDS = 512, 20
PICTURE_FILE, PICTURE_IMAGES = "reconstructions.png", 16
REQUEST_FIELDS = (
    *("image_size", "grid", "num_codes", "embed_dim", "base_channels", "num_res_blocks"),
    *("steps", "batch_size", "learning_rate", "max_images", "seed"),
)


def run(args: argparse.Namespace) -> None:
    check_arguments(args)
    usable_device(args.device)
    folders = [args.image_path] + ([args.validation_path] if args.validation_path else [])
    images = {
        str(number): hash_images(folder, find_images(folder))
        for number, folder in enumerate(folders)
    }
    request = {**{name: getattr(args, name) for name in REQUEST_FIELDS}, "images": images}
    if already_made(args.output_path, "vqgan", request, args.overwrite):
        return
    if args.num_threads:
        torch.set_num_threads(args.num_threads)
    processor = make_processor(args.image_size)
    pixels, held_out = load_pixels(args, processor)
    generator = torch.Generator().manual_seed(args.seed)
    model = build_model(args).to(args.device)
    train_steps(model, pixels, args, generator, with_codes=False)
    model.quantize.embedding.weight.data.copy_(
        cluster(some_latents(model, pixels, generator), args.num_codes, generator)
    )
    train_steps(model, pixels, args, generator, with_codes=True)
    model.quantize.embedding.weight.data.copy_(unit_codebook(model))

    vqgan = VQGAN(model, processor, args.device, source=str(args.output_path))
    psnr, num_used = measure(vqgan, held_out)
    counts = {
        "images": len(pixels),
        "held_out_images": len(held_out),
        "held_out_codes_used": num_used,
    }
    details = {"held_out_psnr_decibels": round(psnr, 2), "request": request}
    vqgan.save(args.output_path, counts, details, {PICTURE_FILE: picture(vqgan, held_out)})
    found = (
        f"{psnr:.1f} dB PSNR, {num_used} of {args.num_codes} codes used on "
        f"{len(held_out)} held-out images"
    )
    print(f"{args.output_path}: {found}; see {args.output_path / PICTURE_FILE}")


def check_arguments(args: argparse.Namespace) -> None:
    factor = args.image_size / max(args.grid, 1)
    if args.grid < 1 or factor < 1 or not math.log2(factor).is_integer():
        raise InputError(
            f"--image_size {args.image_size} --grid {args.grid}: expected image_size / "
            "grid to be a power of two"
        )
    if args.base_channels < 32 or args.base_channels % 32:
        raise InputError(
            f"--base_channels is {args.base_channels}, expected a multiple of 32 (group "
            "normalisation)"
        )
    if not 2 <= args.num_codes <= MAX_CODES:
        raise InputError(f"--num_codes is {args.num_codes}, expected 2 … {MAX_CODES}")
    for name, least in (
        ("embed_dim", 2),
        ("num_res_blocks", 0),
        ("steps", 2),
        ("batch_size", 1),
        ("max_images", 2),
    ):
        if getattr(args, name) < least:
            raise InputError(f"--{name} is {getattr(args, name)}, expected at least {least}")


def load_pixels(args: argparse.Namespace, processor: object) -> tuple[torch.Tensor, torch.Tensor]:
    """Training and held-out pixels `[N, 3, H, W]` float32. Raises InputError for an unreadable
    image or too few of them.
    """

    def load(folder: Path, keys: list[str]) -> torch.Tensor:
        progress = tqdm(keys, desc=f"read {folder.name}", unit="image", disable=None)
        return torch.stack([to_pixels(processor, read_image(folder / key)) for key in progress])

    keys = find_images(args.image_path)
    order = torch.randperm(len(keys), generator=torch.Generator().manual_seed(args.seed))[
        : args.max_images
    ].tolist()
    if len(order) < 2:
        raise InputError(f"{args.image_path} has one image, expected at least 2")
    if args.validation_path:
        held_out = load(args.validation_path, find_images(args.validation_path)[: args.max_images])
        return load(args.image_path, [keys[n] for n in order]), held_out
    num_held_out = max(1, len(order) // 10)
    held_out = load(args.image_path, sorted(keys[n] for n in order[:num_held_out]))
    return load(args.image_path, [keys[n] for n in order[num_held_out:]]), held_out


def build_model(args: argparse.Namespace) -> JanusVQVAE:
    """A JanusVQVAE of the asked-for sizes, its convolutions scaled to their fan-in.

    The class's own initialisation (0.02 everywhere, made for its published sizes) learns slowly at
    these.
    """
    num_resolutions = int(math.log2(args.image_size // args.grid)) + 1
    config = JanusVQVAEConfig(
        embed_dim=args.embed_dim,
        num_embeddings=args.num_codes,
        latent_channels=32,
        base_channels=args.base_channels,
        channel_multiplier=[1] * num_resolutions,
        num_res_blocks=args.num_res_blocks,
        num_patches=args.grid,
    )
    torch.manual_seed(args.seed)
    model = JanusVQVAE(config)
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.reset_parameters()
    return model


def train_steps(
    model: JanusVQVAE,
    pixels: torch.Tensor,
    args: argparse.Namespace,
    generator: torch.Generator,
    with_codes: bool,
) -> None:
    """Half of the optimizer steps, with a learning-rate schedule of their own; the model is
    changed in place.
    """
    model.train()
    optimizer = torch.optim.AdamW(
        model.parameters(), betas=(0.9, 0.95), weight_decay=0.0, fused=True
    )
    num_steps = args.steps // 2
    progress = tqdm(
        range(num_steps),
        desc="with codes" if with_codes else "auto-encoder",
        unit="step",
        disable=None,
    )
    for step in progress:
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * learning_rate_factor(step, num_steps)
        batch = pixels[torch.randint(len(pixels), (args.batch_size,), generator=generator)]
        batch = batch.to(args.device)
        hidden, quantisation_loss = (
            encode_latents(model, batch),
            torch.zeros((), device=args.device),
        )
        if with_codes:
            hidden, quantisation_loss = quantise(model, hidden)
        reconstruction_loss = torch.nn.functional.mse_loss(
            model.decoder(model.post_quant_conv(hidden)), batch
        )
        (reconstruction_loss + quantisation_loss).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0:
            progress.set_postfix(
                psnr=f"{-10 * math.log10(reconstruction_loss.item() / 4 + 1e-10):.1f} dB"
            )


def learning_rate_factor(step: int, num_steps: int) -> float:
    """Linear warm-up, then half a cosine to 0."""
    return min(1.0, (step + 1) / WARMUP_STEPS) * 0.5 * (1 + math.cos(math.pi * step / num_steps))


def encode_latents(model: JanusVQVAE, pixels: torch.Tensor) -> torch.Tensor:
    """Pixels `[N, 3, H, W]` to latents `[N, embed_dim, h, w]` of length 1."""
    return torch.nn.functional.normalize(model.quant_conv(model.encoder(pixels)), dim=1)


def unit_codebook(model: JanusVQVAE) -> torch.Tensor:
    """Code vectors `[num_codes, embed_dim]` of length 1."""
    return torch.nn.functional.normalize(model.quantize.embedding.weight, dim=1)


def quantise(model: JanusVQVAE, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Nearest code vectors with the latents' gradient (straight-through), and the loss that
    pulls the two together.
    """
    codebook = unit_codebook(model)
    flat = latents.permute(0, 2, 3, 1)
    nearest = codebook[(flat @ codebook.T).argmax(-1)].permute(0, 3, 1, 2)
    pull_codes = (latents.detach() - nearest).square().mean()
    pull_latents = (latents - nearest.detach()).square().mean()
    return latents + (nearest - latents).detach(), pull_codes + COMMITMENT * pull_latents


def some_latents(
    model: JanusVQVAE, pixels: torch.Tensor, generator: torch.Generator
) -> torch.Tensor:
    """Latents `[n, embed_dim]` of some training images, on the CPU."""
    chosen = pixels[torch.randperm(len(pixels), generator=generator)[:CLUSTER_IMAGES]]
    device = model.quantize.embedding.weight.device
    with torch.no_grad():
        latents = torch.cat([encode_latents(model, part.to(device)) for part in chosen.split(64)])
    return latents.permute(0, 2, 3, 1).reshape(-1, latents.shape[1]).cpu()


def cluster(points: torch.Tensor, num_clusters: int, generator: torch.Generator) -> torch.Tensor:
    """Spherical k-means: `[n, d]` of length 1 to centres `[num_clusters, d]` of length 1.

    Centres start at points far from each other (k-means++, Arthur and Vassilvitskii 2007); an empty
    cluster keeps its centre.
    """
    centres = points[torch.randint(len(points), (1,), generator=generator)]
    distance = 1 - points @ centres[0]
    for _ in range(num_clusters - 1):
        chosen = points[torch.multinomial(distance.clamp_min(1e-9), 1, generator=generator)]
        centres = torch.cat([centres, chosen])
        distance = torch.minimum(distance, 1 - points @ chosen[0])
    for _ in range(CLUSTER_ROUNDS):
        nearest = (points @ centres.T).argmax(1)
        sums = torch.zeros_like(centres).index_add_(0, nearest, points)
        occupied = torch.bincount(nearest, minlength=num_clusters) > 0
        centres = torch.where(
            occupied[:, None], torch.nn.functional.normalize(sums, dim=1), centres
        )
    return centres


def measure(vqgan: VQGAN, pixels: torch.Tensor) -> tuple[float, int]:
    """PSNR in decibels over all pixels of the images, through encode and decode, and the number
    of different codes.
    """
    squared_error, used = 0.0, np.zeros(vqgan.num_codes, bool)
    for part in pixels.split(64):
        codes = vqgan.encode(part)
        used[codes] = True
        difference = vqgan.to_uint8(part).astype(np.float64) - vqgan.decode(codes)
        squared_error += float((difference**2).sum())
    mean = squared_error / pixels.numel()
    return -10 * math.log10(max(mean, 1e-10) / 255**2), int(used.sum())


def picture(vqgan: VQGAN, pixels: torch.Tensor) -> bytes:
    """A PNG: held-out images above, their reconstructions below."""
    shown = pixels[:: max(1, len(pixels) // PICTURE_IMAGES)][:PICTURE_IMAGES]
    rows = [
        np.concatenate(list(images), axis=1)
        for images in (vqgan.to_uint8(shown), vqgan.decode(vqgan.encode(shown)))
    ]
    image = Image.fromarray(np.concatenate(rows))
    scale = max(1, 64 // vqgan.image_size)
    file = io.BytesIO()
    image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST).save(
        file, "PNG"
    )
    return file.getvalue()
