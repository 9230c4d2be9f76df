"""One library on the rows of a JSONL file: `prepare` its own format, or `read` it in random order.

peer.py MODE prepare|read JSONL FOLDER COUNT
"""

import contextlib
import json
import os
import sys
import time

import numpy as np
import psutil

mode, action, jsonl, folder, count = *sys.argv[1:5], int(sys.argv[5])
with contextlib.suppress(ImportError):  # where it is there, as a training process has it
    import torch  # noqa: F401


def ids_of(row):
    return np.array(row["token_0"] + row["token_image_new"] + row["token_1"], np.int32)


def rows():
    import orjson

    with open(jsonl, "rb") as file:
        for line in file:
            yield ids_of(orjson.loads(line))


def prepare():
    if mode == "datasets":
        import datasets

        features = datasets.Features({"input_ids": datasets.Sequence(datasets.Value("int32"))})
        made = datasets.Dataset.from_generator(
            lambda: ({"input_ids": ids} for ids in rows()),
            features=features,
            cache_dir=folder + "-cache",
        )
        made.save_to_disk(folder)
    elif mode == "streaming":
        from streaming import MDSWriter

        with MDSWriter(out=folder, columns={"input_ids": "ndarray:int32"}) as out:
            for ids in rows():
                out.write({"input_ids": ids})
    elif mode == "litdata":
        from litdata.streaming.cache import Cache

        cache = Cache(folder, chunk_bytes="64MB")
        for number, ids in enumerate(rows()):
            cache[number] = {"input_ids": ids}
        cache.done()
        cache.merge()


def opened():
    if mode == "ours":
        from beingvl.data.arrow_shards import ShardReader

        reader = ShardReader(folder)
        return len(reader), lambda i: reader[i].input_ids
    if mode == "in_ram":
        with open(jsonl) as file:
            data = [json.loads(line) for line in file]
        return len(data), lambda i: ids_of(data[i])
    if mode == "datasets":
        import datasets

        data = datasets.load_from_disk(folder).with_format("numpy")
    elif mode == "streaming":
        from streaming import LocalDataset

        data = LocalDataset(folder)
    else:
        from litdata import StreamingDataset

        data = StreamingDataset(folder)
    return len(data), lambda i: data[i]["input_ids"]


if action == "prepare":
    prepare()
    sys.exit()
process = psutil.Process(os.getpid())
before = process.memory_full_info().uss
started = time.perf_counter()
length, get = opened()
get(0)
startup = time.perf_counter() - started
order = np.random.default_rng(0).permutation(length)[:count].tolist()
started, tokens = time.perf_counter(), 0
for at in range(0, len(order), 32):
    batch = np.concatenate([get(i) for i in order[at : at + 32]])
    tokens += len(batch)
rate = tokens / (time.perf_counter() - started)
private = process.memory_full_info().uss - before
print(json.dumps({"startup": startup, "tokens_per_second": rate, "private": private}))
