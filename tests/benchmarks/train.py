"""This loop under ZeRO-3 against Hugging Face `Trainer` with DeepSpeed, the way models of this
kind are published: one sample per micro-batch, JSONL in memory, logits of all tokens. Same small
model, same rows, same ranks, one after the other.

    pip install accelerate
    python -m tests.benchmarks.train [--samples 960] [--rows 50000] [--ranks 2] [--rounds 3]
                                     [--their_stage 2] [--no_checkpointing]
                                     --tiny takes less than a minute

Both sides make the same updates: the same 16 samples in every step, in our order; eight samples
fill a packed sequence exactly. They train on the first --samples of a data set of --rows, with
activation checkpointing, as published, or without. TensorBoard is off on both sides; what both
import after the start of the count is about 130 small modules, 5 MB.

The last line is one JSON object:

    samples_ratio           ours / theirs, samples per second after 3 steps
    private_memory_ratio    ours / theirs, peak memory of a rank that is not a file's, above what
                            it had after its imports
    overhead_fraction       our step time outside forward, backward, optimizer and collectives
    loss_memory_ratio       peak memory of the chunked loss / of full logits; 144,645 ids, 4096
                            positions (benchmarks/loss.py)
    startup_ratio           ours / theirs, process start to the end of the first step
    loss_ours, loss_theirs  over all targets trained on, after the last step, by one function
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from beingvl.artefact.files import write_atomically
from tests.benchmarks.loss import run_alone

REPOSITORY = Path(__file__).parents[2]
NUM_WARMUP_STEPS = 3
SAMPLES_PER_STEP = 16
SEQUENCE_LENGTH = 1024
# nine of the shortest are too long for a sequence, eight of the longest just fit
SHORTEST, LONGEST = 114, 128
LEARNING_RATE = 1e-3
ADAM = {
    "lr": LEARNING_RATE,
    "betas": [0.9, 0.95],
    "eps": 1e-8,
    "weight_decay": 0.0,
    "torch_adam": True,
}
STEP_TIMES = "step-times.json"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--samples", type=int, default=960)
    parser.add_argument(
        "--rows", type=int, default=50000, help="rows of the data set, about 120 tokens each"
    )
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--their_stage", type=int, default=2, choices=[2, 3], help="ZeRO stage of the other side"
    )
    parser.add_argument(
        "--no_checkpointing", action="store_true", help="keep all activations, on both sides"
    )
    parser.add_argument("--tiny", action="store_true", help="see that ours runs, alone")
    parser.add_argument("--rank_of", choices=["ours", "theirs"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.tiny:
        args.samples, args.rows, args.ranks, args.rounds = 80, 80, 1, 1
    if args.rank_of:
        run_rank(args)
    else:
        with tempfile.TemporaryDirectory(prefix="train-benchmark-") as folder:
            print(json.dumps(measure(Path(folder), args)))
    return 0


def measure(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    make_inputs(
        folder,
        args.samples,
        max(args.rows, args.samples),
        args.ranks,
        checkpointing=not args.no_checkpointing,
    )
    sides = ("ours",) if args.tiny else ("ours", "theirs")
    found: dict[str, list[dict[str, Any]]] = {who: [] for who in sides}
    for _ in range(args.rounds):
        for who in sides:
            found[who].append(launch(who, folder, args))
            print(who, json.dumps(found[who][-1]), flush=True)
    size = ["--tiny"] if args.tiny else []
    chunked, full = (run_alone(kernel, size)[1] for kernel in ("ours", "full"))
    print(f"loss memory: chunked {chunked / 1e9:.2f} GB, full logits {full / 1e9:.2f} GB")
    overhead = statistics.median(run["overhead_fraction"] for run in found["ours"])
    result = {
        "overhead_fraction": round(overhead, 4),
        "loss_memory_ratio": round(chunked / full, 4),
        **{f"loss_{who}": found[who][-1]["final_loss"] for who in sides},
    }
    return result if args.tiny else {**compare(found), **result}


def compare(found: dict[str, list[dict[str, Any]]]) -> dict[str, float]:
    """Ours over theirs, the median of the rounds."""
    ours, theirs = (found[who][-1]["final_loss"] for who in ("ours", "theirs"))
    assert abs(ours / theirs - 1) < 1e-3, f"the two sides did not train the same: {ours}, {theirs}"

    def ratio(key: str) -> float:
        pairs = zip(found["ours"], found["theirs"], strict=True)
        return round(statistics.median(ours[key] / theirs[key] for ours, theirs in pairs), 3)

    return {
        "samples_ratio": ratio("samples_per_second"),
        "private_memory_ratio": ratio("added_private_bytes"),
        "startup_ratio": ratio("startup_seconds"),
    }


def make_inputs(
    folder: Path, num_samples: int, num_rows: int, num_ranks: int, checkpointing: bool
) -> None:
    """Samples whose answers (2 … 12 tokens, one id repeated) follow from their first token;
    rows.jsonl is in training order.
    """
    import numpy as np

    from beingvl.data.arrow_shards import ShardReader
    from beingvl.data.shard_columns import Sample
    from beingvl.data.shard_writer import ShardWriter
    from beingvl.data.stage_data import data_of
    from beingvl.stage.stage_config import load_stage_config
    from beingvl.vocab import VocabLayout
    from tests.tiny import stage_fields, write_model

    layout = VocabLayout(num_text=4096, num_vq=512, num_merges=64, bos_id=256, eos_id=257)
    write_model(folder / "base", layout, num_layers=4, hidden_size=128)
    random = np.random.default_rng(0)
    writer = ShardWriter(folder / "shards", layout)
    rows = {}
    for number in range(num_rows):
        ids = random.integers(0, layout.size, int(random.integers(SHORTEST, LONGEST + 1))).astype(
            np.int32
        )
        length = int(random.integers(2, 12))
        ids[0] = number % 8
        ids[-length:] = 300 + number % 8
        writer.add(
            Sample(str(number), "", "all", ids, np.array([[len(ids) - length, len(ids)]], np.int32))
        )
        rows[str(number)] = {
            "input_ids": ids.tolist(),
            "labels": [-100] * (len(ids) - length) + ids[-length:].tolist(),
        }
    writer.finish({"vocab": layout.fingerprint()}, {})
    fields = stage_fields(
        sequence_length=SEQUENCE_LENGTH,
        mixture={"all": 1.0},
        checkpoint_every_steps=0,
        schedule="constant",
    )
    fields["optimizer"] = {"type": "AdamW", "params": ADAM}
    fields["beingvl"] |= {"warmup_ratio": 0.0, "max_steps": num_samples // SAMPLES_PER_STEP}
    fields["beingvl"] |= {"activation_checkpointing": checkpointing}
    # By default every tensor of so small a model would stay whole on each rank, and be gathered
    # anew one by one after a step; DeepSpeed's linear function in Python spares nothing where
    # layers are recomputed.
    fields["zero_optimization"] = {"stage": 3, "overlap_comm": False}
    fields["zero_optimization"] |= {
        "stage3_param_persistence_threshold": 0,
        "memory_efficient_linear": False,
    }
    sequences = SAMPLES_PER_STEP * LONGEST // SEQUENCE_LENGTH
    fields |= {
        "train_batch_size": sequences,
        "train_micro_batch_size_per_gpu": sequences // num_ranks,
    }
    (folder / "stage.json").write_text(json.dumps(fields))
    data = data_of(load_stage_config(folder / "stage.json"), ShardReader(folder / "shards"))
    steps = [
        data.micro_batch(step, 0, 0, 1, sequences).sample_ids
        for step in range(num_samples // SAMPLES_PER_STEP)
    ]
    assert all(len(samples) == SAMPLES_PER_STEP for samples in steps), (
        "a step of 16 samples is not full"
    )
    first = {name: rows.pop(name) for samples in steps for name in samples}
    (folder / "rows.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in [*first.values(), *rows.values()])
    )
    (folder / "trained").write_text(str(len(first)))


def launch(who: str, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Run all ranks to the end: rank 0's times, the memory of the rank that took most."""
    from tests.launcher import ENVIRONMENT, free_port

    port, started, processes, num_ranks = str(free_port()), time.time(), [], args.ranks
    shutil.rmtree(folder / who, ignore_errors=True)
    (folder / who).mkdir()
    for rank in range(num_ranks):
        place = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(num_ranks),
            "MASTER_PORT": port,
        }
        words = ["--rank_of", who, "--folder", str(folder), "--their_stage", str(args.their_stage)]
        words += ["--no_checkpointing"] if args.no_checkpointing else []
        environment = {**ENVIRONMENT, "MASTER_ADDR": "127.0.0.1", **place}
        with open(folder / f"{who}-{rank}.log", "w") as log:
            command = [sys.executable, "-m", "tests.benchmarks.train", *words]
            processes.append(
                subprocess.Popen(command, env=environment, cwd=REPOSITORY, stdout=log, stderr=log)
            )
    added = watch_private_memory(
        processes, [folder / who / f"imported-{rank}" for rank in range(num_ranks)]
    )
    codes = [process.wait() for process in processes]
    assert codes == [0] * num_ranks, (codes, (folder / f"{who}-0.log").read_text()[-3000:])
    result = times_of_ours(folder / who) if who == "ours" else times_of_theirs(folder / who)
    result["startup_seconds"] = result.pop("first_step_done") - started
    return {
        **result,
        "added_private_bytes": max(added),
        "final_loss": loss_of(folder / who, folder),
    }


def watch_private_memory(processes: list[subprocess.Popen], imported: list[Path]) -> list[int]:
    """Until all have ended: each process's peak private memory above what it wrote to its file
    after its imports.
    """
    added = [0] * len(processes)
    while any(process.poll() is None for process in processes):
        for number, (process, path) in enumerate(zip(processes, imported, strict=True)):
            with contextlib.suppress(
                FileNotFoundError, ProcessLookupError
            ):  # not imported yet, or just ended
                added[number] = max(
                    added[number], private_bytes(process.pid) - int(path.read_text())
                )
        time.sleep(0.02)
    return added


def private_bytes(process_id: int) -> int:
    """Memory that is not a file's, resident or in swap: the kernel keeps the counts, so asking does
    not slow the process as its USS would.
    """
    status = Path(f"/proc/{process_id}/status").read_text()
    kilobytes = dict(re.findall(r"^(RssAnon|VmSwap):\s+(\d+) kB$", status, re.MULTILINE))
    return 1024 * sum(map(int, kilobytes.values()))


# imports torch's compiler; not memory of theirs
DEEPSPEEDS_COMPILED_OPTIMIZER = "deepspeed.runtime.zero.muon.original_muon"
IMPORTS = {
    "ours": ("beingvl.train.run_stage", "transformers.models.llama.modeling_llama"),
    "theirs": (
        "accelerate",
        "transformers.trainer",
        "transformers.models.llama.modeling_llama",
        DEEPSPEEDS_COMPILED_OPTIMIZER,
    ),
}


def run_rank(args: argparse.Namespace) -> None:
    """Import, write down the private memory so far, train."""
    who, folder = args.rank_of, args.folder
    for name in IMPORTS[who]:
        importlib.import_module(name)
    rank = int(os.environ["RANK"])
    write_atomically(folder / who / f"imported-{rank}", str(private_bytes(os.getpid())))
    if who == "ours":
        run_ours(folder)
    else:
        run_theirs(folder, rank, args.their_stage, not args.no_checkpointing)


def run_ours(folder: Path) -> None:
    """Ends the process."""
    from beingvl.commands.main import main as beingvl

    paths = [
        f"--deepspeed_config={folder / 'stage.json'}",
        f"--model={folder / 'base'}",
        f"--data={folder / 'shards'}",
    ]
    sys.exit(beingvl(["train", *paths, f"--output={folder / 'ours'}", "--debug"]))


def times_of_ours(output: Path) -> dict[str, float]:
    from beingvl.train.metrics import METRICS_FILE, read_metrics

    all_rows = read_metrics(output)
    rows = all_rows[NUM_WARMUP_STEPS:]
    seconds = sum(row["seconds"] for row in rows)
    useful = sum(
        row[f"seconds_{phase}"]
        for row in rows
        for phase in ("forward", "backward", "optimizer", "communication")
    )
    last_step_done = (output / METRICS_FILE).stat().st_mtime
    return {
        "samples_per_second": len(rows) * SAMPLES_PER_STEP / seconds,
        "first_step_done": last_step_done - sum(row["seconds"] for row in all_rows[1:]),
        "overhead_fraction": 1 - useful / seconds,
    }


def run_theirs(folder: Path, rank: int, zero_stage: int, checkpointing: bool) -> None:
    """The arguments are there before the model: under ZeRO-3 transformers then cuts it while it
    loads it.
    """
    from transformers import AutoModelForCausalLM

    accumulation_steps = SAMPLES_PER_STEP // int(os.environ["WORLD_SIZE"])
    num_steps = int((folder / "trained").read_text()) // SAMPLES_PER_STEP
    arguments = their_arguments(
        folder / "theirs", num_steps, accumulation_steps, zero_stage, checkpointing, use_cpu=True
    )
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    times: list[float] = []
    model = AutoModelForCausalLM.from_pretrained(folder / "base")
    trainer = train_as_published(model, rows, arguments, lambda: times.append(time.time()))
    trainer.save_model(str(folder / "theirs"))
    if rank == 0:
        (folder / "theirs" / STEP_TIMES).write_text(json.dumps(times))
    # as ours ends: a thread of the process group may abort a finished rank in Python's teardown
    os._exit(0)


def train_as_published(
    model: Any, rows: list[dict[str, list[int]]], arguments: Any, on_step_end: Callable[[], object]
) -> Any:
    """Hugging Face's Trainer over `rows` (`input_ids`, `labels`) in their order; returns it.

    `on_step_end` is called after every optimizer step.
    """
    import deepspeed
    import torch
    from transformers import Trainer, TrainerCallback

    # as on our side: it would be compiled at the first start
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

    class Clock(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            on_step_end()

    def collate(samples: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        return {
            key: torch.tensor([sample[key] for sample in samples])
            for key in ("input_ids", "labels")
        }

    trainer = Trainer(
        model=model, args=arguments, train_dataset=rows, data_collator=collate, callbacks=[Clock()]
    )
    trainer.train()
    return trainer


def their_arguments(
    output: Path,
    num_steps: int,
    accumulation_steps: int,
    zero_stage: int,
    checkpointing: bool,
    bf16: bool = False,
    **more: Any,
) -> Any:
    """TrainingArguments with DeepSpeed, one row per micro-batch; `more` are arguments of theirs."""
    from transformers import TrainingArguments

    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": accumulation_steps,
        "gradient_clipping": 1.0,
        "optimizer": {"type": "AdamW", "params": ADAM},
        "bf16": {"enabled": bf16},
        "zero_optimization": {
            "stage": zero_stage,
            "overlap_comm": False,
            "stage3_gather_16bit_weights_on_model_save": True,
        },
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2**31 - 1,
    }
    return TrainingArguments(
        output_dir=str(output),
        per_device_train_batch_size=1,
        gradient_accumulation_steps=accumulation_steps,
        max_steps=num_steps,
        learning_rate=LEARNING_RATE,
        train_sampling_strategy="sequential",
        adam_beta2=0.95,
        lr_scheduler_type="constant",
        gradient_checkpointing=checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False} if checkpointing else None,
        deepspeed=config,
        bf16=bf16,
        report_to=[],
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
        **more,
    )


def times_of_theirs(output: Path) -> dict[str, float]:
    times = json.loads((output / STEP_TIMES).read_text())
    seconds = times[-1] - times[NUM_WARMUP_STEPS - 1]
    return {
        "samples_per_second": (len(times) - NUM_WARMUP_STEPS) * SAMPLES_PER_STEP / seconds,
        "first_step_done": times[0],
    }


def loss_of(output: Path, folder: Path) -> float:
    """Mean loss over all targets of the rows trained on, by stock transformers in one process."""
    model_folder = output / "final" if (output / "final").is_dir() else output
    count = (folder / "trained").read_text()
    command = [sys.executable, "-m", "tests.benchmarks.mean_loss"]
    command += [str(model_folder), str(folder / "rows.jsonl"), count]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    return round(float(done.stdout.split()[-1]), 4)


if __name__ == "__main__":
    sys.exit(main())
