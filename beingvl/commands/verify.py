"""Re-hash an artefact of any step (a folder with a manifest.json): is every file as it was written?

    beingvl verify vq_codes/ shards/ stage-1/ base/tokenizer.json

For a stage folder, this checks its finished checkpoints and final/. A single file is compared with
the manifest beside it. For a vbpe.json without a manifest, it checks that every merge is possible.
All paths are checked; the exit code is 2 if one of them changed or is incomplete.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from beingvl.artefact.manifest import is_complete
from beingvl.artefact.verify import artefacts_of, verify
from beingvl.errors import InputError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    paths = "artefact folders, or files like vbpe.json"
    parser.add_argument("paths", nargs="+", type=Path, help=paths)


def run(args: argparse.Namespace) -> int:
    code = 0
    for path in [one for given in args.paths for one in artefacts_of(given)]:
        try:
            print(f"{path}: {_verify(path)}", flush=True)
        except (InputError, PermissionError) as error:
            if args.debug:
                raise
            code = 2
            print(f"beingvl verify: error: {error}", file=sys.stderr, flush=True)
    return code


def _verify(path: Path) -> str:
    if path.suffix == ".json" and path.is_file() and not is_complete(path.parent):
        # Imported here: numpy and numba are slow to load.
        from beingvl.vbpe.visual_bpe import VisualBPE

        VisualBPE.load(path)
        return "every merge is possible; there is no hash to compare with"
    (manifest,) = verify(path).values()
    if path.is_file() and path.name in manifest.files:
        return f"{path.stat().st_size:,} bytes, hash as in the manifest"
    size = sum(int(entry["bytes"]) for entry in manifest.files.values())
    count = f"{len(manifest.files)} files re-hashed, every hash as written"
    return f"{manifest.kind}, {size:,} bytes, {count}"
