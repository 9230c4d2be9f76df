"""Seconds that the package jsonlines takes to read a JSONL file."""

import sys
import time

import jsonlines

started = time.perf_counter()
for _ in jsonlines.open(sys.argv[1]):
    pass
print(time.perf_counter() - started)
