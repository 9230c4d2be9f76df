"""Images to codes on one GPU: `beingvl encode-images` beside its floors, and whether vBPE and
loader keep up with 8 GPUs.

    python -m tests.benchmarks.gpu_encode [--images 2048] [--num_workers 16] [--tokens_per_second
    20000]
    python -m tests.benchmarks.gpu_encode --size tiny --images 64 --device cpu --num_workers 2
                a rehearsal

    reading       JPEG files of 640 x 480 read, decoded, resized and normalised by --num_workers
                  processes
    encoder       pixels that are on the device already, a batch again and again: as it is, with
                  channels last, and with cuDNN
                  trying out its kernels as well; in bf16 and as it is in float32
    whole         the command, from the list of images to the finished folder, with
                  --num_workers processes; loading included
    floor         the slower of reading and encoder: the command cannot be quicker
    vBPE          codes to image tokens, with all processors of this machine
    loader        packed micro-batches of 4096 tokens, by one thread, as every rank has one;
                  page-locked for a GPU

The VQ-GAN has the published shape (512 x 512 pixels, 32 x 32 codes out of 8192) and random weights;
pictures are enlarged noise. For vBPE the codes have neighbours that repeat (benchmarks/vbpe.py),
and the merges are their 8192 most frequent pairs side by side. --tokens_per_second is what one GPU
trains, of gpu_train.py; reading and vBPE are the host's, shared by its 8 GPUs. Not run on a GPU
yet. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

NUM_GPUS = 8
BATCH_SIZE = 64


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--size", choices=["published", "tiny"], default="published", help="of the VQ-GAN"
    )
    parser.add_argument("--images", type=int, default=2048)
    parser.add_argument(
        "--num_workers",
        type=int,
        default=len(os.sched_getaffinity(0)),
        help="processes that read images",
    )
    parser.add_argument(
        "--tokens_per_second", type=float, default=20_000, help="of training, on one GPU"
    )
    parser.add_argument(
        "--device", choices=["cuda", "cpu"], help="default: the GPU that torch finds"
    )
    args = parser.parse_args()
    name = args.device or ("cuda" if torch.cuda.is_available() else None)
    if name is None:
        print(
            "torch finds no GPU: nothing is measured; --device cpu --size tiny --images 64 "
            "rehearses it"
        )
        return 0
    with tempfile.TemporaryDirectory(prefix="gpu-encode-") as folder:
        print(json.dumps(measure(Path(folder), args, torch.device(name))))
    return 0


def measure(folder: Path, args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    write_vqgan(folder / "vqgan", args.size)
    write_images(folder / "images", args.images)
    rates = {"reading": reading_rate(folder, args.num_workers)}
    show("reading", rates["reading"], f"images/s, {args.num_workers} processes")
    encoder = encoder_rates(folder / "vqgan", device)
    for name, rate in encoder.items():
        show(name, rate, "images/s")
    rates["encoder"] = encoder["encoder, bfloat16"]
    rates["whole"] = whole_rate(folder, args, device)
    floor = min(rates["reading"], rates["encoder"])
    show("whole command", rates["whole"], f"images/s; its floor is {floor:,.1f}")
    rates["vbpe"] = vbpe_rate(args.size)
    show(
        "vBPE",
        rates["vbpe"],
        f"images/s; {NUM_GPUS} GPUs encode {NUM_GPUS * rates['encoder']:,.0f}",
    )
    rates["loader"] = loader_rate(folder / "shards", device)
    show(
        "loader, one rank",
        rates["loader"],
        f"tokens/s; its GPU trains {args.tokens_per_second:,.0f}",
    )
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "processors": len(os.sched_getaffinity(0)),
        **{f"{name}_per_second": round(rate, 1) for name, rate in (encoder | rates).items()},
        "gap_to_floor": round(floor / rates["whole"], 3),
        "reading_feeds_8_gpus": rates["reading"] >= NUM_GPUS * rates["encoder"],
        "vbpe_feeds_8_gpus": rates["vbpe"] >= NUM_GPUS * rates["encoder"],
        "loader_feeds_8_gpus": rates["loader"] >= args.tokens_per_second,
    }


def show(name: str, rate: float, unit: str) -> None:
    print(f"{name:<45} {rate:12,.1f} {unit}", flush=True)


def write_vqgan(folder: Path, size: str) -> None:
    from transformers import ChameleonVQVAE, ChameleonVQVAEConfig

    small = {
        "base_channels": 32,
        "channel_multiplier": [1, 1],
        "num_embeddings": 64,
        "latent_channels": 32,
        "resolution": 64,
    }
    torch.manual_seed(0)
    ChameleonVQVAE(ChameleonVQVAEConfig(**(small if size == "tiny" else {}))).save_pretrained(
        folder
    )


def write_images(folder: Path, count: int) -> None:
    """64 different pictures under `count` names."""
    from PIL import Image

    folder.mkdir()
    random = np.random.default_rng(0)
    for number in range(count):
        path = folder / f"{number:06d}.jpg"
        if number < 64:
            noise = random.integers(0, 256, (60, 80, 3), dtype=np.uint8)
            Image.fromarray(noise).resize((640, 480), Image.Resampling.BICUBIC).save(
                path, quality=90
            )
        else:
            os.link(folder / f"{number % 64:06d}.jpg", path)


def reading_rate(folder: Path, num_workers: int) -> float:
    """Images a second, from the first batch that arrived on, so that the start of the processes
    is left out.
    """
    from beingvl.images.encode_images import read_batches
    from beingvl.images.image_source import open_images
    from beingvl.images.vqgan import VQGAN

    images = open_images([folder / "images"])
    keys = images.keys()
    batches = [keys[start : start + BATCH_SIZE] for start in range(0, len(keys), BATCH_SIZE)]
    source = read_batches(images, batches, VQGAN.load(folder / "vqgan"), num_workers)
    first = len(next(source).keys) if num_workers == 0 or len(batches) > 2 * num_workers else 0
    started = time.perf_counter()
    count = sum(len(batch.keys) for batch in source)
    return (count or first) / (time.perf_counter() - started)


def encoder_rates(vqgan_folder: Path, device: torch.device) -> dict[str, float]:
    from beingvl.images.vqgan import VQGAN
    from tests.benchmarks.gpu_floors import seconds_of

    found = {}
    for dtype, layout, trying in (
        (torch.bfloat16, torch.contiguous_format, False),
        (torch.bfloat16, torch.channels_last, False),
        (torch.bfloat16, torch.channels_last, True),
        (torch.float32, torch.contiguous_format, False),
    ):
        vqgan = VQGAN.load(vqgan_folder, device, dtype)
        vqgan.model.to(memory_format=layout)
        side = vqgan.image_size
        pixels = (
            torch.randn(BATCH_SIZE, 3, side, side)
            .to(device, dtype)
            .contiguous(memory_format=layout)
        )
        name = f"encoder, {str(dtype).removeprefix('torch.')}"
        name += ", channels last" if layout == torch.channels_last else ""
        with torch.backends.cudnn.flags(enabled=True, benchmark=trying):
            seconds = seconds_of(partial(vqgan.encode, pixels), device, repeats=3, calls=2)
        found[name + (", tried kernels" if trying else "")] = BATCH_SIZE / seconds
    return found


def whole_rate(folder: Path, args: argparse.Namespace, device: torch.device) -> float:
    from beingvl.commands.main import main as beingvl

    words = [
        f"--image_path={folder / 'images'}",
        f"--vq_path={folder / 'vqgan'}",
        f"--output_path={folder / 'codes'}",
    ]
    started = time.perf_counter()
    code = beingvl(
        [
            "encode-images",
            *words,
            f"--device={device}",
            "--dtype=bfloat16",
            f"--num_workers={args.num_workers}",
        ]
    )
    assert code == 0
    return args.images / (time.perf_counter() - started)


def vbpe_rate(size: str) -> float:
    from beingvl.vbpe.visual_bpe import VisualBPE
    from tests.benchmarks.vbpe import NUM_CODES, high_codes

    codes = high_codes(200 if size == "tiny" else 4000)
    pairs = codes[:, :, :-1].astype(np.int64) * NUM_CODES + codes[:, :, 1:]
    kinds, counts = np.unique(pairs, return_counts=True)
    frequent = kinds[np.argsort(-counts, kind="stable")[:8192]]
    merges = np.stack(
        [frequent // NUM_CODES, frequent % NUM_CODES, 0 * frequent, 0 * frequent + 1], axis=1
    )
    vbpe = VisualBPE(NUM_CODES, merges.astype(np.int32))
    num_threads = len(os.sched_getaffinity(0))
    vbpe.encode_batch(codes[:8], num_threads)  # compiles
    started = time.perf_counter()
    vbpe.encode_batch(codes, num_threads)
    return len(codes) / (time.perf_counter() - started)


def loader_rate(folder: Path, device: torch.device) -> float:
    """Tokens a second in mixture order, collated as for one GPU."""
    from beingvl.data.arrow_shards import ShardReader
    from beingvl.data.stage_data import data_of
    from beingvl.stage.stage_config import load_stage_config
    from beingvl.train.window import WindowFetcher
    from tests.benchmarks.gpu_inputs import LAYOUTS, write_shards

    write_shards(folder, LAYOUTS["8b"], 2000)
    config = load_stage_config(
        Path(__file__).parents[2] / "ds_configs/stage3.json", ["train_batch_size=4"]
    )
    data = data_of(config, ShardReader(folder))
    fetcher = WindowFetcher(data, 4, 1, 0, 1, pin=device.type == "cuda")
    fetcher.fetch(0)
    started = time.perf_counter()
    num_tokens = sum(int(fetcher.fetch(step).counts[1]) for step in range(1, 61))
    fetcher.close()
    return num_tokens / (time.perf_counter() - started)


if __name__ == "__main__":
    sys.exit(main())
