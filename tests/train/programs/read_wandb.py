"""What the files of an offline Weights & Biases run hold: one JSON line per run, its id and losses.

read_wandb FOLDER
"""

import json
import struct
import sys
from pathlib import Path

from wandb.proto.wandb_internal_pb2 import Record

HEADER, BLOCK = 7, 32768  # of a file and of each piece of a record; pieces do not cross blocks


def read(data: bytes) -> dict:
    at, record, found = HEADER, b"", {"steps": {}}
    while at + HEADER <= len(data):
        if BLOCK - at % BLOCK < HEADER:
            at += BLOCK - at % BLOCK
            continue
        _, size, piece = struct.unpack_from("<IHB", data, at)
        record, at = record + data[at + HEADER : at + HEADER + size], at + HEADER + size
        if piece in (1, 4):  # whole, or the last piece
            whole, record = Record.FromString(record), b""
            found["id"] = whole.run.run_id or found.get("id")
            items = whole.history.item
            values = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in items}
            if values:
                found["steps"][values["_step"]] = values["loss"]
    return found


for path in sorted(Path(sys.argv[1]).glob("wandb/offline-run-*/*.wandb")):
    print(json.dumps(read(path.read_bytes())))
