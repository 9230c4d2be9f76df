"""Predicted memory of a rank (`beingvl plan`) against what real CPU ranks used, stage by stage.

    python -m tests.benchmarks.plan [--shape llama3.1-8b] [--layers 12] [--stages 1 2 3]
                                    [--sequence_length 256] [--ranks 2] [--steps 3] [--float32]
                                    [--set KEY=VALUE …] [--folder FOLDER]
                                    --tiny takes less than a minute

The model has the shape's width and random weights in files, as a real one has; a run is `beingvl
train` from its start to its checkpoint. The peak of a rank is its resident memory that is not a
file's, less what it had after its imports. Run it alone: it needs the memory that it prints first.

The last line is one JSON object: `cases`, one per stage, with predicted_bytes, peak_bytes (of the
rank that took most), ratio (predicted / peak) and peaks, by rank; and `worst_error`, the largest
|ratio - 1|.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models

from beingvl.artefact.files import to_json
from beingvl.artefact.manifest import write_manifest
from beingvl.data.shard_columns import Sample
from beingvl.data.shard_writer import ShardWriter
from beingvl.launch.known_shapes import SHAPES
from beingvl.launch.model_shapes import find_shape, named_shape
from beingvl.model.param_groups import plan_parameters
from beingvl.stage.stage_config import load_stage_config
from beingvl.train.memory import predict_memory
from beingvl.vocab import LAYOUT_FILE, VocabLayout
from tests.benchmarks.train import private_bytes, watch_private_memory
from tests.launcher import ENVIRONMENT, free_port

REPOSITORY = Path(__file__).parents[2]
ROWS_ON_DISK = 4096  # of a matrix, made at once


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--shape", choices=SHAPES, default="llama3.1-8b")
    add("--layers", type=int, help="instead of the shape's own number")
    add("--stages", nargs="+", default=["1", "2", "3"], help="N of ds_configs/stageN.json")
    add("--sequence_length", type=int, default=256)
    add("--ranks", type=int, default=2)
    add("--steps", type=int, default=3)
    add("--float32", action="store_true", help="instead of bf16")
    add("--set", dest="overrides", nargs="+", action="extend", default=[], metavar="KEY=VALUE")
    add("--folder", type=Path, help="keep model and logs there")
    add("--tiny", action="store_true", help="see that it runs")
    add("--rank_of", type=Path, help=argparse.SUPPRESS)
    add("words", nargs="*", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank_of:
        run_rank(args.rank_of, args.words)
    if args.tiny:
        args.shape, args.layers, args.stages, args.float32 = "smollm2-135m", 1, ["1"], True
        args.ranks, args.sequence_length, args.steps = 1, 64, 1
    with tempfile.TemporaryDirectory(prefix="plan-benchmark-") as folder:
        print(json.dumps(measure(args.folder or Path(folder), args)))


def measure(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    layout = write_inputs(folder, args)
    cases = {}
    for stage in args.stages:
        overrides = [
            f"train_batch_size={args.ranks}",
            f"bf16.enabled={json.dumps(not args.float32)}",
            f"beingvl.sequence_length={args.sequence_length}",
            f"beingvl.max_steps={args.steps}",
            'beingvl.mixture={"all": 1}',
            *args.overrides,
        ]
        file = REPOSITORY / f"ds_configs/stage{stage}.json"
        config = load_stage_config(file, overrides)
        shape = find_shape(folder / "base")
        planned = plan_parameters(shape.parameters, config.beingvl.trainable)
        memory = predict_memory(planned, shape.config, config, args.ranks)
        total = sum(memory.values())
        parts = ", ".join(f"{name} {amount / 1e9:.2f}" for name, amount in memory.items() if amount)
        print(f"stage {stage}: {args.ranks} ranks, {total / 1e9:.2f} GB each: {parts}", flush=True)
        peaks = run_stage(folder, stage, file, overrides, args.ranks)
        shown = ", ".join(f"{peak / 1e9:.2f}" for peak in peaks)
        print(f"stage {stage}: {shown} GB were used", flush=True)
        cases[f"stage{stage}"] = {
            "predicted_bytes": total,
            "peak_bytes": max(peaks),
            "ratio": round(total / max(peaks), 3),
            "peaks": peaks,
        }
    worst = max(abs(case["ratio"] - 1) for case in cases.values())
    print(f"{layout.size} ids; worst error {worst:.1%}")
    return {"worst_error": round(worst, 3), "cases": cases}


# ---- inputs ----


def write_inputs(folder: Path, args: argparse.Namespace) -> VocabLayout:
    """`base/`, with random weights in as many files as it has layers, and `shards/`."""
    shape = named_shape(args.shape)
    config = shape.config
    config.num_hidden_layers = args.layers or config.num_hidden_layers
    layout = VocabLayout(shape.num_text, 8192, 8192, bos_id=0, eos_id=1)
    config.architectures = ["LlamaForCausalLM"]
    write_model(folder / "base", config, layout, torch.float32 if args.float32 else torch.bfloat16)
    random = np.random.default_rng(0)
    writer = ShardWriter(folder / "shards", layout)
    for number in range(args.ranks * args.steps):
        ids = random.integers(0, layout.size, args.sequence_length).astype(np.int32)
        target = np.array([[1, args.sequence_length]], np.int32)
        writer.add(Sample(str(number), "", "all", ids, target))
    writer.finish({"vocab": layout.fingerprint()}, {})
    return layout


def write_model(folder: Path, config: Any, layout: VocabLayout, dtype: torch.dtype) -> None:
    """Shapes from transformers' own class, weights one file per tensor that is larger than 1 MB."""
    from transformers import LlamaForCausalLM

    folder.mkdir(parents=True)
    with torch.device("meta"):
        shapes = {
            name: value.shape for name, value in LlamaForCausalLM(config).state_dict().items()
        }
    files = {}
    for number, (name, shape) in enumerate(shapes.items()):
        files[name] = f"model-{number:05d}.safetensors"
        tensor = torch.empty(shape, dtype=dtype).normal_(std=0.02)
        save_file({name: tensor}, folder / files[name], {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(to_json({"weight_map": files}))
    config.save_pretrained(folder)
    # of its special ids, which the chat template of the final model names
    ids = (layout.bos_id, layout.eos_id, *range(layout.num_text, layout.num_text + 5))
    vocab = {f"<{token_id}>": token_id for token_id in ids}
    Tokenizer(models.WordLevel(vocab, unk_token="<0>")).save(f"{folder / 'tokenizer.json'}")
    (folder / LAYOUT_FILE).write_text(to_json(layout.to_dict()))
    write_manifest(folder, "model", {"parameters": 0}, {"vocab": layout.fingerprint()})


# ---- ranks ----


def run_stage(
    folder: Path, stage: str, file: Path, overrides: Sequence[str], num_ranks: int
) -> list[int]:
    """Train; the peak of every rank in bytes, above what it had after its imports."""
    output, port, processes = folder / f"stage-{stage}", str(free_port()), []
    words = [f"--deepspeed_config={file}", f"--model={folder / 'base'}", f"--output={output}"]
    words += [f"--data={folder / 'shards'}", "--debug", "--set", *overrides]
    imported = [folder / f"imported-{stage}-{rank}" for rank in range(num_ranks)]
    for rank in range(num_ranks):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(num_ranks)}
        # glibc would keep freed blocks of up to 32 MB: 0.9 GB in a rank of SmolLM2-135M
        place["MALLOC_MMAP_THRESHOLD_"] = str(1 << 20)
        environment = {**ENVIRONMENT, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, **place}
        command = [
            sys.executable,
            "-m",
            "tests.benchmarks.plan",
            f"--rank_of={imported[rank]}",
            "--",
        ]
        with open(folder / f"stage-{stage}-{rank}.log", "w") as log:
            process = subprocess.Popen(
                [*command, *words], env=environment, cwd=REPOSITORY, stdout=log, stderr=log
            )
        processes.append(process)
    peaks = watch_private_memory(processes, imported)
    codes = [process.wait() for process in processes]
    assert codes == [0] * num_ranks, (codes, (folder / f"stage-{stage}-0.log").read_text()[-3000:])
    return peaks


def run_rank(imported: Path, words: Sequence[str]) -> None:
    """Import, write down the private memory so far, train. Ends the process."""
    import transformers.models.llama.modeling_llama  # noqa: F401

    import beingvl.train.run_stage
    from beingvl.commands.main import main as beingvl

    imported.write_text(str(private_bytes(os.getpid())))
    sys.exit(beingvl(["train", *words]))


if __name__ == "__main__":
    main()
