"""What a merged token's place is worth: exact match on held-out digits after equally many tokens.

    python -m tests.benchmarks.positions [--steps 600 | --cpu_seconds 150] [--seeds 3]
                                         [--folder DIR] [--quickstart] [--equal_images]
                                         --tiny takes seconds

The quickstart's digits as 8 x 8 codes; each run trains everything from the same base in one process
of plain torch, steps of 8 x 512 tokens, and is scored on 200 validation images, three questions:

    raw           64 tokens an image
    running_32    32 merges, tokens counted one by one      anchor_32    at their anchors' cells
    running_128   128 merges                                anchor_128

With --quickstart the codes are that script's, 10 x 10 out of 32, and so are the merges: raw against
anchor_128. With --cpu_seconds each run ends, and its learning rate with it, after that much
processor time instead of a number of steps. With --equal_images every step has as many images as
one of raw codes, so its sequences are shorter.

`--folder` keeps inputs and finished runs, so that the same command goes on where it was ended. The
last line is one JSON object: name -> {"mean", "spread" (largest - smallest), "tokens_per_image",
"cpu_seconds" (of training, mean), "seeds"}.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from beingvl.commands.main import main as beingvl
from beingvl.data.arrow_shards import ShardReader
from beingvl.data.held_out import held_out_batch, pack_in_order
from beingvl.data.loader import IGNORED, MicroBatch
from beingvl.data.made_with import ANCHOR, RUNNING
from beingvl.data.positions import PositionIds, vbpe_inside
from beingvl.data.stage_data import data_of
from beingvl.evaluation.held_out_loss import load_packed
from beingvl.model.extended_vocab import PackedCausalLM
from beingvl.stage.stage_config import load_stage_config
from scripts.make_digits_dataset import main as make_digits
from scripts.make_text_llama import main as make_text_llama

STAGE = Path(__file__).parents[2] / "ds_configs/quickstart-stage3.json"
VARIANTS: dict[
    str, Any
] = {  # name -> merges of the base, whether images are merged, kind of positions
    "raw": (32, "base", RUNNING),
    "running_32": (32, "vbpe", RUNNING),
    "anchor_32": (32, "vbpe", ANCHOR),
    "running_128": (128, "vbpe", RUNNING),
    "anchor_128": (128, "vbpe", ANCHOR),
}
CODES = ["--image_size=16", "--grid=8", "--steps=600"]
SEQUENCE_LENGTH = 512
QUICKSTART = ["--image_size=20", "--grid=10", "--num_codes=32", "--steps=300"]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=600, help="of training (default: 600)")
    parser.add_argument("--cpu_seconds", type=float, help="of training, instead of steps")
    parser.add_argument("--quickstart", action="store_true", help="its codes and merges")
    parser.add_argument("--equal_images", action="store_true", help="instead of equal tokens")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each kind (default: 3)")
    parser.add_argument("--folder", type=Path, help="keeps what is finished; default: a new one")
    parser.add_argument("--tiny", action="store_true", help="see that it runs, in seconds")
    args = parser.parse_args()
    if args.tiny:
        args.steps, args.seeds = 1, 1
        VARIANTS.update({name: (32, *more) for name, (_, *more) in VARIANTS.items()})
    if args.quickstart:
        CODES[:] = QUICKSTART
        for name in ("running_32", "anchor_32", "running_128"):
            del VARIANTS[name]
        VARIANTS["raw"] = (128, "base", RUNNING)
    budget = f"{args.cpu_seconds:g}-seconds" if args.cpu_seconds else f"{args.steps}-steps"
    budget += "-of-equal-images" if args.equal_images else ""
    folder = args.folder or Path(tempfile.mkdtemp(prefix="positions-"))
    found: dict[str, list[dict[str, float]]] = {name: [] for name in VARIANTS}
    for seed in range(args.seeds):
        inputs = folder / f"seed-{seed}"
        make_inputs(inputs, seed, args.tiny)
        for name in VARIANTS:
            kept = inputs / f"{name}-{budget}.json"
            if not kept.is_file():
                length = SEQUENCE_LENGTH
                if args.equal_images:
                    length = round(length * share_of_raw(inputs, name))
                result = one_run(inputs, name, args.steps, args.cpu_seconds, length, seed)
                kept.write_text(json.dumps(result))
            found[name].append(json.loads(kept.read_text()))
            print(f"seed {seed}  {name:<12} {found[name][-1]}", flush=True)
    print(json.dumps({name: summary(runs) for name, runs in found.items()}))
    return 0


def summary(runs: list[dict[str, float]]) -> dict[str, float]:
    scores = [run["exact_match"] for run in runs]
    means = {
        name: round(float(np.mean([run[name] for run in runs])), 1)
        for name in ("tokens_per_image", "cpu_seconds")
    }
    spread = round(max(scores) - min(scores), 4)
    return {"mean": round(float(np.mean(scores)), 4), "spread": spread, **means, "seeds": len(runs)}


def make_inputs(folder: Path, seed: int, tiny: bool) -> None:
    """Digits, codes, and for each number of merges a base and its rows as shards; a step that is
    finished is reused.
    """
    data, codes = folder / "data", folder / "codes"
    text = ["--vocab_size=448", f"--steps={1 if tiny else 60}", f"--seed={seed}"]
    vq = [*CODES, *(["--steps=2"] if tiny else []), f"--seed={seed}"]
    digits = [f"--output_dir={data}", CODES[0], f"--seed={seed}"]
    assert make_digits([*digits, f"--augmentations={0 if tiny else 4}"]) == 0
    for path in (data / "train.json", data / "validation.json"):
        if tiny:
            path.write_text(json.dumps(json.loads(path.read_text())[:240]))
    images = [f"--image_path={data}/images/train", f"--validation_path={data}/images/validation"]
    run("train-vq", *images, f"--output_path={folder}/vqgan", *vq)
    for part in ("train", "validation"):
        words = [f"--image_path={data}/images", f"--json_path={data}/{part}.json"]
        run("encode-images", *words, f"--vq_path={folder}/vqgan", f"--output_path={codes}/{part}")
    texts = [f"--texts={data}/texts.txt", f"--output_path={folder}/llama"]
    assert make_text_llama([*texts, *text]) == 0
    for merges in sorted({merges for merges, _, _ in VARIANTS.values()}):
        vbpe, base = folder / f"vbpe-{merges}", folder / f"base-{merges}"
        learn = [f"--data_path={codes}/train", f"--num_merges={merges}"]
        run("train-vbpe", *learn, f"--output_path={vbpe}")
        made_of = [f"--llama_path={folder}/llama", f"--being_vq_path={folder}/vqgan"]
        made_of += [f"--vbpe={vbpe}", "--init=codebook", f"--seed={seed}"]
        run("convert", *made_of, f"--output_path={base}")
        for part in ("train", "validation"):
            rows = [f"--json_path={data}/{part}.json", f"--vq_codes={codes}/{part}"]
            rows += [f"--vbpe_path={vbpe}", f"--model_path={base}", "--format=arrow"]
            run("tokenize", *rows, f"--output_dir={folder}/shards-{merges}/{part}")


def run(*words: str) -> None:
    assert beingvl([*words]) == 0, words


def one_run(
    folder: Path, name: str, steps: int, seconds: float | None, length: int, seed: int
) -> dict[str, float]:
    """Train one variant on packed sequences of `length` tokens; `exact_match` on the validation
    rows, 0 … 1.
    """
    merges, codes, kind = VARIANTS[name]
    base, shards = folder / f"base-{merges}", folder / f"shards-{merges}"
    train, validation = (
        ShardReader(shards / part / f"data_{codes}", base) for part in ("train", "validation")
    )
    for reader in (train, validation):
        reader.positions = PositionIds(kind, reader.layout, vbpe_inside(base))
    model = load_packed(base, torch.float32, torch.device("cpu"), int(train.lengths.max()))
    began = time.process_time()
    losses, images = train_all(model, train, steps, seconds, length, seed)
    cpu_seconds = time.process_time() - began
    return {
        "exact_match": exact_match(model.eval(), validation, 600 if steps > 1 else 30),
        "loss_at_end": round(float(np.mean(losses[-max(1, len(losses) // 20) :])), 4),
        "steps": len(losses),
        "images": images,
        "tokens_per_image": tokens_per_image(train),
        "cpu_seconds": round(cpu_seconds, 1),
    }


def share_of_raw(folder: Path, name: str) -> float:
    """Tokens of this variant's rows over those of raw codes."""
    merges, codes, _ = VARIANTS[name]
    shards = folder / f"shards-{merges}/train"
    means = [ShardReader(shards / f"data_{kind}").lengths.mean() for kind in (codes, "base")]
    return float(means[0] / means[1])


def train_all(
    model: PackedCausalLM,
    shards: ShardReader,
    steps: int,
    seconds: float | None,
    length: int,
    seed: int,
) -> tuple[list[float], int]:
    """The quickstart's stage 3, everything trained, in one process; the loss of every step, and the
    images of all. It ends after `steps`, or after processor `seconds`.
    """
    words = [f"beingvl.max_steps={steps}", "beingvl.epochs=8", f"beingvl.seed={seed}"]
    words.append(f"beingvl.sequence_length={length}")
    config = load_stage_config(STAGE, words)
    settings = config.deepspeed["optimizer"]["params"]
    model.train().requires_grad_(True)
    optimizer = torch.optim.AdamW(
        model.parameters(),
        betas=settings["betas"],
        eps=settings["eps"],
        weight_decay=settings["weight_decay"],
    )
    data, losses, images = data_of(config, shards), [], 0
    warmup = math.ceil(steps * config.beingvl.warmup_ratio) / steps
    began = time.process_time()
    while (done := spent(len(losses), steps, began, seconds)) < 1:
        past = (done - warmup) / max(1 - warmup, 1 / steps)
        scale = (done + 1 / steps) / warmup if past < 0 else (1 + math.cos(math.pi * past)) / 2
        optimizer.param_groups[0]["lr"] = settings["lr"] * scale
        batch = data.micro_batch(len(losses), 0, 0, 1, config.sequences_per_step)
        loss = forward(model, batch).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.deepspeed["gradient_clipping"])
        optimizer.step()
        losses.append(loss.item())
        images += len(batch.sample_ids)
    return losses, images


def spent(step: int, steps: int, began: float, seconds: float | None) -> float:
    """The share of the run that lies behind."""
    return (time.process_time() - began) / seconds if seconds else step / steps


def forward(model: PackedCausalLM, batch: MicroBatch, logits: bool = False) -> torch.Tensor:
    """Losses `[num_targets]`, or logits, of a packed batch."""
    at = np.flatnonzero(batch.target_ids != IGNORED)
    found: torch.Tensor = model(
        input_ids=torch.from_numpy(batch.input_ids)[None],
        position_ids=torch.from_numpy(batch.position_ids)[None],
        cu_seqlens=torch.from_numpy(batch.cu_seqlens),
        target_positions=torch.from_numpy(at),
        target_ids=None if logits else torch.from_numpy(batch.target_ids[at]),
        longest=int(np.diff(batch.cu_seqlens).max()),
    )
    return found


@torch.no_grad()
def exact_match(model: PackedCausalLM, shards: ShardReader, num_rows: int) -> float:
    """Share of the first rows whose answer a greedy decoder would give: each of its tokens is the
    most likely one behind those before it.
    """
    right = []
    for sequence in pack_in_order(shards.lengths[:num_rows], 2048):
        batch = held_out_batch(shards, sequence, "response")
        at = np.flatnonzero(batch.target_ids != IGNORED)
        wrong = forward(model, batch, logits=True).argmax(-1).numpy() != batch.target_ids[at]
        row = np.searchsorted(batch.cu_seqlens, at, side="right") - 1
        right += (np.bincount(row, wrong, len(sequence)) == 0).tolist()
    return float(np.mean(right))


def tokens_per_image(shards: ShardReader) -> float:
    """Every row has one image."""
    rows = [shards[index].input_ids for index in range(len(shards))]
    return round(float(np.mean([shards.layout.is_image_token(row).sum() for row in rows])), 1)


if __name__ == "__main__":
    raise SystemExit(main())
