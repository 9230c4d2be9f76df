"""Train a small VQ-GAN on a folder of images, so that trying beingvl needs no download.

    load_pixels      all images, preprocessed, in memory              pixels [N, 3, H, W]
    train_steps      an auto-encoder without quantisation             latents on the unit sphere
    cluster          spherical k-means of its latents                 [num_codes, embed_dim]
    train_steps      with quantisation, starting from that code book
    measure          PSNR and codes used on held-out images, a picture of reconstructions

The middle steps matter: a randomly initialised code book collapses to a few codes. Latents and code
vectors have length 1, because transformers' JanusVQVAE normalises code vectors when it decodes; so
the folder works there unchanged.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import JanusVQVAE, JanusVQVAEConfig

from beingvl.artefact.hashes import hash_bytes
from beingvl.artefact.manifest import Manifest, read_manifest
from beingvl.artefact.owner import making
from beingvl.artefact.progress import progress as show_progress
from beingvl.errors import InputError, check_at_least
from beingvl.images.decode import decode_image
from beingvl.images.image_source import ImageSource, open_images
from beingvl.images.preprocess import Preprocess
from beingvl.images.vq_codes import hash_line
from beingvl.images.vqgan import MAX_CODES, VQGAN, make_processor, usable_device

# Weight of pulling latents to their code vectors, relative to pulling code vectors to their latents
# (van den Oord et al. 2017).
COMMITMENT = 0.25
WARMUP_STEPS = 20
CLUSTER_IMAGES, CLUSTER_ROUNDS = 512, 20
PICTURE_FILE, PICTURE_IMAGES = "reconstructions.png", 16


@dataclass(frozen=True)
class Recipe:
    """What determines the VQ-GAN besides the images. Raises InputError for impossible sizes."""

    image_size: int
    grid: int
    num_codes: int
    embed_dim: int
    base_channels: int
    num_res_blocks: int
    steps: int
    batch_size: int
    learning_rate: float
    max_images: int
    seed: int

    def __post_init__(self) -> None:
        factor = self.image_size / max(self.grid, 1)
        if self.grid < 1 or factor < 1 or not math.log2(factor).is_integer():
            raise InputError(
                f"--image_size {self.image_size} --grid {self.grid}: expected image_size / grid to "
                "be a power of two"
            )
        if self.base_channels < 32 or self.base_channels % 32:
            raise InputError(
                f"--base_channels is {self.base_channels}, expected a multiple of 32 (group "
                "normalisation)"
            )
        if not 2 <= self.num_codes <= MAX_CODES:
            raise InputError(f"--num_codes is {self.num_codes}, expected 2 … {MAX_CODES}")
        check_at_least(2, embed_dim=self.embed_dim, steps=self.steps, max_images=self.max_images)
        check_at_least(1, batch_size=self.batch_size)
        check_at_least(0, num_res_blocks=self.num_res_blocks)


def train_vq(
    image_path: Path | str,
    output_path: Path | str,
    *,
    validation_path: Path | str | None = None,
    image_size: int = 16,
    grid: int = 8,
    num_codes: int = 64,
    embed_dim: int = 4,
    base_channels: int = 64,
    num_res_blocks: int = 0,
    steps: int = 600,
    batch_size: int = 16,
    learning_rate: float = 5e-3,
    max_images: int = 20_000,
    seed: int = 0,
    num_threads: int = 0,
    device: str = "auto",
    overwrite: bool = False,
) -> Manifest:
    """Write a VQ-GAN folder trained on the images below `image_path`; a finished folder of the same
    request is reused.

    Args:
        validation_path: held-out images; None holds out one in ten of `image_path`.
        grid: side in codes; image_size / grid is a power of two.
        steps: optimizer steps, half of them without quantisation.
        max_images: use at most this many images, drawn with the seed.

    Raises InputError for incompatible sizes, an unreadable image, or too few images.
    """
    sizes = (image_size, grid, num_codes, embed_dim, base_channels, num_res_blocks)
    recipe = Recipe(*sizes, steps, batch_size, learning_rate, max_images, seed)
    device = str(usable_device(device))
    paths = [Path(image_path)] + ([Path(validation_path)] if validation_path else [])
    output, sources = Path(output_path), [open_images([path]) for path in paths]
    keys = [source.keys() for source in sources]
    hashes = map(hash_images, sources, keys)
    images = {str(number): found for number, found in enumerate(hashes)}
    request = {**asdict(recipe), "images": images}
    if num_threads:
        torch.set_num_threads(num_threads)
    with making(output, "vqgan", request, overwrite) as is_new:
        if not is_new:
            return read_manifest(output)
        pixels = load_pixels(sources, keys, recipe, Preprocess(make_processor(image_size)))
        return _write_vqgan(output, *pixels, recipe, device, request)


def _write_vqgan(
    output: Path,
    pixels: torch.Tensor,
    held_out: torch.Tensor,
    recipe: Recipe,
    device: str,
    request: Mapping[str, Any],
) -> Manifest:
    processor = make_processor(recipe.image_size)
    vqgan = VQGAN(train_model(pixels, recipe, device), processor, device, source=str(output))
    psnr, num_used = measure(vqgan, held_out)
    num_held_out = len(held_out)
    counts = {
        "images": len(pixels),
        "held_out_images": num_held_out,
        "held_out_codes_used": num_used,
    }
    details = {"held_out_psnr_decibels": round(psnr, 2), "request": request}
    manifest = vqgan.save(output, counts, details, {PICTURE_FILE: picture(vqgan, held_out)})
    print(
        f"{output}: {psnr:.1f} dB PSNR, {num_used} of {recipe.num_codes} codes used on "
        f"{num_held_out} held-out images; see {output / PICTURE_FILE}"
    )
    return manifest


def train_model(pixels: torch.Tensor, recipe: Recipe, device: str) -> JanusVQVAE:
    """Train the auto-encoder, cluster its latents, then train with the code book."""
    generator = torch.Generator().manual_seed(recipe.seed)
    model = build_model(recipe).to(device)
    codebook = model.quantize.embedding.weight.data
    train_steps(model, pixels, recipe, generator, with_codes=False)
    codebook.copy_(cluster(some_latents(model, pixels, generator), recipe.num_codes, generator))
    train_steps(model, pixels, recipe, generator, with_codes=True)
    codebook.copy_(unit_codebook(model))
    return model


def hash_images(images: ImageSource, keys: list[str]) -> str:
    """One hash of the images' names and content."""
    progress = show_progress(keys, name="hash images", unit="image", leave=False)
    lines = [hash_line(key, images.read(key)) for key in progress]
    return hash_bytes("".join(lines).encode())


def load_pixels(
    sources: list[ImageSource], keys: list[list[str]], recipe: Recipe, preprocessing: Preprocess
) -> tuple[torch.Tensor, torch.Tensor]:
    """Training and held-out pixels `[N, 3, H, W]` float32."""

    def load(images: ImageSource, chosen: list[str]) -> torch.Tensor:
        progress = show_progress(chosen, name="read images", unit="image")
        pictures = ((decode_image(images.read(key), key), key) for key in progress)
        return preprocessing.to_pixels([preprocessing.crop(*picture) for picture in pictures])

    generator = torch.Generator().manual_seed(recipe.seed)
    drawn = torch.randperm(len(keys[0]), generator=generator)[: recipe.max_images].tolist()
    if len(drawn) < 2:
        raise InputError(f"there is one image, {keys[0][0]}; expected at least 2")
    if len(sources) == 2:
        held_out = load(sources[1], keys[1][: recipe.max_images])
        return load(sources[0], [keys[0][n] for n in drawn]), held_out
    num_held_out = max(1, len(drawn) // 10)
    held_out = load(sources[0], sorted(keys[0][n] for n in drawn[:num_held_out]))
    return load(sources[0], [keys[0][n] for n in drawn[num_held_out:]]), held_out


def build_model(recipe: Recipe) -> JanusVQVAE:
    """A JanusVQVAE of the requested sizes, its convolutions initialised by fan-in.

    With the class's own initialisation (0.02 everywhere, made for its published sizes), such small
    models learn slowly.
    """
    num_resolutions = int(math.log2(recipe.image_size // recipe.grid)) + 1
    config = JanusVQVAEConfig(
        embed_dim=recipe.embed_dim,
        num_embeddings=recipe.num_codes,
        latent_channels=32,
        base_channels=recipe.base_channels,
        channel_multiplier=[1] * num_resolutions,
        num_res_blocks=recipe.num_res_blocks,
        num_patches=recipe.grid,
    )
    torch.manual_seed(recipe.seed)
    model = JanusVQVAE(config)
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.reset_parameters()
    return model


def train_steps(
    model: JanusVQVAE,
    pixels: torch.Tensor,
    recipe: Recipe,
    generator: torch.Generator,
    with_codes: bool,
) -> None:
    """Run half of the optimizer steps, with their own learning-rate schedule."""
    model.train()
    device = model.quantize.embedding.weight.device
    optimizer = torch.optim.AdamW(
        model.parameters(), betas=(0.9, 0.95), weight_decay=0.0, fused=True
    )
    num_steps = recipe.steps // 2
    name = "2 of 2: with codes" if with_codes else "1 of 2: auto-encoder"
    progress = show_progress(range(num_steps), name=name, unit="step")
    for step in progress:
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * learning_rate_factor(step, num_steps)
        chosen = torch.randint(len(pixels), (recipe.batch_size,), generator=generator)
        batch = pixels[chosen].to(device)
        hidden, quantisation_loss = encode_latents(model, batch), torch.zeros((), device=device)
        if with_codes:
            hidden, quantisation_loss = quantise(model, hidden)
        decoded = model.decoder(model.post_quant_conv(hidden))
        reconstruction_loss = torch.nn.functional.mse_loss(decoded, batch)
        (reconstruction_loss + quantisation_loss).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0:
            psnr = -10 * math.log10(reconstruction_loss.item() / 4 + 1e-10)
            progress.set_postfix(psnr=f"{psnr:.1f} dB")


def learning_rate_factor(step: int, num_steps: int) -> float:
    """Half a cosine from 1 to 0, times a linear warm-up."""
    return min(1.0, (step + 1) / WARMUP_STEPS) * 0.5 * (1 + math.cos(math.pi * step / num_steps))


def encode_latents(model: JanusVQVAE, pixels: torch.Tensor) -> torch.Tensor:
    """Pixels `[N, 3, H, W]` to latents `[N, embed_dim, h, w]` of length 1."""
    return torch.nn.functional.normalize(model.quant_conv(model.encoder(pixels)), dim=1)


def unit_codebook(model: JanusVQVAE) -> torch.Tensor:
    """Code vectors `[num_codes, embed_dim]` of length 1."""
    return torch.nn.functional.normalize(model.quantize.embedding.weight, dim=1)


def quantise(model: JanusVQVAE, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Nearest code vectors, with straight-through gradients, and the loss that pulls code vectors
    and latents together.
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
    """Spherical k-means: points `[n, d]` of length 1 to centres `[num_clusters, d]` of length 1.

    Initial centres are points far from each other (k-means++, Arthur and Vassilvitskii 2007). An
    empty cluster keeps its centre.
    """
    centres = points[torch.randint(len(points), (1,), generator=generator)]
    distance = 1 - points @ centres[0]
    for _ in show_progress(range(num_clusters - 1), name="start clusters", unit="code"):
        chosen = points[torch.multinomial(distance.clamp_min(1e-9), 1, generator=generator)]
        centres = torch.cat([centres, chosen])
        distance = torch.minimum(distance, 1 - points @ chosen[0])
    for _ in show_progress(range(CLUSTER_ROUNDS), name="cluster", unit="round"):
        nearest = (points @ centres.T).argmax(1)
        sums = torch.zeros_like(centres).index_add_(0, nearest, points)
        occupied = torch.bincount(nearest, minlength=num_clusters) > 0
        centres = torch.where(
            occupied[:, None], torch.nn.functional.normalize(sums, dim=1), centres
        )
    return centres


def measure(vqgan: VQGAN, pixels: torch.Tensor) -> tuple[float, int]:
    """PSNR of the reconstructions in decibels, and the number of different codes used."""
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
    above, below = vqgan.to_uint8(shown), vqgan.decode(vqgan.encode(shown))
    image = Image.fromarray(
        np.concatenate([np.concatenate(list(above), 1), np.concatenate(list(below), 1)])
    )
    scale = max(1, 64 // vqgan.image_size)
    large = image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)
    file = io.BytesIO()
    large.save(file, "PNG")
    return file.getvalue()
