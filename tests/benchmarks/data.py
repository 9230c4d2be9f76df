"""JSONL -> shards and random-order reading, against other libraries on the same rows: python -m tests.benchmarks.data

Prints a table and, last, one JSON line. A peer runs in the interpreter that has it (--peer_pythons PATH…: virtual environments of
their own, since some need other versions of torch); one that is in none of them is null. Every reading is one fresh process that
imports torch where it has it, opens the data (start-up), and reads samples in one random order into numpy batches of 32.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from beingvl import cli
from beingvl.data.mixture import Mixture
from beingvl.data.packing import plan_packing
from beingvl.manifest import to_json
from beingvl.vocab import LAYOUT_FILE, VocabLayout

LAYOUT = VocabLayout(128256, 8192, 8192, 128000, 128001)
PEERS = ("ours", "datasets", "streaming", "litdata", "in_ram")

PEER = r"""
import json, sys, time, os
import numpy as np
mode, action, jsonl, folder, count = sys.argv[1], sys.argv[2], sys.argv[3], sys.argv[4], int(sys.argv[5])
try:
    import torch
except ImportError:
    pass
import psutil

def rows():
    import orjson
    with open(jsonl, "rb") as file:
        for line in file:
            row = orjson.loads(line)
            yield np.array(row["token_0"] + row["token_image_new"] + row["token_1"], np.int32)



def prepare():
    if mode == "datasets":
        import datasets
        features = datasets.Features({"input_ids": datasets.Sequence(datasets.Value("int32"))})
        samples = lambda: ({"input_ids": ids} for ids in rows())
        datasets.Dataset.from_generator(samples, features=features, cache_dir=folder + "-cache").save_to_disk(folder)
    elif mode == "streaming":
        from streaming import MDSWriter
        with MDSWriter(out=folder, columns={"input_ids": "ndarray:int32"}) as out:
            for ids in rows():
                out.write({"input_ids": ids})
    elif mode == "litdata":
        from litdata.streaming.cache import Cache
        cache = Cache(folder, chunk_bytes="64MB")
        for number, ids in enumerate(rows()):
            cache[number] = {"input_ids": ids}
        cache.done()
        cache.merge()

def opened():
    if mode == "ours":
        from beingvl.data.arrow_shards import ShardReader
        reader = ShardReader(folder)
        return len(reader), lambda i: reader[i].input_ids
    if mode == "in_ram":
        data = [json.loads(line) for line in open(jsonl)]
        return len(data), lambda i: np.array(data[i]["token_0"] + data[i]["token_image_new"] + data[i]["token_1"], np.int32)
    if mode == "datasets":
        import datasets
        data = datasets.load_from_disk(folder).with_format("numpy")
        return len(data), lambda i: data[i]["input_ids"]
    if mode == "streaming":
        from streaming import LocalDataset
        data = LocalDataset(folder)
        return len(data), lambda i: data[i]["input_ids"]
    from litdata import StreamingDataset
    data = StreamingDataset(folder)
    return len(data), lambda i: data[i]["input_ids"]

if action == "prepare":
    prepare()
    sys.exit()
process = psutil.Process()
before = process.memory_full_info().uss
started = time.perf_counter()
length, get = opened()
get(0)
startup = time.perf_counter() - started
order = np.random.default_rng(0).permutation(length)[:count].tolist()
started, tokens = time.perf_counter(), 0
for at in range(0, len(order), 32):
    batch = np.concatenate([get(i) for i in order[at : at + 32]])
    tokens += len(batch)
seconds = time.perf_counter() - started
print(json.dumps({"startup": startup, "tokens_per_second": tokens / seconds, "private": process.memory_full_info().uss - before}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="scratch folder, kept")
    parser.add_argument("--rows", type=int, default=12_000, help="rows of about 14 kB")
    parser.add_argument("--read_rows", type=int, default=4_000, help="samples read in random order")
    parser.add_argument("--processes", type=int, default=2, help="for our build and for orjson alone")
    parser.add_argument("--peer_pythons", nargs="*", default=[], help="interpreters that have the peers")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    jsonl = args.folder / f"rows-{args.rows}.jsonl"
    if not jsonl.is_file():
        write_rows(jsonl, args.rows)
    pythons = [sys.executable, *args.peer_pythons]
    rates = build_rates(jsonl, args, pythons)
    reads = {peer: read_rate(peer, jsonl, args, pythons) for peer in PEERS}
    efficiency, plan_seconds = packing_of_ten_million()
    for name, value in rates.items():
        print(f"JSONL -> {name:<20} {'absent' if value is None else f'{value:8.0f} MB/s'}")
    for peer, found in reads.items():
        shown = "absent"
        if found is not None:
            shown = (
                f"{found['tokens_per_second'] / 1e6:8.1f} M tokens/s  {found['startup']:7.3f} s  {found['private'] / 1e6:8.1f} MB"
            )
        print(f"{peer:<10} {shown}")
    print(f"packing 10 million samples: {efficiency:.2%} full, {plan_seconds:.1f} s with drawing them")
    field = {"tokens_per_second": "tokens_per_second", "startup_seconds": "startup", "private_bytes": "private"}
    line = {"build_ratio_vs_orjson": rates["shards (ours)"] / rates["orjson alone"] if rates["orjson alone"] else None}
    line |= {key: {peer: found and found[name] for peer, found in reads.items()} for key, name in field.items()}
    print(json.dumps({**line, "packing_efficiency": efficiency, "packing_plan_seconds_10m": plan_seconds}))


def write_rows(path: Path, count: int) -> None:
    """Rows as `beingvl tokenize` writes them: 1024 codes, 600 to 800 merged, 40 to 300 tokens of text."""
    random = np.random.default_rng(0)
    with open(path, "w") as file:
        for number in range(count):
            image = random.integers(LAYOUT.first_image_id, LAYOUT.first_vbpe_id, 1024).tolist()
            merged = random.integers(LAYOUT.first_image_id, LAYOUT.size, int(random.integers(600, 800))).tolist()
            text = [LAYOUT.eoi_id, *random.integers(0, 128_000, int(random.integers(40, 300))).tolist(), LAYOUT.eos_id]
            turns = [{"from": "human", "value": "<image>\nWhat is in it? " * 4}, {"from": "gpt", "value": "a thing " * 40}]
            row = {"id": f"r{number}", "image": f"a/{number}.jpg", "category": ("foundation", "perception")[number % 2]}
            row |= {"conversations": turns, "token_0": [LAYOUT.bos_id, LAYOUT.boi_id], "token_image": image}
            row |= {"token_image_new": merged, "token_1": text, "target_spans": [[len(merged) + 10, len(merged) + 2 + len(text)]]}
            file.write(json.dumps(row, separators=(",", ":")) + "\n")


# ---- JSONL -> shards ----


def build_rates(jsonl: Path, args: argparse.Namespace, pythons: list[str]) -> dict[str, float | None]:
    """MB of JSONL per second; ours and orjson in as many processes, the others in one (pyarrow in all its threads)."""
    from beingvl.manifest import write_manifest

    base = args.folder / "base"
    base.mkdir(exist_ok=True)
    (base / LAYOUT_FILE).write_text(to_json(LAYOUT.to_dict()))
    write_manifest(base, "model", {}, {"vocab": LAYOUT.fingerprint()})
    megabytes = jsonl.stat().st_size / 1e6
    command = ["build-shards", f"--jsonl_path={jsonl}", f"--model_path={base}", f"--output_path={args.folder / 'ours'}"]
    started = time.perf_counter()
    assert cli.main([*command, f"--num_workers={args.processes}", "--overwrite", f"--part_bytes={16 << 20}"]) == 0
    rates: dict[str, float | None] = {"shards (ours)": megabytes / (time.perf_counter() - started)}
    codes = {
        "orjson alone": f"""
import orjson, sys, time
from concurrent.futures import ProcessPoolExecutor
def parse(part):
    start, stop = part
    with open({str(jsonl)!r}, "rb") as file:
        file.seek(start)
        if start: file.readline()
        while file.tell() < stop: orjson.loads(file.readline())
size = {jsonl.stat().st_size}
parts = [(s, min(s + (16 << 20), size)) for s in range(0, size, 16 << 20)]
started = time.perf_counter()
with ProcessPoolExecutor({args.processes}) as pool: list(pool.map(parse, parts))
print(time.perf_counter() - started)
""",
        "pyarrow.json": f"""
import time, pyarrow.json as j
started = time.perf_counter()
j.read_json({str(jsonl)!r}, read_options=j.ReadOptions(block_size=16 << 20))
print(time.perf_counter() - started)
""",
        "jsonlines": f"""
import time, jsonlines
started = time.perf_counter()
for row in jsonlines.open({str(jsonl)!r}): pass
print(time.perf_counter() - started)
""",
    }
    for name, code in codes.items():
        seconds = first_that_runs(pythons, ["-c", code])
        rates[name] = None if seconds is None else megabytes / float(seconds)
    return rates


def first_that_runs(pythons: list[str], arguments: list[str]) -> str | None:
    """Last line of the first interpreter that succeeds, None when none does; why not is shown."""
    problems = []
    for python in pythons:
        done = subprocess.run([python, *arguments], capture_output=True, text=True)
        if done.returncode == 0:
            return (done.stdout.splitlines() or [""])[-1]
        problems.append((done.stderr.splitlines() or [""])[-1])
    print(f"absent: {problems}", file=sys.stderr)
    return None


# ---- reading ----


def read_rate(peer: str, jsonl: Path, args: argparse.Namespace, pythons: list[str]) -> dict[str, float] | None:
    folder = args.folder / ("ours" if peer == "ours" else f"{peer}-{args.rows}")
    common = [str(jsonl), str(folder), str(args.read_rows)]
    if (
        peer not in ("ours", "in_ram")
        and not folder.is_dir()
        and first_that_runs(pythons, ["-c", PEER, peer, "prepare", *common]) is None
    ):
        return None
    found = first_that_runs(pythons, ["-c", PEER, peer, "read", *common])
    return None if found is None else json.loads(found)


# ---- packing ----


def packing_of_ten_million() -> tuple[float, float]:
    """(efficiency, seconds) of drawing and planning 10 million samples of two sources, log-normal lengths around 660 tokens."""
    lengths = np.random.default_rng(0).lognormal(6.5, 0.5, 10_000_000).clip(20, 4096).astype(np.int32)
    source_of = (np.arange(len(lengths)) % 5 == 0).astype(np.uint8)
    started = time.perf_counter()
    mixture = Mixture([np.flatnonzero(source_of == index) for index in (0, 1)], ["a", "b"], {"a": 0.8, "b": 0.2}, 0)
    plan = plan_packing(lambda start, stop: lengths[mixture.draw(start, stop)], len(lengths), 4096)
    return plan.efficiency, time.perf_counter() - started


if __name__ == "__main__":
    main()
