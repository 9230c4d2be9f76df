"""JSONL -> shards and random-order reading, against other libraries on the same rows; tokenize to
shards directly, against the way over JSONL.

    python -m tests.benchmarks.data --folder FOLDER     --tiny takes seconds, in its own folder

Prints a table and, last, one JSON line. A peer runs in the interpreter that has it (--peer_pythons
PATH…: virtual environments of their own, since some need other versions of torch); one that is in
none of them is null. Every reading is one fresh process that imports torch where it has it, opens
the data (start-up), and reads samples in one random order into numpy batches of 32.

`--large_gb 20` adds our loader as training uses it, on shards of that size: plan, mixture, 300
packed micro-batches.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from beingvl.artefact.files import to_json
from beingvl.artefact.manifest import MANIFEST_FILE, write_manifest
from beingvl.data.mixture import Mixture
from beingvl.data.packing import PackingPlan
from beingvl.data.shard_columns import Sample
from beingvl.data.shard_writer import ShardWriter
from beingvl.model.tokenizer_files import extend_tokenizer, load_tokenizer, save_tokenizer
from beingvl.vbpe.train_vbpe import train_vbpe
from beingvl.vbpe.visual_bpe import VisualBPE
from beingvl.vocab import LAYOUT_FILE, VocabLayout
from tests.code_folder import write_codes
from tests.model.small_models import llama3_tokenizer_file
from tests.tiny import LAYOUT as TINY_LAYOUT
from tests.tiny import write_tokenizer

PROGRAMS = Path(__file__).parent / "data_programs"
REPOSITORY = PROGRAMS.parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
SENTENCE = (
    "the image shows a small red car beside two people who are waiting for the bus in front of an "
    "old house with green windows and it seems to be raining while"
)
LAYOUT = VocabLayout(128256, 8192, 8192, 128000, 128001)
PEERS = ("ours", "datasets", "streaming", "litdata", "in_ram")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--folder", type=Path, help="scratch folder, kept; default: a temporary one")
    add("--rows", type=int, default=12_000, help="rows of about 14 kB")
    add("--copies", type=int, default=4, help="how often the larger file holds the rows")
    add("--read_rows", type=int, default=12_000, help="samples read in random order")
    add("--tokenize_rows", type=int, default=12_000, help="rows of two turns to tokenize")
    workers = "of orjson alone, and of tokenize: one a core; our build has its default"
    add("--processes", type=int, default=2, help=workers)
    repeats = "builds and readings of each kind, in turn; medians count"
    add("--repeats", type=int, default=3, help=repeats)
    large = "GB of shards, random ids, to measure our loader's memory on"
    add("--large_gb", type=float, default=0, help=large)
    add("--peer_pythons", nargs="*", default=[], help="interpreters that have the peers")
    add("--tiny", action="store_true", help="see that it runs, in seconds")
    args = parser.parse_args()
    args.num_merges, args.packed = LAYOUT.num_merges, 10_000_000
    if args.tiny:
        args.rows = args.read_rows = args.tokenize_rows = 40
        args.num_merges, args.packed, args.copies, args.repeats = 8, 100_000, 2, 1
        args.large_gb = 0.001
    with tempfile.TemporaryDirectory() as scratch:
        args.folder = args.folder or Path(scratch)
        measure(args)


def measure(args: argparse.Namespace) -> None:
    small, large = (
        args.folder / f"rows-{args.rows}x{copies}" / "rows.jsonl" for copies in (1, args.copies)
    )
    if not small.is_file():
        write_rows(small, args.rows, args.folder / "vbpe", args.num_merges)
    if not large.is_file():
        write_copies(small, large, args.copies)
    pythons = [sys.executable, *args.peer_pythons]
    line = report_builds(small, large, args, pythons)
    line["tokenize_direct_ratio"] = tokenize_ratio(args)
    rounds = [
        {peer: read_rate(peer, small, args, pythons) for peer in PEERS} for _ in range(args.repeats)
    ]
    reads = {peer: medians([found[peer] for found in rounds]) for peer in PEERS}
    efficiency, plan_seconds = packing_plan(args.packed)
    for peer, found in reads.items():
        shown = "absent"
        if found is not None:
            shown = (
                f"{found['tokens_per_second'] / 1e6:8.1f} M tokens/s  "
                f"{found['startup']:7.3f} s  {found['private'] / 1e6:8.1f} MB"
            )
        print(f"{peer:<10} {shown}")
    print(
        f"packing {args.packed:,} samples: {efficiency:.2%} full, {plan_seconds:.1f} s with "
        "drawing them"
    )
    field = {
        "tokens_per_second": "tokens_per_second",
        "startup_seconds": "startup",
        "private_bytes": "private",
    }
    line |= {
        key: {peer: found and found[name] for peer, found in reads.items()}
        for key, name in field.items()
    }
    if args.large_gb:
        line |= loader_on_large_data(args.folder / f"large-{args.large_gb}", args.large_gb)
    print(
        json.dumps(
            {**line, "packing_efficiency": efficiency, "packing_plan_seconds_10m": plan_seconds}
        )
    )


def report_builds(
    small: Path, large: Path, args: argparse.Namespace, pythons: list[str]
) -> dict[str, object]:
    """Print the table of JSONL -> shards; returns the ratios to orjson, for the larger file and
    for what it has more.
    """
    sizes = [path.stat().st_size / 1e6 for path in (small, large)]
    of_large, of_small = build_seconds(large, args, pythons), build_seconds(small, args, pythons)
    for name, program in (("pyarrow.json", "pyarrow_json"), ("jsonlines", "jsonlines_alone")):
        add_peer(of_small, name, pythons, program, small, args.processes)
    rates: dict[str, list[float]] = {}
    print(f"{'MB/s':<34} {sizes[0]:7.0f} MB {sizes[1]:7.0f} MB  without start-up")
    for name, found in of_small.items():
        seconds = [statistics.median(times) for times in (found, of_large.get(name)) if times]
        rates[name] = [size / time for size, time in zip(sizes, seconds, strict=False)]
        if len(seconds) == 2:
            rates[name].append((sizes[1] - sizes[0]) / max(1e-9, seconds[1] - seconds[0]))
        print(
            f"{name:<34}"
            + "".join(f" {rate:10.0f}" for rate in rates[name])
            + ("" if seconds else " absent")
        )
    print(
        json.dumps(
            {"seconds of the smaller file": of_small, "seconds of the larger file": of_large}
        )
    )
    names = (
        "orjson alone",
        "ours, beside its manifest",
        "ours, a file without a manifest",
        "ours, no decoding",
    )
    theirs, ours, bare, not_decoding = (rates[name] for name in names)
    if not theirs:
        return {"build_ratio_vs_orjson": None}
    return {
        "build_ratio_vs_orjson": ours[1] / theirs[1],
        "build_ratio_without_startup": ours[2] / theirs[2],
        "build_ratio_file_without_manifest": bare[1] / theirs[1],
        "build_ratio_without_decoding": not_decoding[1] / theirs[1],
    }


def write_copies(source: Path, target: Path, copies: int) -> None:
    """The rows `copies` times, with ids of their own."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(target, "wb") as out:
        for number in range(copies):
            with open(source, "rb") as file:
                for line in file:
                    out.write(line.replace(b'"id":"r', b'"id":"%d-r' % number, 1))


def write_rows(path: Path, count: int, vbpe_folder: Path, num_merges: int) -> None:
    """Rows as `beingvl tokenize` writes them: 1024 codes, merged to about 716 by 8192 merges, 40
    to 300 tokens of text.
    """
    random = np.random.default_rng(0)
    path.parent.mkdir(parents=True, exist_ok=True)
    grids = textured_grids(count, random)
    np.save(path.with_name("learn.npy"), grids[:1000])
    train_vbpe(
        [path.with_name("learn.npy")],
        vbpe_folder,
        init_size=LAYOUT.num_vq,
        num_merges=num_merges,
        overwrite=True,
    )
    vbpe = VisualBPE.load(vbpe_folder)
    assert isinstance(vbpe, VisualBPE)
    streams, ends = vbpe.encode_batch(grids)
    with open(path, "w") as file:
        for number in range(count):
            image = (grids[number].ravel().astype(int) + LAYOUT.first_image_id).tolist()
            merged = (streams[ends[number] : ends[number + 1]] + LAYOUT.first_image_id).tolist()
            text = [
                LAYOUT.eoi_id,
                *random.integers(0, 128_000, int(random.integers(40, 300))).tolist(),
                LAYOUT.eos_id,
            ]
            turns = [
                {"from": "human", "value": "<image>\nWhat is in it? " * 4},
                {"from": "gpt", "value": "a thing " * 40},
            ]
            row = {
                "id": f"r{number}",
                "image": f"a/{number}.jpg",
                "category": ("foundation", "perception")[number % 2],
            }
            row |= {
                "conversations": turns,
                "token_0": [LAYOUT.bos_id, LAYOUT.boi_id],
                "token_image": image,
            }
            row |= {
                "token_image_new": merged,
                "token_1": text,
                "target_spans": [[len(merged) + 10, len(merged) + 2 + len(text)]],
            }
            file.write(json.dumps(row, separators=(",", ":")) + "\n")


def textured_grids(count: int, random: np.random.Generator) -> np.ndarray:
    """Codes [count, 32, 32] of which 40 % lie in one of 2500 motifs of 2 x 2 cells and the
    others are drawn one by one.
    """
    motifs = random.integers(0, LAYOUT.num_vq, (2500, 2, 2), np.uint16)
    blocks = random.integers(0, LAYOUT.num_vq, (count, 16, 16, 2, 2), np.uint16)
    is_motif = random.random((count, 16, 16)) < 0.4
    blocks[is_motif] = motifs[random.integers(0, len(motifs), is_motif.sum())]
    return blocks.transpose(0, 1, 3, 2, 4).reshape(count, 32, 32)


# ---- JSONL -> shards ----


def build_seconds(
    jsonl: Path, args: argparse.Namespace, pythons: list[str]
) -> dict[str, list[float]]:
    """Seconds for one file, `--repeats` times in turn. Ours are whole commands, with the start
    of Python and all imports; the others' time starts after their imports. `beside its manifest`
    is how `beingvl tokenize` leaves a file: its hash is known.
    """
    base, bare = args.folder / "base", jsonl.parent / "without-a-manifest"
    for folder in (base, bare):
        folder.mkdir(exist_ok=True)
    (base / LAYOUT_FILE).write_text(to_json(LAYOUT.to_dict()))
    write_manifest(base, "model", {}, {"vocab": LAYOUT.fingerprint()})
    if not (jsonl.parent / MANIFEST_FILE).is_file():
        write_manifest(
            jsonl.parent,
            "jsonl",
            {},
            {"vocab": LAYOUT.fingerprint()},
            {"layout": LAYOUT.to_dict(), "datasets": {}},
        )
    if not (bare / jsonl.name).is_file():
        (bare / jsonl.name).hardlink_to(jsonl)
    build = ["-m", "beingvl", "build-shards"]
    build += [f"--output_path={args.folder / 'ours'}", f"--model_path={base}"]
    decoding = [f"--vbpe_path={args.folder / 'vbpe'}"]
    seconds: dict[str, list[float]] = {}
    shutil.rmtree(args.folder / "ours", ignore_errors=True)
    warm_up = subprocess.run(
        [sys.executable, *build, *decoding, f"--jsonl_path={jsonl}"], stdout=subprocess.DEVNULL
    )
    assert (
        warm_up.returncode == 0
    )  # the file is in the page cache now, and the kernels are compiled
    for _ in range(args.repeats):
        for name, path, vbpe in (
            ("ours, a file without a manifest", bare / jsonl.name, decoding),
            ("ours, no decoding", jsonl, []),
            ("ours, beside its manifest", jsonl, decoding),
        ):
            shutil.rmtree(args.folder / "ours")
            started = time.perf_counter()
            subprocess.run(
                [sys.executable, *build, *vbpe, f"--jsonl_path={path}"],
                check=True,
                stdout=subprocess.DEVNULL,
            )
            seconds.setdefault(name, []).append(time.perf_counter() - started)
        add_peer(seconds, "orjson alone", pythons, "orjson_alone", jsonl, args.processes)
    return seconds


def add_peer(
    seconds: dict[str, list[float]],
    name: str,
    pythons: list[str],
    program: str,
    jsonl: Path,
    processes: int,
) -> None:
    """Append a reading; the list stays empty where no interpreter has the peer."""
    found = first_that_runs(pythons, [program, str(jsonl), str(processes)])
    seconds.setdefault(name, []).extend([] if found is None else [float(found)])


def first_that_runs(pythons: list[str], words: list[str]) -> str | None:
    """Last line of a program, of `data_programs/`, in the first interpreter that succeeds, None
    when none does; why not is shown.
    """
    problems = []
    program = [str(PROGRAMS / f"{words[0]}.py"), *words[1:]]
    for python in pythons:
        done = subprocess.run([python, *program], capture_output=True, text=True, env=ENVIRONMENT)
        if done.returncode == 0:
            return (done.stdout.splitlines() or [""])[-1]
        problems.append((done.stderr.splitlines() or [""])[-1])
    print(f"absent: {problems}", file=sys.stderr)
    return None


# ---- tokenize -> shards ----


def tokenize_ratio(args: argparse.Namespace) -> float:
    """Seconds of tokenize and of build-shards for both variants, over those of tokenize to shards
    at once: whole commands.
    """
    llava, base, codes = write_llava(args.folder / "llava", args.tokenize_rows, args.tiny)
    out, vbpe = args.folder / "tokenized", args.folder / "vbpe"
    tokenize = ["tokenize", f"--json_path={llava}", f"--vq_codes={codes}", f"--vbpe_path={vbpe}"]
    tokenize += [f"--model_path={base}", f"--output_dir={out}", "--rows_per_part=1024"]
    tokenize += [f"--num_workers={args.processes}"]
    builds = [
        [
            "build-shards",
            f"--jsonl_path={out}/data_{variant}.jsonl",
            f"--output_path={out}-{variant}",
        ]
        for variant in ("base", "vbpe")
    ]
    builds[1].append(f"--vbpe_path={vbpe}")

    def seconds(*commands: list[str]) -> float:
        for folder in (out, *(out.with_name(f"{out.name}-{name}") for name in ("base", "vbpe"))):
            shutil.rmtree(folder, ignore_errors=True)
        started = time.perf_counter()
        for words in commands:
            subprocess.run(
                [sys.executable, "-m", "beingvl", *words], check=True, stdout=subprocess.DEVNULL
            )
        return time.perf_counter() - started

    times = [
        (seconds(tokenize, *builds), seconds([*tokenize, "--format=arrow"]))
        for _ in range(args.repeats)
    ]
    detour, direct = (statistics.median(column) for column in zip(*times, strict=True))
    print(
        f"tokenize {args.tokenize_rows:,} rows: over JSONL {detour:.1f} s, shards at once "
        f"{direct:.1f} s"
    )
    return detour / direct


def write_llava(folder: Path, count: int, tiny: bool) -> tuple[Path, Path, Path]:
    """(LLaVA JSON, model folder, codes): two turns a row, Llama-3's tokenizer but for `tiny`."""
    llava, base, codes = folder / "rows.json", folder / "base", folder / "codes"
    for path in (base, codes):
        path.mkdir(parents=True, exist_ok=True)
    if tiny:
        write_tokenizer(base, TINY_LAYOUT)
    else:
        shutil.copyfile(llama3_tokenizer_file(), folder / "tokenizer.model")
        tokenizer = load_tokenizer(folder, LAYOUT.num_text)
        extend_tokenizer(tokenizer, LAYOUT, "Llama-3")
        save_tokenizer(tokenizer, base)
    (base / LAYOUT_FILE).write_text(to_json(LAYOUT.to_dict()))
    write_manifest(base, "model", {}, {"vocab": LAYOUT.fingerprint()})
    random = np.random.default_rng(0)
    grids = textured_grids(count, random)
    names = sorted(f"a/{number}.jpg" for number in range(count))
    write_codes(codes, grids, LAYOUT.num_vq, {}, names)

    def say(most_words: int) -> str:
        return " ".join(
            random.choice(SENTENCE.split(), int(random.integers(most_words // 4, most_words)))
        )

    rows = []
    for number, name in enumerate(names):
        turns = [
            {"from": "human", "value": f"<image>\n{say(24)}?"},
            {"from": "gpt", "value": f"{say(100)}."},
            {"from": "human", "value": f"{say(24)}?"},
            {"from": "gpt", "value": f"{say(100)}."},
        ]
        category = ("foundation", "perception")[number % 2]
        rows.append(
            {"id": f"r{number}", "image": name, "category": category, "conversations": turns}
        )
    llava.write_text(json.dumps(rows))
    return llava, base, codes


# ---- reading ----


def medians(found: list[dict[str, float] | None]) -> dict[str, float] | None:
    """Of every number; None for a peer that is absent."""
    if found[0] is None:
        return None
    return {name: statistics.median(one[name] for one in found if one) for name in found[0]}


def read_rate(
    peer: str, jsonl: Path, args: argparse.Namespace, pythons: list[str]
) -> dict[str, float] | None:
    folder = args.folder / ("ours" if peer == "ours" else f"{peer}-{args.rows}")
    common = [str(jsonl), str(folder), str(args.read_rows)]
    if (
        peer not in ("ours", "in_ram")
        and not folder.is_dir()
        and first_that_runs(pythons, ["peer", peer, "prepare", *common]) is None
    ):
        return None
    found = first_that_runs(pythons, ["peer", peer, "read", *common])
    return None if found is None else json.loads(found)


def loader_on_large_data(folder: Path, gigabytes: float) -> dict[str, float]:
    """Start-up and peak private memory of our loader above a process that has imported torch;
    the second start finds its plan.
    """
    if not (folder / "manifest.json").is_file():
        random = np.random.default_rng(0)
        writer = ShardWriter(folder, LAYOUT, rows_per_shard=20_000)
        left = int(gigabytes * 250_000_000)  # tokens of four bytes
        while left > 0:
            ids = random.integers(0, LAYOUT.size, int(random.integers(640, 1100)), np.int32)
            writer.add(
                Sample(
                    f"r{left}",
                    "a.jpg",
                    "all",
                    ids,
                    np.array([[len(ids) - 100, len(ids)]], np.int32),
                )
            )
            left -= len(ids)
        writer.finish({"vocab": LAYOUT.fingerprint()}, {})
    size = sum(path.stat().st_size for path in folder.glob("*.arrow"))
    for start in ("first", "second"):
        done = subprocess.run(
            [sys.executable, str(PROGRAMS / "large_loader.py"), str(folder)],
            capture_output=True,
            text=True,
            check=True,
            env=ENVIRONMENT,
        )
        found: dict[str, float] = json.loads(done.stdout)
        first, seconds, private = (
            found[f"large_{name}"]
            for name in ("first_batch_seconds", "plan_seconds", "private_bytes")
        )
        times = f"first batch after {first:.2f} s, number of steps after {seconds:.2f} s"
        print(
            f"{size / 1e9:.1f} GB of shards, {start} start: {times}, {private / 1e6:.0f} "
            "MB private at the peak"
        )
    return found


# ---- packing ----


def packing_plan(count: int) -> tuple[float, float]:
    """(efficiency, seconds) of drawing and planning samples of two sources, log-normal lengths
    around 660 tokens.
    """
    lengths = np.random.default_rng(0).lognormal(6.5, 0.5, count).clip(20, 4096).astype(np.int32)
    source_of = (np.arange(len(lengths)) % 5 == 0).astype(np.uint8)
    started = time.perf_counter()
    mixture = Mixture(
        [np.flatnonzero(source_of == index) for index in (0, 1)],
        ["a", "b"],
        {"a": 0.8, "b": 0.2},
        0,
    )
    plan = PackingPlan(lambda start, stop: lengths[mixture.draw(start, stop)], len(lengths), 4096)
    return (
        plan.efficiency,
        time.perf_counter() - started,
    )  # the efficiency is known when all are planned


if __name__ == "__main__":
    main()
