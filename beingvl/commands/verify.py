"""Re-hash an artefact of any step (a folder with a manifest.json): is every file as it was written?

    beingvl verify vq_codes/ shards/ stage-1/ base/tokenizer.json

Of a stage's folder its finished checkpoints and final/ are taken. A single file is compared with
the manifest beside it. Only a vbpe.json without one is read: every merge must be possible.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from beingvl.artefact.manifest import is_complete
from beingvl.artefact.verify import verify


def add_arguments(parser: argparse.ArgumentParser) -> None:
    paths = "artefact folders, or files like vbpe.json"
    parser.add_argument("paths", nargs="+", type=Path, help=paths)


def run(args: argparse.Namespace) -> None:
    for path in args.paths:
        if path.suffix == ".json" and path.is_file() and not is_complete(path.parent):
            # Here, as numpy and numba are slow to load.
            from beingvl.vbpe.visual_bpe import VisualBPE

            VisualBPE.load(path)
            print(f"{path}: every merge possible, no hash to compare with")
            continue
        for folder, manifest in verify(path).items():
            if path.is_file() and path.name in manifest.files:
                print(f"{path}: {path.stat().st_size:,} bytes, the hash that the manifest says")
                continue
            size = sum(int(entry["bytes"]) for entry in manifest.files.values())
            count = f"{len(manifest.files)} files re-hashed, every hash as written"
            print(f"{folder}: {manifest.kind}, {size:,} bytes, {count}")
