"""Double every second tensor; prints the peak of private memory, in MiB above the start.

peak_of_rewrite SOURCE TARGET
"""

import sys
import threading
import time

import psutil

from beingvl.model.rewrite_weights import rewrite_weights
from beingvl.model.weight_files import WeightFolder

source, target = sys.argv[1:3]
process = psutil.Process()
weights = WeightFolder(source)
replace = {name: lambda name=name: weights[name] * 2 for name in list(weights)[::2]}
before = process.memory_full_info().uss
peaks = [before]
is_done = threading.Event()


def watch() -> None:
    while not is_done.is_set():
        peaks.append(process.memory_full_info().uss)
        time.sleep(0.002)


watcher = threading.Thread(target=watch)
watcher.start()
rewrite_weights(weights, target, replace)
is_done.set()
watcher.join()
print((max(peaks) - before) >> 20)
