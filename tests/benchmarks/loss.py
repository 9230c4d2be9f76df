"""Kernels for the loss, forward and backward: time and peak memory, each in a process of its own.

    python -m tests.benchmarks.loss [--positions 4096] [--hidden_size 64] [--dtype float32]
                                    [--rounds 1]                          --tiny takes seconds

    full             one matrix product, torch's cross entropy: the logits of all positions at once
    ours             model/extended_vocab.py: two row blocks, chunks of 256 positions
    torch            torch.nn.functional.linear_cross_entropy with options (it chunks only
                     then); one matrix
    deepspeed        deepspeed.runtime.chunked_cross_entropy on full logits; one matrix
    deepspeed_tiled  deepspeed's TiledFusedLogitsLoss, 16 tiles; one matrix

Liger's fused kernel is Triton's and has no CPU path. The last line is one JSON object, name ->
[seconds, peak bytes].
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn import functional as F

VOCABULARY, NUM_TEXT = 144_645, 128_256
KERNELS = ("full", "ours", "torch", "deepspeed", "deepspeed_tiled")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--positions", type=int, default=4096)
    parser.add_argument("--hidden_size", type=int, default=64)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--tiny", action="store_true", help="see that it runs, in seconds")
    parser.add_argument("--kernel", choices=KERNELS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.tiny:
        args.positions, args.hidden_size, args.rounds = 64, 4, 1
    if args.kernel:
        dtype = getattr(torch, args.dtype)
        print(json.dumps(measure(args.kernel, args.positions, args.hidden_size, dtype)))
        return 0
    names = ("positions", "hidden_size", "dtype")
    options = [f"--{name}={getattr(args, name)}" for name in names]
    found = {kernel: [run_alone(kernel, options) for _ in range(args.rounds)] for kernel in KERNELS}
    medians = {
        kernel: [statistics.median(column) for column in zip(*rows, strict=True)]
        for kernel, rows in found.items()
    }
    print(
        "kernel            seconds   peak MB   loss / hidden gradient / weight "
        "gradient, relative to full"
    )
    for kernel, (seconds, peak, *values) in medians.items():
        differences = [
            abs(value / full - 1) for value, full in zip(values, medians["full"][2:], strict=True)
        ]
        print(
            f"{kernel:<16} {seconds:8.2f} {peak / 1e6:9.0f}   "
            f"{'  '.join(f'{value:.1e}' for value in differences)}"
        )
    print(json.dumps({kernel: [round(row[0], 2), row[1]] for kernel, row in medians.items()}))
    return 0


def run_alone(kernel: str, options: list[str]) -> list[float]:
    """`[seconds, peak bytes, loss, norm of the hidden states' gradient, norm of the weights']`
    in a new process.
    """
    command = [sys.executable, "-m", "tests.benchmarks.loss", "--kernel", kernel, *options]
    done = subprocess.run(
        command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def measure(kernel: str, num_positions: int, hidden_size: int, dtype: torch.dtype) -> list[float]:
    """Peak memory is beside weights, inputs and the weights' gradients of an earlier
    micro-batch, which are there before.
    """
    torch.manual_seed(0)
    weight = torch.nn.Parameter((torch.randn(VOCABULARY, hidden_size) * 0.02).to(dtype))
    hidden = torch.randn(num_positions, hidden_size).to(dtype).requires_grad_()
    targets = torch.randint(0, VOCABULARY, (num_positions,))
    loss_of, weights = prepare(kernel, weight, hidden, targets)
    for parameter in weights:
        parameter.grad = torch.full_like(parameter, 1e-9)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = peak_bytes()
    started = time.perf_counter()
    loss = loss_of()
    loss.backward()
    seconds = time.perf_counter() - started
    peak = peak_bytes() - before
    assert hidden.grad is not None
    norm = (
        sum(
            float((parameter.grad.double() ** 2).sum())
            for parameter in weights
            if parameter.grad is not None
        )
        ** 0.5
    )
    return [seconds, float(peak), loss.item(), hidden.grad.double().norm().item(), norm]


def peak_bytes() -> int:
    """Peak resident memory of this process."""
    status = Path("/proc/self/status").read_text()
    return (
        int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1])
        * 1024
    )


def prepare(
    kernel: str, weight: torch.nn.Parameter, hidden: torch.Tensor, targets: torch.Tensor
) -> tuple[Callable[[], torch.Tensor], list[torch.nn.Parameter]]:
    """A function that gives the loss sum, and the weights it uses."""
    if kernel == "full":
        return lambda: F.cross_entropy(
            F.linear(hidden, weight).float(), targets, reduction="sum"
        ), [weight]
    if kernel == "ours":
        from beingvl.model.extended_vocab import ExtendedHead
        from beingvl.stage.stage_config import BeingVLBlock

        head = ExtendedHead(
            NUM_TEXT, VOCABULARY - NUM_TEXT, weight.shape[1], BeingVLBlock.loss_chunk_tokens
        ).to(weight.dtype)
        head.text_rows.data, head.visual_rows.data = weight.data[:NUM_TEXT], weight.data[NUM_TEXT:]
        return lambda: head(hidden, targets).sum(), [head.text_rows, head.visual_rows]
    if kernel == "torch":
        options = torch.nn.LinearCrossEntropyOptions()
        return lambda: F.linear_cross_entropy(
            hidden, weight, targets, reduction="sum", options=options
        ), [weight]
    warnings.filterwarnings("ignore")
    if kernel == "deepspeed":
        from deepspeed.runtime.chunked_cross_entropy import chunked_cross_entropy

        return lambda: chunked_cross_entropy(F.linear(hidden, weight), targets, reduction="sum"), [
            weight
        ]
    from deepspeed.runtime.sequence_parallel.ulysses_sp import TiledFusedLogitsLoss

    def tile(module: object, rows: torch.Tensor, target_ids: torch.Tensor) -> torch.Tensor:
        logits = F.linear(rows.reshape(-1, rows.shape[-1]), weight).float()
        return F.cross_entropy(logits, target_ids.reshape(-1), reduction="sum")

    apply = TiledFusedLogitsLoss.apply
    return lambda: apply(tile, None, hidden[None], targets[None], None, 16, [weight], "sum"), [
        weight
    ]


if __name__ == "__main__":
    sys.exit(main())
