"""vBPE against the `tokenizers` package (Rust BPE), on the same tokens: training time, encoding
speed, growth, memory.

    python -m tests.benchmarks.vbpe [--images 5000] [--merges 8192] [--repeats 3] [--tiny]

Needs tokenizers, scikit-learn and scikit-image (the photographs come in their wheels). Corpora, 32
x 32 codes out of 8192 each:

    real    crops of 20 photographs at 6 scales, flipped, turned, recoloured; codes of a two-level
            k-means of 8 x 8 pixel patches. Few photographs and no VQ-GAN: more repetitive than a
            photo collection, less smooth than a VQ-GAN's codes.
    low     independent codes, Zipf 0.6: hardly anything to merge
    high    Zipf 1.0, 45 % of the codes determined by their left or upper neighbour: every merge
            happens hundreds of times

`tokenizers` sees each image as one word of 1024 characters, and may use all cores; our trainer uses
one. The two run in turn. The last line is JSON: train_ratio, train_ratio_alpha, encode_ratio,
growth_slope, bytes_per_cell. --tiny takes a few images of `high` for every corpus: it only shows
that the benchmark runs.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

import numpy as np

from beingvl.vbpe.trainer import Trainer
from beingvl.vbpe.visual_bpe import VisualBPE

if TYPE_CHECKING:
    from tokenizers import Tokenizer

NUM_CODES = 8192
SIDE = 32
DEFAULT_ALPHA = 0.3
PHOTOGRAPHS = [
    "astronaut",
    "brick",
    "camera",
    "cat",
    "cell",
    "coffee",
    "coins",
    "grass",
    "gravel",
    "hubble_deep_field",
    "logo",
]
PHOTOGRAPHS += [
    "immunohistochemistry",
    "moon",
    "page",
    "retina",
    "rocket",
    "text",
    "stereo_motorcycle",
]


# ---- corpora ----


def real_codes(num_images: int, seed: int = 0) -> np.ndarray:
    """[num_images, 32, 32] uint16, see the module docstring. Takes about a minute for 8000
    images, then comes from a cache.
    """
    from sklearn.cluster import MiniBatchKMeans

    cached = Path(tempfile.gettempdir()) / f"beingvl-benchmark-codes-{num_images}-{seed}.npy"
    if cached.exists():
        return np.load(cached)
    rng = np.random.default_rng(seed)
    scaled = scaled_photographs()
    coarse = MiniBatchKMeans(128, batch_size=4096, n_init=1, max_iter=20, random_state=seed)
    fine: list[MiniBatchKMeans] = []
    codes = np.empty((num_images, SIDE, SIDE), np.uint16)
    for start in range(0, num_images, 200):
        patches = np.concatenate(
            [crop_patches(scaled, rng) for _ in range(min(200, num_images - start))]
        )
        if not fine:
            group = coarse.fit_predict(patches)
            for number in range(128):
                members = patches[group == number]
                members = members if len(members) >= 64 else patches[rng.choice(len(patches), 64)]
                fine.append(
                    MiniBatchKMeans(
                        64, batch_size=1024, n_init=1, max_iter=20, random_state=seed
                    ).fit(members)
                )
        group = coarse.predict(patches)
        chunk = np.empty(len(patches), np.uint16)
        for number in np.unique(group):
            chunk[group == number] = 64 * number + fine[number].predict(patches[group == number])
        codes[start : start + 200] = chunk.reshape(-1, SIDE, SIDE)
    np.save(cached, codes)
    return codes


def scaled_photographs() -> list[np.ndarray]:
    """float32 [h, w, 3] in 0 … 1, every photograph at the scales where it is at least 256 x 256."""
    import skimage.data
    from skimage.transform import rescale
    from sklearn.datasets import load_sample_images

    photographs = list(load_sample_images().images)
    for name in PHOTOGRAPHS:
        loaded = getattr(skimage.data, name)()
        photographs += list(loaded[:2]) if isinstance(loaded, tuple) else [loaded]
    scaled = []
    for photograph in photographs:
        image = photograph.astype(np.float32) / 255
        image = np.repeat(image[..., None], 3, axis=2) if image.ndim == 2 else image[..., :3]
        for scale in (0.4, 0.6, 0.8, 1.0, 1.3, 1.7):
            if min(image.shape[:2]) * scale >= 257:
                scaled.append(
                    rescale(image, scale, order=1, anti_aliasing=scale < 1, channel_axis=2).astype(
                        np.float32
                    )
                )
    return scaled


def crop_patches(scaled: list[np.ndarray], rng: np.random.Generator) -> np.ndarray:
    """One random 256 x 256 crop as float32 [1024, 48]: its 8 x 8 patches, each averaged to 4 x 4
    pixels.
    """
    image = scaled[rng.integers(len(scaled))]
    top, left = rng.integers(image.shape[0] - 255), rng.integers(image.shape[1] - 255)
    crop = np.rot90(image[top : top + 256, left : left + 256], rng.integers(4))
    crop = crop[:, ::-1] if rng.random() < 0.5 else crop
    crop = crop[..., rng.permutation(3)] ** rng.uniform(0.6, 1.6) * rng.uniform(0.7, 1.0)
    pooled = crop.reshape(128, 2, 128, 2, 3).mean(axis=(1, 3))
    return pooled.reshape(SIDE, 4, SIDE, 4, 3).transpose(0, 2, 1, 3, 4).reshape(SIDE * SIDE, 48)


def zipf_codes(rng: np.random.Generator, exponent: float, num_images: int) -> np.ndarray:
    weights = 1.0 / np.arange(1, NUM_CODES + 1) ** exponent
    return rng.choice(NUM_CODES, size=(num_images, SIDE, SIDE), p=weights / weights.sum()).astype(
        np.uint16
    )


def low_codes(num_images: int) -> np.ndarray:
    return zipf_codes(np.random.default_rng(0), 0.6, num_images)


def high_codes(num_images: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    codes = zipf_codes(rng, 1.0, num_images)
    right_of, below = rng.permutation(NUM_CODES), rng.permutation(NUM_CODES)
    chance = rng.random(codes.shape)
    for y in range(SIDE):
        for x in range(SIDE):
            if x:
                copied = chance[:, y, x] < 0.225
                codes[copied, y, x] = right_of[codes[copied, y, x - 1]]
            if y:
                copied = chance[:, y, x] > 0.775
                codes[copied, y, x] = below[codes[copied, y - 1, x]]
    return codes


# ---- what is timed ----


def seconds(action: Callable[[], object]) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def train(codes: np.ndarray, num_merges: int, alpha: float) -> Trainer:
    trainer = Trainer([codes], NUM_CODES, alpha, 1.0, 2)
    trainer.learn(num_merges)
    return trainer


def as_words(codes: np.ndarray) -> list[str]:
    """Each image one word; code c is the character U+10000 + c, of which none is white space."""
    return [
        "".join(map(chr, image))
        for image in (codes.reshape(len(codes), -1).astype(int) + 0x10000).tolist()
    ]


def train_text_bpe(words: list[str], num_merges: int) -> Tokenizer:
    from tokenizers import Tokenizer, models, trainers

    tokenizer = Tokenizer(models.BPE())
    alphabet = [chr(0x10000 + code) for code in range(NUM_CODES)]
    trainer = trainers.BpeTrainer(
        vocab_size=NUM_CODES + num_merges, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(words, trainer)
    return tokenizer


def compare_training(
    name: str, codes: np.ndarray, num_merges: int, repeats: int
) -> dict[str, float]:
    """Median seconds of the three trainers, in turn."""
    words = as_words(codes)
    times: dict[str, list[float]] = {"ours": [], "ours_alpha": [], "text": []}
    tokenizer = None
    for _ in range(repeats):
        times["ours"].append(seconds(lambda: train(codes, num_merges, 0.0)))
        times["ours_alpha"].append(seconds(lambda: train(codes, num_merges, DEFAULT_ALPHA)))
        started = time.perf_counter()
        tokenizer = train_text_bpe(words, num_merges)
        times["text"].append(time.perf_counter() - started)
    found = {key: median(values) for key, values in times.items()}
    lengths = [
        train(codes, num_merges, alpha).num_tokens / len(codes) for alpha in (0.0, DEFAULT_ALPHA)
    ]
    lengths.append(
        sum(len(encoding.ids) for encoding in tokenizer.encode_batch(words[:500]))
        / min(500, len(words))
    )
    print(
        f"\n{name}: {len(codes)} images, {num_merges} merges        seconds   ratio   "
        "tokens per image"
    )
    for label, key, length in zip(
        ("vBPE alpha 0", f"vBPE alpha {DEFAULT_ALPHA}", "tokenizers"), found, lengths, strict=True
    ):
        print(
            f"  {label:<44}{found[key]:8.2f}{found[key] / found['text']:8.3f}{length:11.1f}",
            flush=True,
        )
    return found


def compare_encoding(codes: np.ndarray, num_merges: int, repeats: int) -> float:
    """Images per second, ours over theirs, both on all cores, each with the vocabulary it learnt
    from these images.
    """
    words = as_words(codes)
    num_threads = os.cpu_count() or 1
    vbpe = VisualBPE(NUM_CODES, train(codes, num_merges, DEFAULT_ALPHA).merges)
    tokenizer = train_text_bpe(words, num_merges)
    vbpe.encode_batch(codes[:2])
    ours, theirs, ours_single = [], [], []
    for _ in range(repeats):
        ours.append(seconds(lambda: vbpe.encode_batch(codes, num_threads)))
        theirs.append(seconds(lambda: tokenizer.encode_batch(words)))
        ours_single.append(seconds(lambda: vbpe.encode_batch(codes, 1)))
    ratio = median(theirs) / median(ours)
    print(f"\nencoding {len(codes)} real images                images/s   ratio")
    for label, times in (
        ("vBPE", ours),
        ("tokenizers encode_batch", theirs),
        ("vBPE, one thread", ours_single),
    ):
        print(
            f"  {label:<36}{len(codes) / median(times):12.0f}{median(theirs) / median(times):8.2f}",
            flush=True,
        )
    return ratio


def measure_growth(codes: np.ndarray, num_merges: int, repeats: int) -> float:
    """Slope of training time over images on logarithmic axes."""
    counts = [len(codes) // 8, len(codes) // 4, len(codes) // 2, len(codes)]
    times = []
    for n in counts:
        spent = [
            seconds(lambda n=n: train(codes[:n], num_merges, DEFAULT_ALPHA)) for _ in range(repeats)
        ]
        times.append(median(spent))
    shown = (f"{n} images {spent:.2f} s" for n, spent in zip(counts, times, strict=True))
    print("\ngrowth (real)  " + "  ".join(shown), flush=True)
    return float(np.polyfit(np.log(counts), np.log(times), 1)[0])


def peak_bytes_per_cell(codes: np.ndarray, num_merges: int) -> float:
    """Peak resident memory that training adds, in a process of its own that memory-maps the
    codes.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "codes.npy"
        np.save(path, codes)
        module = [sys.executable, "-m", "tests.benchmarks.vbpe"]
        command = [*module, "--peak_of", str(path), "--merges", str(num_merges)]
        return float(subprocess.check_output(command)) / codes.size


def print_peak(path: str, num_merges: int) -> None:
    """Bytes by which resident memory, sampled every 2 ms, exceeds what it was before training."""
    codes = np.load(path, mmap_mode="r")
    train(np.zeros((2, 4, 4), np.uint16), 3, DEFAULT_ALPHA)
    before = peak = resident_bytes()
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, resident_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    train(codes, num_merges, DEFAULT_ALPHA)
    done.set()
    watcher.join()
    print(max(peak, resident_bytes()) - before)


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def time_compilation() -> tuple[float, float]:
    """Seconds that a new process takes for its first trainer and encoder: (nothing cached,
    cached on disk).
    """
    code = (
        "import time, numpy as np; started = time.perf_counter()\n"
        "from beingvl.vbpe.visual_bpe import VisualBPE; from beingvl.vbpe.trainer import Trainer\n"
        "trainer = Trainer([np.zeros((2, 4, 4), np.uint16)], 2, 0.3, 1.0, 2); trainer.learn(3)\n"
        "vbpe = VisualBPE(2, trainer.merges); vbpe.decode(vbpe.encode(np.zeros((4, 4), "
        "int)), 4, 4)\n"
        "print(time.perf_counter() - started)"
    )
    with tempfile.TemporaryDirectory() as cache:
        environment = os.environ | {"NUMBA_CACHE_DIR": cache}
        command = [sys.executable, "-c", code]
        first, second = (subprocess.check_output(command, env=environment) for _ in range(2))
    return float(first), float(second)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--merges", type=int, default=8192)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tiny", action="store_true", help="a few seconds, for the tests")
    parser.add_argument("--peak_of", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak_of:
        return print_peak(args.peak_of, args.merges)
    if args.tiny:
        args.images, args.merges, args.repeats = 16, 16, 1

    packages = ", ".join(f"{name} {version(name)}" for name in ("numpy", "numba", "tokenizers"))
    print(
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, Python "
        f"{platform.python_version()}, {packages}"
    )
    print(f"load average {os.getloadavg()[0]:.1f}")
    if not args.tiny:
        first, second = time_compilation()
        cached = f"{second:.1f} s with the kernels cached on disk"
        print(f"first call in a process: {first:.1f} s compiling, {cached}", flush=True)
    train(np.zeros((2, 4, 4), np.uint16), 3, 0.0)
    train(np.zeros((2, 4, 4), np.uint16), 3, DEFAULT_ALPHA)
    if args.tiny:
        real = high_codes(args.images)
        corpora = {"real": real}
    else:
        real = real_codes(max(8000, args.images))
        corpora = {"real": real[: args.images], "low": low_codes(args.images)}
        corpora["high"] = high_codes(args.images)
    times = {
        name: compare_training(name, codes, args.merges, args.repeats)
        for name, codes in corpora.items()
    }
    memory = {name: peak_bytes_per_cell(codes, args.merges) for name, codes in corpora.items()}
    print(
        "\npeak memory, bytes per cell: "
        + ", ".join(f"{name} {value:.1f}" for name, value in memory.items()),
        flush=True,
    )
    result = {
        "train_ratio": max(found["ours"] / found["text"] for found in times.values()),
        "train_ratio_alpha": max(found["ours_alpha"] / found["text"] for found in times.values()),
        "encode_ratio": compare_encoding(corpora["real"], args.merges, args.repeats),
        "growth_slope": measure_growth(real[:8000], args.merges, args.repeats),
        "bytes_per_cell": max(memory.values()),
    }
    print()
    print(json.dumps({key: round(value, 4) for key, value in result.items()}))


if __name__ == "__main__":
    main()
