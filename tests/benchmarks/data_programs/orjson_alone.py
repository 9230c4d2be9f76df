"""Seconds that orjson takes to parse a JSONL file.

orjson_alone.py PATH PROCESSES
"""

import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor

import orjson

path, processes = sys.argv[1], int(sys.argv[2])


def parse(part):
    start, stop = part
    with open(path, "rb", buffering=1 << 20) as file:
        file.seek(start)
        if start:
            file.readline()
        while file.tell() < stop:
            orjson.loads(file.readline())


size = os.path.getsize(path)
parts = [(start, min(start + (64 << 20), size)) for start in range(0, size, 64 << 20)]
started = time.perf_counter()
with ProcessPoolExecutor(processes) as pool:
    list(pool.map(parse, parts))
print(time.perf_counter() - started)
