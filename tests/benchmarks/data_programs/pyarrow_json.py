"""Seconds that pyarrow.json takes to read a JSONL file."""

import sys
import time

from pyarrow import json

started = time.perf_counter()
json.read_json(sys.argv[1], read_options=json.ReadOptions(block_size=16 << 20))
print(time.perf_counter() - started)
