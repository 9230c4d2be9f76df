"""All-reduce latency and bandwidth over the ranks that a launcher started; rank 0 prints one
line of JSON.

    deepspeed … --module beingvl.launch.measure_all_reduce SECONDS

Latency: of 4 bytes. Bandwidth: buffer bytes per second, for 16 MiB of float32 on CPU ranks, 256 MiB
on GPUs. Both are medians.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from datetime import timedelta

import torch
import torch.distributed as dist

from beingvl.launch.host_probe import READING


def measure(seconds: float) -> None:
    is_gpu = os.environ.get("DS_ACCELERATOR") != "cpu" and torch.cuda.is_available()
    device = torch.device("cpu")
    if is_gpu:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if is_gpu else "gloo", timeout=timedelta(seconds=60))

    def median_seconds(num_elements: int, repeats: int) -> float:
        buffer, measured = torch.ones(num_elements, device=device), []
        for _ in range(repeats):
            dist.barrier()
            started = time.perf_counter()
            dist.all_reduce(buffer)
            if is_gpu:
                torch.cuda.synchronize()
            measured.append(time.perf_counter() - started)
            buffer.fill_(1.0)
        return statistics.median(measured[1:])

    num_bytes = (256 if is_gpu else 16) << 20
    latency = median_seconds(1, 21)
    once = torch.tensor([median_seconds(num_bytes // 4, 2)], device=device)
    dist.all_reduce(once, op=dist.ReduceOp.MAX)  # all ranks need the same number of repeats
    per_repeat = median_seconds(num_bytes // 4, 2 + min(200, int(seconds / once.item())))
    if dist.get_rank() == 0:
        reading = {
            "ranks": dist.get_world_size(),
            "latency_seconds": latency,
            "bytes_per_second": num_bytes / per_repeat,
        }
        print(READING + json.dumps(reading), flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    measure(float(sys.argv[-1]))  # the launcher puts --local_rank before it
    os._exit(0)  # skip Python's teardown, which a thread of the process group may abort
