"""Convert a random checkpoint of real size and compare with `cp -r`: time, private memory,
differences.

    python -m tests.benchmarks.convert --size 8b      16 GB source; needs 35 GB of free disk
    python -m tests.benchmarks.convert --size 1b      tied embeddings, one file; needs 9 GB
    python -m tests.benchmarks.convert --tiny         see that it runs, in seconds

Each step runs after `sync` and its time ends with another `sync`, so that every writer pays for its
bytes; `cp -r` is timed before and after the conversions and the mean counts, because disks and
neighbours are noisy. The last line is one JSON object: `time_ratio_copy` (conversion with copies /
cp), `link_seconds`, `peak_private_bytes` (USS, sampled every 200 ms: a sample walks the page
tables, and more of them would slow the conversion), `max_abs_diff` (over all tensors of the
source). `cpu_seconds` are the processor's, of the conversion with copies and of the one with links:
on a busy machine they tell more.
"""

from __future__ import annotations

import argparse
import functools
import json
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors.torch import save_file

from beingvl.model.weight_files import WeightFolder
from tests.model.small_models import LLAMA3_ROPE, llama3_tokenizer_file, write_base_model

SIZES: dict[str, dict[str, Any]] = {
    "8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
    },
    "1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
    },
}
NUM_TEXT = 128_256
SHARD_BYTES = {"8b": 5_000_000_000, "1b": 1 << 40}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=list(SIZES), default="1b")
    parser.add_argument("--tiny", action="store_true", help="see that it runs, in seconds")
    parser.add_argument(
        "--folder", type=Path, help="where to work; default: a temporary folder, removed at the end"
    )
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="convert-benchmark-", dir=args.folder) as folder:
        result = measure(Path(folder), "tiny" if args.tiny else args.size)
    print(json.dumps(result))
    return 0


def measure(folder: Path, size: str) -> dict[str, Any]:
    source = folder / "llama"
    source_bytes = make_checkpoint(source, size)
    print(
        f"{size}: {source_bytes / 1e9:.2f} GB in {len(WeightFolder(source).files)} files",
        flush=True,
    )
    copy_seconds = [timed_copy(source, folder / "copied")]
    converted = convert(source, folder / "base", "--no_link")
    difference = largest_difference(source, folder / "base")
    shutil.rmtree(folder / "base")
    linked = convert(source, folder / "base", "--link")
    shutil.rmtree(folder / "base")
    copy_seconds.append(timed_copy(source, folder / "copied"))
    cp = statistics.mean(copy_seconds)
    ours = f"convert {converted['seconds']:.1f} s, linking {linked['seconds']:.1f} s"
    print(f"cp -r {copy_seconds[0]:.1f} and {copy_seconds[1]:.1f} s, {ours}")
    return {
        "size": size,
        "source_bytes": source_bytes,
        "cp_seconds": [round(seconds, 2) for seconds in copy_seconds],
        "copy_seconds": round(converted["seconds"], 2),
        "time_ratio_copy": round(converted["seconds"] / cp, 3),
        "link_seconds": round(linked["seconds"], 2),
        "cpu_seconds": [round(converted["cpu_seconds"], 1), round(linked["cpu_seconds"], 1)],
        "peak_private_bytes": max(converted["peak_private_bytes"], linked["peak_private_bytes"]),
        "max_abs_diff": difference,
    }


def make_checkpoint(folder: Path, size: str) -> int:
    """A random bf16 checkpoint of Llama 3's shape with the real tokenizer, or a tiny one; returns
    its bytes.
    """
    if size == "tiny":
        write_base_model(folder, "llama", "sharded", torch.bfloat16)
        return sum(path.stat().st_size for path in folder.iterdir())
    folder.mkdir()
    fields = SIZES[size]
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": "bfloat16",
        "vocab_size": NUM_TEXT,
        "num_key_value_heads": 8,
        "head_dim": fields["hidden_size"] // fields["num_attention_heads"],
        "max_position_embeddings": 131072,
        "rope_parameters": LLAMA3_ROPE,
        "rms_norm_eps": 1e-5,
        "bos_token_id": 128000,
        "eos_token_id": 128001,
        "tie_word_embeddings": size == "1b",
        **fields,
    }
    (folder / "config.json").write_text(json.dumps(config))
    shutil.copyfile(llama3_tokenizer_file(), folder / "tokenizer.model")
    weight_map: dict[str, str] = {}
    shards = list(shards_of(dict(tensor_shapes(config)), SHARD_BYTES[size]))
    for number, shapes in enumerate(shards, start=1):
        name = (
            f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            if len(shards) > 1
            else "model.safetensors"
        )
        save_file(
            {tensor: random_tensor(shape, tensor) for tensor, shape in shapes.items()},
            folder / name,
            {"format": "pt"},
        )
        weight_map |= dict.fromkeys(shapes, name)
    if len(shards) > 1:
        (folder / "model.safetensors.index.json").write_text(
            json.dumps({"metadata": {}, "weight_map": weight_map})
        )
    return sum(path.stat().st_size for path in folder.iterdir())


def tensor_shapes(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    kv = config["num_key_value_heads"] * config["head_dim"]
    yield "model.embed_tokens.weight", (NUM_TEXT, hidden)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        for name, rows, columns in [
            ("q", hidden, hidden),
            ("k", kv, hidden),
            ("v", kv, hidden),
            ("o", hidden, hidden),
        ]:
            yield f"{prefix}self_attn.{name}_proj.weight", (rows, columns)
        for name, rows, columns in [
            ("gate", inner, hidden),
            ("up", inner, hidden),
            ("down", hidden, inner),
        ]:
            yield f"{prefix}mlp.{name}_proj.weight", (rows, columns)
        yield f"{prefix}input_layernorm.weight", (hidden,)
        yield f"{prefix}post_attention_layernorm.weight", (hidden,)
    yield "model.norm.weight", (hidden,)
    if not config["tie_word_embeddings"]:
        yield "lm_head.weight", (NUM_TEXT, hidden)


def shards_of(
    shapes: dict[str, tuple[int, ...]], limit: int
) -> Iterator[dict[str, tuple[int, ...]]]:
    """Tensors in order, a new shard where the next tensor would pass `limit` bytes."""
    shard: dict[str, tuple[int, ...]] = {}
    used = 0
    for name, shape in shapes.items():
        num_bytes = 2 * int(torch.tensor(shape).prod())
        if shard and used + num_bytes > limit:
            yield shard
            shard, used = {}, 0
        shard[name] = shape
        used += num_bytes
    yield shard


def random_tensor(shape: tuple[int, ...], name: str) -> torch.Tensor:
    """bf16 normals, repeated from a pool of 32 M: incompressible enough for a disk, and 8 B of
    them come quickly.
    """
    count = int(torch.tensor(shape).prod())
    start = hash(name) % 1_000_003
    pool = normal_pool()
    flat = pool.roll(start) if count > 1 << 20 else pool[start : start + count]
    return flat.repeat(-(-count // len(flat)))[:count].view(shape)


@functools.cache
def normal_pool() -> torch.Tensor:
    return (torch.randn(1 << 25, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()


def timed_copy(source: Path, target: Path) -> float:
    seconds = timed(lambda: subprocess.run(["cp", "-r", source, target], check=True))
    shutil.rmtree(target)
    return seconds


def timed(work: Callable[[], object]) -> float:
    """Seconds of `work` and of the `sync` behind it."""
    subprocess.run(["sync"], check=True)
    started = time.perf_counter()
    work()
    subprocess.run(["sync"], check=True)
    return time.perf_counter() - started


def convert(source: Path, target: Path, option: str) -> dict[str, float]:
    """Run the command in a process of its own; {seconds, peak_private_bytes}."""
    peak = 0

    def work() -> None:
        nonlocal peak
        command = ["beingvl", "convert", "--llama_path", source, "--output_path", target, option]
        process = psutil.Popen([sys.executable, "-m", *map(str, command)])
        while process.poll() is None:
            try:
                peak = max(peak, process.memory_full_info().uss)
            except psutil.NoSuchProcess:
                break
            time.sleep(0.2)
        assert process.wait() == 0, "the conversion failed"

    used = children_cpu_seconds()
    seconds = timed(work)
    return {
        "seconds": seconds,
        "cpu_seconds": children_cpu_seconds() - used,
        "peak_private_bytes": peak,
    }


def children_cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def largest_difference(source: Path, target: Path) -> float:
    """Over every tensor of the source; of embedding and head, the text rows."""
    ours, theirs = WeightFolder(target), WeightFolder(source)
    largest = 0.0
    for name in theirs:
        for block, expected in zip(
            ours[name][: len(theirs[name])].split(4096), theirs[name].split(4096), strict=True
        ):
            if not torch.equal(block, expected):
                largest = max(largest, float((block.float() - expected.float()).abs().max()))
    return largest


if __name__ == "__main__":
    sys.exit(main())
