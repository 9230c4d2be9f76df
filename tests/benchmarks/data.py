"""JSONL -> shards and random-order reading, against other libraries on the same rows: python -m
tests.benchmarks.data

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
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from beingvl.artefact.files import to_json
from beingvl.commands import main as cli
from beingvl.data.mixture import Mixture
from beingvl.data.packing import PackingPlan
from beingvl.data.shard_columns import Sample
from beingvl.data.shard_writer import ShardWriter
from beingvl.vbpe.visual_bpe import VisualBPE
from beingvl.vocab import LAYOUT_FILE, VocabLayout

LAYOUT = VocabLayout(128256, 8192, 8192, 128000, 128001)
PEERS = ("ours", "datasets", "streaming", "litdata", "in_ram")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, required=True, help="scratch folder, kept")
    parser.add_argument("--rows", type=int, default=12_000, help="rows of about 14 kB")
    parser.add_argument(
        "--copies",
        type=int,
        default=4,
        help="the larger file to build holds the rows so many times",
    )
    parser.add_argument(
        "--read_rows", type=int, default=12_000, help="samples read in random order"
    )
    parser.add_argument(
        "--processes",
        type=int,
        default=2,
        help="of orjson alone: one a core; our build has its default",
    )
    parser.add_argument(
        "--repeats",
        type=int,
        default=3,
        help="builds and readings of each kind, in turn; medians count",
    )
    parser.add_argument(
        "--large_gb",
        type=int,
        default=0,
        help="GB of shards, random ids, to measure our loader's memory on",
    )
    parser.add_argument(
        "--peer_pythons", nargs="*", default=[], help="interpreters that have the peers"
    )
    args = parser.parse_args()
    small, large = (
        args.folder / f"rows-{args.rows}x{copies}" / "rows.jsonl" for copies in (1, args.copies)
    )
    if not small.is_file():
        write_rows(small, args.rows, args.folder / "vbpe")
    if not large.is_file():
        write_copies(small, large, args.copies)
    pythons = [sys.executable, *args.peer_pythons]
    line = report_builds(small, large, args, pythons)
    rounds = [
        {peer: read_rate(peer, small, args, pythons) for peer in PEERS} for _ in range(args.repeats)
    ]
    reads = {peer: medians([found[peer] for found in rounds]) for peer in PEERS}
    efficiency, plan_seconds = packing_of_ten_million()
    for peer, found in reads.items():
        shown = "absent"
        if found is not None:
            shown = (
                f"{found['tokens_per_second'] / 1e6:8.1f} M tokens/s  "
                f"{found['startup']:7.3f} s  {found['private'] / 1e6:8.1f} MB"
            )
        print(f"{peer:<10} {shown}")
    print(
        f"packing 10 million samples: {efficiency:.2%} full, {plan_seconds:.1f} s with drawing them"
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
    for name, code in (("pyarrow.json", PYARROW_JSON), ("jsonlines", JSONLINES)):
        add_peer(of_small, name, pythons, code, small, args.processes)
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


def write_rows(path: Path, count: int, vbpe_folder: Path) -> None:
    """Rows as `beingvl tokenize` writes them: 1024 codes, merged to about 716 by 8192 merges, 40
    to 300 tokens of text.
    """
    random = np.random.default_rng(0)
    path.parent.mkdir(parents=True, exist_ok=True)
    grids = textured_grids(count, random)
    np.save(path.with_name("learn.npy"), grids[:1000])
    learn = [
        f"--data_path={path.with_name('learn.npy')}",
        f"--output_path={vbpe_folder}",
        "--overwrite",
    ]
    assert (
        cli.main(
            [
                "train-vbpe",
                *learn,
                f"--init_size={LAYOUT.num_vq}",
                f"--num_merges={LAYOUT.num_merges}",
            ]
        )
        == 0
    )
    streams, ends = VisualBPE.load(vbpe_folder).encode_batch(grids)
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
    from beingvl.artefact.manifest import MANIFEST_FILE, write_manifest

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
        add_peer(seconds, "orjson alone", pythons, ORJSON_ALONE, jsonl, args.processes)
    return seconds


def add_peer(
    seconds: dict[str, list[float]],
    name: str,
    pythons: list[str],
    code: str,
    jsonl: Path,
    processes: int,
) -> None:
    """Append a reading; the list stays empty where no interpreter has the peer."""
    found = first_that_runs(pythons, ["-c", code, str(jsonl), str(processes)])
    seconds.setdefault(name, []).extend([] if found is None else [float(found)])


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
        and first_that_runs(pythons, ["-c", PEER, peer, "prepare", *common]) is None
    ):
        return None
    found = first_that_runs(pythons, ["-c", PEER, peer, "read", *common])
    return None if found is None else json.loads(found)


def loader_on_large_data(folder: Path, gigabytes: int) -> dict[str, float]:
    """Start-up and peak private memory of our loader above a process that has imported torch;
    the second start finds its plan.
    """
    if not (folder / "manifest.json").is_file():
        random = np.random.default_rng(0)
        writer = ShardWriter(folder, LAYOUT, rows_per_shard=20_000)
        left = gigabytes * 250_000_000  # tokens of four bytes
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
            [sys.executable, "-c", LARGE, str(folder)], capture_output=True, text=True, check=True
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


def packing_of_ten_million() -> tuple[float, float]:
    """(efficiency, seconds) of drawing and planning 10 million samples of two sources,
    log-normal lengths around 660 tokens.
    """
    lengths = (
        np.random.default_rng(0).lognormal(6.5, 0.5, 10_000_000).clip(20, 4096).astype(np.int32)
    )
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
