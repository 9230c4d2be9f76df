"""How fast this device multiplies and copies: what any training step is measured against.

Rates are medians of several timed batches, on random data, after a warm-up. Copies count bytes read
plus bytes written on one memory, and bytes moved between two.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch


def measure_floors(device: torch.device) -> dict[str, float | str]:
    """Operations and bytes per second, and seconds of the head's products, by name."""
    on_gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else "cpu",
        "torch": torch.__version__,
        "matmul_flops": matmul_rate(device, 8192 if on_gpu else 256),
        "device_copy_bytes": copy_rate(device, device, 1 << 31 if on_gpu else 1 << 24),
        "host_copy_bytes": copy_rate(
            torch.device("cpu"), torch.device("cpu"), 1 << 30 if on_gpu else 1 << 24
        ),
        "host_to_device_bytes": copy_rate(
            torch.device("cpu"), device, 1 << 30 if on_gpu else 1 << 24
        ),
        "device_to_host_bytes": copy_rate(
            device, torch.device("cpu"), 1 << 30 if on_gpu else 1 << 24
        ),
        **head_seconds(device, 4096 if on_gpu else 64, 16_389 if on_gpu else 389),
    }


def seconds_of(
    work: Callable[[], object], device: torch.device, repeats: int = 5, calls: int = 4
) -> float:
    """Median seconds of one call."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    work()
    times = []
    for _ in range(repeats):
        wait()
        started = time.perf_counter()
        for _ in range(calls):
            work()
        wait()
        times.append((time.perf_counter() - started) / calls)
    return statistics.median(times)


def matmul_rate(device: torch.device, side: int) -> float:
    """FLOP/s of a square bf16 product."""
    left, right = (torch.randn(side, side, device=device).bfloat16() for _ in range(2))
    out = torch.empty_like(left)
    return 2 * side**3 / seconds_of(lambda: torch.mm(left, right, out=out), device)


def copy_rate(source: torch.device, target: torch.device, num_bytes: int) -> float:
    """Bytes a second; host memory is page-locked when the other side is a GPU."""
    pinned = "cuda" in (source.type, target.type)
    here, there = (
        torch.ones(num_bytes // 4, device=place, pin_memory=pinned and place.type == "cpu")
        for place in (source, target)
    )
    waits_for = target if target.type == "cuda" else source
    seconds = seconds_of(lambda: there.copy_(here, non_blocking=True), waits_for)
    return (2 if source == target else 1) * num_bytes / seconds


def head_seconds(device: torch.device, hidden_size: int, num_rows: int) -> dict[str, float]:
    """Seconds of the visual rows' logits of 256 and 1024 positions, with and without aligned
    rows of the result.
    """
    rows = torch.randn(num_rows, hidden_size, device=device).bfloat16()
    found = {}
    for positions in (256, 1024):
        hidden = torch.randn(positions, hidden_size, device=device).bfloat16()
        for name, width in (("aligned", -(-num_rows // 64) * 64), ("unaligned", num_rows)):
            out = torch.empty(positions, width, dtype=torch.bfloat16, device=device)[:, :num_rows]

            def product(hidden: torch.Tensor = hidden, out: torch.Tensor = out) -> torch.Tensor:
                return torch.mm(hidden, rows.T, out=out)

            found[f"head_{positions}_{name}_seconds"] = seconds_of(product, device)
    return found
