"""Our loader as training uses it on the shards of a folder: its start, and its memory."""

import json
import sys
import time

import psutil
import torch  # noqa: F401  its memory is not the loader's

process = psutil.Process()
peak = before = process.memory_full_info().uss
started = time.perf_counter()
from beingvl.data.arrow_shards import ShardReader  # noqa: E402  importing counts
from beingvl.data.loader import TrainingData, open_mixture  # noqa: E402

shards = ShardReader(sys.argv[1])
opened = time.perf_counter() - started
mixture = open_mixture(shards, {"all": 1.0}, "samples", 0)
data = TrainingData(shards, mixture, len(shards), 4096, 8)
data.micro_batch(0, 0, 0, 1, 8)
first_batch = time.perf_counter() - started
stride = max(1, data.num_steps // 300)
planned = time.perf_counter() - started
for step in range(min(300, data.num_steps)):
    data.micro_batch(step * stride, 0, 0, 1, 8)
    peak = max(peak, process.memory_full_info().uss)
found = {
    "large_open_seconds": opened,
    "large_first_batch_seconds": first_batch,
    "large_plan_seconds": planned,
    "large_private_bytes": peak - before,
}
print(json.dumps(found))
