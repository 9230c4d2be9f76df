"""MODEL ROWS [IMAGES]: tokenize rows into shards; prints seconds, those of the CPU (which others on
the machine hardly change), private bytes, and one hash.
"""

import json
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil

from beingvl import tokenize
from beingvl.artefact.hashes import hash_bytes
from beingvl.data.arrow_shards import ShardReader
from beingvl.images.encode_images import encode_images

assert encode_images  # imported before the clock starts
model, rows, *images = sys.argv[1:]
process = psutil.Process()
before = peak = process.memory_full_info().uss
stopped = threading.Event()


def watch() -> None:
    global peak
    while not stopped.wait(0.1):
        peak = max(peak, process.memory_full_info().uss)


threading.Thread(target=watch, daemon=True).start()
with tempfile.TemporaryDirectory() as folder:
    output = Path(folder) / "out"
    started, used = time.perf_counter(), sum(process.cpu_times()[:4])
    options = {"image_path": images or None, "batch_size": 256, "num_workers": 0}
    tokenize(rows, model, output, format="arrow", **options)
    seconds = time.perf_counter() - started
    cpu_seconds = sum(process.cpu_times()[:4]) - used
    stopped.set()
    shards = ShardReader(output / "data_base")
    content = (
        sample.category.encode() + sample.input_ids.tobytes() + sample.target_spans.tobytes()
        for sample in map(shards.__getitem__, range(len(shards)))
    )
    found = hash_bytes(b"".join(content))
times = {"seconds": seconds, "cpu_seconds": cpu_seconds}
print(json.dumps({**times, "private_bytes": peak - before, "hash": found}))
