"""Training on one GPU: every stage at two sequence lengths beside its floors; and against the
published way.

    python -m tests.benchmarks.gpu_train --size 8b                              stages 1, 2, 3
        (3 with offload of the optimizer)
    python -m tests.benchmarks.gpu_train --size 1b --against published          the same without
        offload, and the other side
    python -m tests.benchmarks.gpu_train --size tiny --device cpu --sequence_lengths 2048
        --against published    a rehearsal

The loop, the engine, the loader and the shipped ds_configs/stage*.json are the real ones; there are
no checkpoints, and weights and samples are random (gpu_inputs.py). A step has as many sequences as
one of the 8 GPUs of the published recipe would have. Every case is a process of its own with a time
limit: one that fails is a line of the table, and not the end. `--total_seconds` is the limit of
them all; what is left out then is named.

    tok/s       tokens, and target tokens, a second, over --steps steps after --warmup_steps
    MFU         FLOPs that the model needs (train/flops.py: frozen parts count what they need) /
                seconds / the data sheet's peak
    of rate     the same against the measured rate of a large bf16 product
    floor       seconds that a step needs at least: FLOPs with those of recomputation over that
                rate; the optimizer's bytes (28 a
                trained weight: master, moments, gradient, weight) over the copy rate; with offload
                2 bytes each way over PCIe as well. They are added up; what overlaps makes a step
                quicker than its floor
    peak GB     what torch allocated at most, beside what train/memory.py predicted
    phases      seconds of a step by phase, from --phase_steps further steps in which the GPU is
                waited for at every border

`--against published`: Hugging Face's Trainer with DeepSpeed ZeRO-2, one sample per micro-batch,
logits of all tokens, everything trained. The rows are the same, in our order, in bf16 with the same
optimizer and activation checkpointing, and as many are in an optimizer step as ours has. Losses are
not compared: the two sides start from different random weights (tests.benchmarks.train compares
them).

To tune, all off by default:

    --without_checkpointing 1 2     these stages keep all activations
    --compile_layers                torch.compile of every decoder layer (ZeRO-3's hooks break
                                    the graphs; try --set
                                    zero_optimization.stage=1, which on one GPU costs nothing)
    --fused_optimizer               torch's fused AdamW, also for a CPU offload
    --pad_vocabulary 128            head and embedding of a multiple of so many rows, as
                                    `beingvl convert` can make them
    --layers 20                     fewer layers: an offload of all of 8B needs 147 GB of host
                                    memory, 18 bytes a weight
    --set beingvl.loss_chunk_tokens=1024 zero_optimization.reduce_bucket_size=…
    train_micro_batch_size_per_gpu=2 …

Not run on a GPU yet: all of it. Run on a CPU: the tiny size. Not here: Liger's kernels, which want
one matrix for the head, or the model's own forward; DeepSpeed's DeepCompile, which takes over the
engine's forward; torchtitan and LLaMA-Factory.

The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[2]
RECIPE_GPUS = 8
OFFLOAD_STEPS = {
    "warmup_steps": 1,
    "steps": 2,
    "phase_steps": 1,
}  # a step takes as long as ten others
HOST_BYTES = (
    18  # an offloaded weight: master, two moments and gradient in float32, gradient in bf16
)
STATE_BYTES = (
    28  # a trained weight: master and two moments read and written, gradient read, weight written
)
NO_GPU = "torch finds no GPU: nothing is measured; --device cpu --size tiny rehearses it"


def main() -> int:
    args = parse_arguments()
    if args.child:
        run_child(json.loads(args.child))
        return 0
    device = args.device or find_gpu()
    if device is None:
        print(NO_GPU)
        return 0
    deadline = time.monotonic() + args.total_seconds
    with tempfile.TemporaryDirectory(prefix="gpu-train-") as folder:
        print(json.dumps(measure(Path(folder), args, device, deadline)))
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=["8b", "1b", "tiny"], default="8b")
    parser.add_argument("--stages", type=int, nargs="*", default=[1, 2, 3], choices=[1, 2, 3])
    parser.add_argument(
        "--sequence_lengths", type=int, nargs="+", default=[4096, 8192], help="tokens"
    )
    parser.add_argument("--steps", type=int, default=6, help="optimizer steps that are timed")
    parser.add_argument("--warmup_steps", type=int, default=3, help="optimizer steps before them")
    parser.add_argument(
        "--phase_steps", type=int, default=2, help="optimizer steps after them, for the phases"
    )
    parser.add_argument(
        "--case_seconds", type=float, default=240, help="limit of one case, in seconds"
    )
    parser.add_argument(
        "--total_seconds", type=float, default=570, help="limit of everything, in seconds"
    )
    parser.add_argument(
        "--device", choices=["cuda", "cpu"], help="default: the GPU that torch finds"
    )
    parser.add_argument(
        "--against",
        choices=["published"],
        help="measure the other side as well, everything trained",
    )
    parser.add_argument(
        "--without_checkpointing",
        type=int,
        nargs="*",
        default=[],
        help="stages that keep all activations",
    )
    parser.add_argument(
        "--compile_layers", action="store_true", help="torch.compile of every decoder layer"
    )
    parser.add_argument("--fused_optimizer", action="store_true", help="torch's fused AdamW")
    parser.add_argument("--layers", type=int, help="fewer decoder layers than the size has")
    parser.add_argument(
        "--pad_vocabulary", type=int, default=1, help="pad the vocabulary to a multiple of this"
    )
    parser.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="keys of the stage's JSON",
    )
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser.parse_args()


def find_gpu() -> str | None:
    import torch

    return "cuda" if torch.cuda.is_available() else None


# ---- the parent: cases one after another ----


def measure(folder: Path, args: argparse.Namespace, device: str, deadline: float) -> dict[str, Any]:
    from tests.benchmarks.gpu_inputs import LAYOUTS, write_model, write_shards

    write_model(folder / "base", args.size, args.pad_vocabulary, args.layers)
    write_shards(folder / "shards", LAYOUTS[args.size], 600 if args.size == "tiny" else 3000)
    common = {"folder": str(folder), "device": device}
    floors = run_case({**common, "kind": "floors"}, args, deadline)
    print_floors(floors)
    print(
        "case           tok/s  target tok/s     MFU  of rate    step s   floor s   "
        "peak GB  predicted GB"
    )
    found: dict[str, Any] = {}
    for case in cases_of(args):
        result = run_case({**common, **case}, args, deadline)
        if "error" not in result and case["kind"] == "ours":
            result |= floor_seconds(result, floors)
        found[case["name"]] = result
        print_case(case["name"], result, floors)
    ours = found.get(f"stage 3, {args.sequence_lengths[0]}", {}).get("target_tokens_per_second")
    theirs = found.get("published", {}).get("target_tokens_per_second")
    return {
        "size": args.size,
        "options": {key: value for key, value in vars(args).items() if key != "child"},
        "floors": floors,
        "cases": found,
        "target_tokens_ratio": round(ours / theirs, 3) if ours and theirs else None,
    }


def cases_of(args: argparse.Namespace) -> list[dict[str, Any]]:
    cases = [
        {"kind": "ours", "name": f"stage {stage}, {length}", **overrides_of(args, stage, length)}
        for length in args.sequence_lengths
        for stage in args.stages
    ]
    if args.against:  # in the order of the first of ours that trains everything
        cases.append(
            {
                "kind": "published",
                "name": "published",
                **overrides_of(args, 3, args.sequence_lengths[0]),
            }
        )
    return cases


def overrides_of(args: argparse.Namespace, stage: int, sequence_length: int) -> dict[str, Any]:
    """A case: the shipped stage, what is changed in it, and how many steps."""
    shipped = REPOSITORY / f"ds_configs/stage{stage}.json"
    fields = json.loads(shipped.read_text())
    steps = {name: getattr(args, name) for name in OFFLOAD_STEPS}
    offload = (
        args.size == "8b" and stage == 3
    )  # 16 bytes a weight are 130 GB: masters and moments go to the host
    if offload:
        steps = {name: min(steps[name], most) for name, most in OFFLOAD_STEPS.items()}
    overrides = {
        "train_batch_size": fields["train_batch_size"] // RECIPE_GPUS,
        "beingvl.sequence_length": sequence_length,
        "beingvl.max_steps": sum(steps.values()),
        "beingvl.checkpoint_every_steps": 0,
        "beingvl.activation_checkpointing": stage not in args.without_checkpointing,
        "beingvl.stall_timeout_seconds": 1800,
    }
    if offload:
        overrides["zero_optimization.offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    if args.fused_optimizer:
        overrides["optimizer.params.fused"] = True
    words = [f"{key}={json.dumps(value)}" for key, value in overrides.items()] + args.set
    return {"config": str(shipped), "set": words, "compile_layers": args.compile_layers, **steps}


def run_case(case: dict[str, Any], args: argparse.Namespace, deadline: float) -> dict[str, Any]:
    """The result of a case in a process of its own, or {"error": why there is none}."""
    limit = min(args.case_seconds, deadline - time.monotonic())
    if limit < 5:
        return {"error": "not run: --total_seconds are over"}
    folder = Path(case["folder"])
    result, log = folder / "result.json", folder / "log"
    result.unlink(missing_ok=True)
    place = {
        "DS_ACCELERATOR": case["device"],
        "TORCHDYNAMO_DISABLE": "0" if case.get("compile_layers") else "1",
    }
    command = [sys.executable, "-m", "tests.benchmarks.gpu_train", "--child", json.dumps(case)]
    with open(log, "w") as output:
        process = subprocess.Popen(
            command,
            cwd=REPOSITORY,
            env={**os.environ, **place},
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
        try:
            process.wait(limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return {"error": f"not finished in {limit:.0f} s", "log": log.read_text()[-2000:]}
    if process.returncode:
        text = log.read_text()
        reasons = [line for line in text.splitlines() if "Error" in line]
        why = (
            "out of GPU memory"
            if "OutOfMemoryError" in text
            else reasons[-1][:300]
            if reasons
            else f"exit code {process.returncode}"
        )
        return {"error": why, "log": text[-2000:]}
    return json.loads(result.read_text())


def floor_seconds(result: dict[str, Any], floors: dict[str, Any]) -> dict[str, float]:
    """What a step needs at least, by what limits it, and how much of the measured step that is."""
    trained = result["num_trained"]
    parts = {"floor_flops_seconds": result["executed_flops_per_step"] / floors["matmul_flops"]}
    if result["offload"]:
        parts["floor_pcie_seconds"] = trained * (
            2 / floors["device_to_host_bytes"] + 2 / floors["host_to_device_bytes"]
        )
        parts["floor_optimizer_seconds"] = trained * STATE_BYTES / floors["host_copy_bytes"]
    else:
        parts["floor_optimizer_seconds"] = trained * STATE_BYTES / floors["device_copy_bytes"]
    floor = sum(parts.values())
    of_rate = result["needed_flops_per_step"] / result["seconds_per_step"] / floors["matmul_flops"]
    return {
        **parts,
        "floor_seconds": floor,
        "gap": result["seconds_per_step"] / floor,
        "of_measured_rate": of_rate,
    }


def print_floors(floors: dict[str, Any]) -> None:
    for name, value in floors.items():
        scaled = (
            value
            if isinstance(value, str)
            else f"{value / 1e9:,.1f} G"
            if value > 1e6
            else f"{value * 1e6:,.1f} us"
        )
        print(f"floor  {name:<28} {scaled}", flush=True)


def print_case(name: str, result: dict[str, Any], floors: dict[str, Any]) -> None:
    if "error" in result:
        print(f"{name:<14} {result['error']}", flush=True)
        return
    rates = f"{result['tokens_per_second']:8,.0f}  {result['target_tokens_per_second']:12,.0f}"
    peak = result["peak_memory_bytes"] / 1e9
    if "of_measured_rate" not in result:
        print(
            f"{name:<14} {rates}  {'':7}  {'':7} {result['seconds_per_step']:9.3f}  {'':8} "
            f"{peak:9.2f}",
            flush=True,
        )
        return
    mfu = f"{result['mfu']:7.1%}" if result["mfu"] else "      -"
    times = f"{result['seconds_per_step']:9.3f} {result['floor_seconds']:9.3f}"
    memory = f"{peak:9.2f}  {result['predicted_memory_bytes'] / 1e9:12.2f}"
    print(f"{name:<14} {rates}  {mfu}  {result['of_measured_rate']:7.1%} {times} {memory}")
    print(
        f"{'':14} "
        f"{', '.join(f'{phase} {seconds:.3f}' for phase, seconds in result['phases'].items())}",
        flush=True,
    )


# ---- one case ----


def run_child(case: dict[str, Any]) -> None:
    import torch

    device = torch.device(case["device"], *([0] if case["device"] == "cuda" else []))
    torch.manual_seed(0)
    if case["kind"] == "floors":
        from tests.benchmarks.gpu_floors import measure_floors

        result: dict[str, Any] = measure_floors(device)
    else:
        result = run_ours(case) if case["kind"] == "ours" else run_published(case, device)
    (Path(case["folder"]) / "result.json").write_text(json.dumps(result))


class Recorder:
    """Takes the place of MetricsWriter and Saver: keeps every step's numbers in memory and saves
    nothing.
    """

    is_written = False

    def __init__(self) -> None:
        self.steps: list[dict[str, Any]] = []

    def write_step(self, step: int, values: dict, flops: float, seconds_of: dict, *_: Any) -> None:
        self.steps.append({**values, "flops": flops, "seconds_of": seconds_of})

    def save(self, progress: object) -> None: ...
    def commit(self) -> None: ...


def run_ours(case: dict[str, Any]) -> dict[str, Any]:
    """Warm-up, timed steps, steps that wait at the border of every phase: one run of the real
    loop.
    """
    import torch

    from beingvl.data.arrow_shards import ShardReader
    from beingvl.data.stage_data import data_of
    from beingvl.stage.stage_config import load_stage_config
    from beingvl.train.engine import build_engine, start_distributed
    from beingvl.train.loop import Progress, train
    from beingvl.train.phases import Phases
    from tests.benchmarks.gpu_inputs import RandomWeights

    folder = Path(case["folder"])
    config, shards = load_stage_config(case["config"], case["set"]), ShardReader(folder / "shards")
    ranks = start_distributed()
    weights = RandomWeights(folder / "base", ranks.device)
    if is_offloaded(config):
        check_host_memory(weights.num_elements)
    engine = build_engine(folder / "base", shards.layout, config, ranks, weights=weights)
    if case["compile_layers"]:
        for layer in engine.model.causal_lm.base_model.layers:
            layer.compile()
    data = data_of(config, shards)
    timed = range(case["warmup_steps"], case["warmup_steps"] + case["steps"])

    class WaitingPhases(Phases):
        """After the timed steps the GPU is waited for before the clock is read."""

        def enter(self, step: int, phase: str) -> None:
            if step > timed.stop and ranks.device.type == "cuda":
                torch.cuda.synchronize()
            super().enter(step, phase)

    if ranks.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    recorder: Any = Recorder()
    with WaitingPhases(folder / "run", 0, 1, 1800) as phases:
        # one step is already applied: the freezer's check of the first one hashes all masters twice
        done = Progress(num_applied_steps=1)
        finished = train(
            engine, data, config, done, recorder, phases, recorder, lambda step: None, lambda: False
        )
    assert finished and all(not step["skipped"] for step in recorder.steps), (
        "a step was skipped: its loss was not finite"
    )
    graphs = {"compiled_graphs": count_compiled_graphs()} if case["compile_layers"] else {}
    return {**summarize(engine, data, config, recorder.steps, timed), **graphs}


def count_compiled_graphs() -> int:
    from torch._dynamo.utils import counters

    assert counters["stats"]["unique_graphs"], "torch.compile compiled nothing"
    return counters["stats"]["unique_graphs"]


def is_offloaded(config: Any) -> bool:
    return (config.deepspeed["zero_optimization"].get("offload_optimizer") or {}).get(
        "device"
    ) == "cpu"


def check_host_memory(num_parameters: int) -> None:
    """Rather one line than the kernel's end of whichever process it likes."""
    import psutil

    needed, found = HOST_BYTES * num_parameters, psutil.virtual_memory().total
    if needed > 0.95 * found:
        raise MemoryError(
            f"offload needs {needed / 1e9:.0f} GB of host memory, here are "
            f"{found / 1e9:.0f}: see --layers"
        )


def summarize(
    engine: Any, data: Any, config: Any, steps: list[dict[str, Any]], timed: range
) -> dict[str, Any]:
    from beingvl.train.flops import peak_flops
    from beingvl.train.memory import device_bytes
    from beingvl.train.phases import STEP_PHASES

    def seconds(step: dict[str, Any]) -> float:
        return sum(value for phase, value in step["seconds_of"].items() if phase in STEP_PHASES)

    rows, waiting = steps[timed.start : timed.stop], steps[timed.stop :]
    total = sum(map(seconds, rows))
    needed = sum(row["flops"] for row in rows)
    recomputed = sum(recomputed_flops(engine, data, config, step) for step in timed)
    peak = peak_flops(engine.ranks.device) if engine.ranks.device.type == "cuda" else None
    return {
        "tokens_per_second": sum(row["tokens"] for row in rows) / total,
        "target_tokens_per_second": sum(row["target_tokens"] for row in rows) / total,
        "samples_per_step": sum(samples_in(data, step) for step in timed) / len(timed),
        "mfu": needed / total / peak if peak else None,
        "needed_flops_per_step": needed / len(rows),
        "executed_flops_per_step": (needed + recomputed) / len(rows),
        "seconds_per_step": total / len(rows),
        "num_trained": sum(planned.num_elements for planned in engine.plan if planned.is_trained),
        "num_parameters": sum(planned.num_elements for planned in engine.plan),
        "offload": is_offloaded(config),
        "peak_memory_bytes": rows[-1]["peak_memory_bytes"],
        "predicted_memory_bytes": device_bytes(engine.predicted_memory()),
        "predicted_memory": engine.predicted_memory(),
        "phases": {
            phase: sum(row["seconds_of"].get(phase, 0) for row in waiting) / max(1, len(waiting))
            for phase in STEP_PHASES
        },
    }


def recomputed_flops(engine: Any, data: Any, config: Any, step: int) -> float:
    """Of a step: another forward pass through head (its chunks) and, with activation
    checkpointing, layers.
    """
    from dataclasses import replace

    import numpy as np

    from beingvl.train.flops import step_flops

    batch = data.micro_batch(step, 0, 0, 1, data.sequences_per_step)
    frozen = [replace(planned, rule=replace(planned.rule, train=False)) for planned in engine.plan]
    if not config.beingvl.activation_checkpointing:
        frozen = [planned for planned in frozen if "layers." not in planned.name]
    model_config = engine.model.causal_lm.config
    width = model_config.num_attention_heads * model_config.head_dim
    pairs = int((np.diff(batch.cu_seqlens) ** 2).sum())
    return step_flops(frozen, width, len(batch.input_ids), pairs, batch.num_target_tokens)


def samples_in(data: Any, step: int) -> int:
    return len(data.micro_batch(step, 0, 0, 1, data.sequences_per_step).sample_ids)


def run_published(case: dict[str, Any], device: Any) -> dict[str, Any]:
    """The same rows in our order, one per micro-batch, as many in an optimizer step as ours."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from beingvl.data.arrow_shards import ShardReader
    from beingvl.data.stage_data import data_of
    from beingvl.stage.stage_config import load_stage_config
    from beingvl.train.metrics import peak_memory_bytes
    from tests.benchmarks.gpu_inputs import rows_of
    from tests.benchmarks.train import their_arguments, train_as_published
    from tests.launcher import free_port

    folder = Path(case["folder"])
    shards = ShardReader(folder / "shards")
    data = data_of(load_stage_config(case["config"], case["set"]), shards)
    num_steps = case["warmup_steps"] + case["steps"]
    by_id = {name: index for index in range(len(shards)) if (name := shards[index].id)}
    in_order = [
        name
        for step in range(num_steps)
        for name in data.micro_batch(step, 0, 0, 1, data.sequences_per_step).sample_ids
    ]
    rows = rows_of([shards[by_id[name]] for name in in_order])
    per_step = len(rows) // num_steps
    place = {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    os.environ.update(place)
    on_cpu = {"use_cpu": True} if device.type == "cpu" else {}
    arguments = their_arguments(
        folder / "theirs",
        num_steps,
        per_step,
        zero_stage=2,
        checkpointing=True,
        bf16=True,
        **on_cpu,
    )
    with device:
        model = AutoModelForCausalLM.from_config(
            AutoConfig.from_pretrained(folder / "base"), dtype=torch.bfloat16
        )
    times: list[float] = []

    def clock() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter())

    train_as_published(model, rows, arguments, clock)
    seconds = times[-1] - times[case["warmup_steps"] - 1]
    timed = rows[case["warmup_steps"] * per_step : num_steps * per_step]
    return {
        "tokens_per_second": sum(len(row["input_ids"]) for row in timed) / seconds,
        "target_tokens_per_second": sum(label >= 0 for row in timed for label in row["labels"])
        / seconds,
        "samples_per_step": per_step,
        "seconds_per_step": seconds / case["steps"],
        "peak_memory_bytes": peak_memory_bytes(device),
    }


if __name__ == "__main__":
    sys.exit(main())
