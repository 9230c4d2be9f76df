"""Adapters against full training in stages 2 and 3 of the quickstart: what they learn, and what
they cost. Both start from the same stage 1; `--folder` keeps what is finished, and goes on.

    python -m tests.benchmarks.lora [--seeds 0 1] [--rank 32] [--lr_multiplier 2] [--ranks 2]
                                    [--stage3_steps 600] [--folder FOLDER]
                                    --tiny takes less than a minute: stage 3 alone, on random data

The last line is one JSON object, means over the seeds:

    accuracy_full, accuracy_lora    on images that no stage has seen
    checkpoint_ratio                adapters / full, bytes of stage 3's last checkpoint
    memory_ratio                    adapters / full, peak of rank 0 in stage 3, libraries included
    step_time_ratio                 adapters / full, median step of stage 3
    trained_ratio                   adapters / full, trained parameters of stage 3
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from beingvl.train.checkpoint import read_state
from beingvl.train.checkpoint_folders import complete_checkpoints
from beingvl.train.metrics import read_metrics
from tests.launcher import ENVIRONMENT, log_of, start
from tests.tiny import write_inputs

REPOSITORY = Path(__file__).parents[2]
CONFIGS = REPOSITORY / "ds_configs"
RANDOM_DATA = ['beingvl.mixture={"foundation": 1}', "beingvl.packing=false"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--seeds", type=int, nargs="+", default=[0, 1])
    add("--rank", type=int, default=32)
    add("--lr_multiplier", type=float, default=2.0, help="of the adapters' learning rate")
    add("--ranks", type=int, default=2, help="processes of a training (default: 2)")
    add("--stage3_steps", type=int, default=600)
    add("--folder", type=Path, help="keep everything there")
    add("--tiny", action="store_true", help="see that it runs")
    args = parser.parse_args()
    if args.tiny:
        args.seeds, args.rank, args.stage3_steps = [0], 2, 2
    with tempfile.TemporaryDirectory(prefix="lora-benchmark-") as temporary:
        found = [
            measure((args.folder or Path(temporary)) / f"seed-{seed}", seed, args)
            for seed in args.seeds
        ]
    means = {}
    for name in found[0]:
        values = [one[name] for one in found if one[name] is not None]
        means[name] = round(statistics.mean(values), 4) if values else None
    print(json.dumps(means))


def measure(folder: Path, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    folder.mkdir(parents=True, exist_ok=True)
    if args.tiny:
        write_inputs(folder)
    else:
        run(
            folder,
            "bash",
            "scripts/quickstart.sh",
            "--inputs_only",
            RUN=f"{folder}",
            SEED=f"{seed}",
        )
        rows = "build-shards --jsonl_path tokenized/digits_vbpe.jsonl --vbpe vbpe --output shards"
        beingvl(folder, *rows.split())
        train(folder, 1, folder / "base", folder / "stage-1", [], args.ranks)
    full, lora = (run_stages(folder, name, args) for name in ("full", "lora"))
    print(f"seed {seed}: {json.dumps({'full': full, 'lora': lora})}", flush=True)
    return {
        "accuracy_full": full["accuracy"],
        "accuracy_lora": lora["accuracy"],
        "checkpoint_ratio": lora["checkpoint_bytes"] / full["checkpoint_bytes"],
        "memory_ratio": lora["peak_bytes"] / full["peak_bytes"],
        "step_time_ratio": lora["step_seconds"] / full["step_seconds"],
        "trained_ratio": lora["trained"] / full["trained"],
    }


def run_stages(folder: Path, name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Stages 2 and 3 after the common stage 1, and what they came to."""
    lora = {
        "lora": {"rank": args.rank, "alpha": 2 * args.rank},
        "lr_multiplier": args.lr_multiplier,
    }
    frozen = {"match": ".*", "train": False}
    rules = {
        2: [{"match": "visual_rows"}, {"match": "layers[:25%]", **lora}, frozen],
        3: [{"match": ".*_rows"}, {"match": "norm"}, {"match": "layers[:]", **lora}, frozen],
    }
    model = folder / ("base" if args.tiny else "stage-1")
    for stage in (3,) if args.tiny else (2, 3):
        output = folder / f"{name}-{stage}"
        words = [f"beingvl.max_steps={args.stage3_steps}"] if stage == 3 else []
        words += RANDOM_DATA if args.tiny else []
        if name == "lora":
            words.append(f"beingvl.trainable={json.dumps(rules[stage])}")
        train(folder, stage, model, output, words, args.ranks)
        model = output
    newest = complete_checkpoints(model)[-1]
    rows = read_metrics(model)
    sizes = [path.stat().st_size for path in newest.glob("rank-*")]
    shapes = [entry["shape"] for entry in read_state(newest).parameters.values()]
    return {
        "accuracy": None if args.tiny else accuracy_of(folder, model),
        "checkpoint_bytes": sum(sizes),
        "peak_bytes": max(row["peak_memory_bytes"] for row in rows),
        "step_seconds": statistics.median(row["seconds"] for row in rows[1:]),
        "trained": sum(shape[0] * (shape[1] if len(shape) > 1 else 1) for shape in shapes),
    }


def train(
    folder: Path, stage: int, model: Path, output: Path, words: list[str], ranks: int
) -> None:
    """A stage of the quickstart."""
    final = model / "final" if (model / "final").is_dir() else model
    inputs = (CONFIGS / f"quickstart-stage{stage}.json", final, folder / "shards", output)
    code = start(ranks, *inputs, *words).wait()
    assert code == 0, log_of(output)[-3000:]


def accuracy_of(folder: Path, stage: Path) -> float:
    words = "evaluate --vbpe vbpe --json_path data/test.json --codes vq_codes/test"
    output = Path(f"{stage}-eval")
    beingvl(folder, *words.split(), f"--model={stage / 'final'}", f"--output={output}")
    return json.loads((output / "scores.json").read_text())["accuracy_mean"]


def beingvl(folder: Path, *words: str) -> None:
    run(folder, sys.executable, "-m", "beingvl", *words)


def run(folder: Path, *words: str, **variables: str) -> None:
    """In `folder`, but for scripts, which find their own."""
    words = tuple(f"{REPOSITORY / word}" if word.startswith("scripts/") else word for word in words)
    done = subprocess.run(
        words, cwd=folder, env={**ENVIRONMENT, **variables}, capture_output=True, text=True
    )
    assert done.returncode == 0, shlex.join(words) + done.stderr[-3000:]


if __name__ == "__main__":
    main()
