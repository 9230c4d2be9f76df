"""Re-hash an artefact of any step (a folder with a manifest.json) and say whether it is what was written."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("paths", nargs="+", type=Path, help="artefact folders")


def run(args: argparse.Namespace) -> None:
    from beingvl.manifest import verify_folder

    for path in args.paths:
        manifest = verify_folder(path)
        size = sum(int(entry["bytes"]) for entry in manifest.files.values())
        print(f"{path}: {manifest.kind}, {len(manifest.files)} files, {size:,} bytes, every hash as written")
