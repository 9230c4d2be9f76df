"""Re-hash an artefact of any step (a folder with a manifest.json), and check that its content makes sense.

Every file must have the hash of the manifest; of weight files that a step linked without reading it has one of samples only,
and their number is printed. Shards and JSONL rows are read again: ids inside the vocabulary, target spans inside their
rows, index files that agree with the shards. Codes must be inside the code book, keys sorted and unique, merges possible.
A single file is compared with the manifest beside it; a vbpe.json without one has no hash, its merges are checked.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from beingvl.manifest import Manifest


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("paths", nargs="+", type=Path, help="artefact folders, or files like vbpe.json")


def run(args: argparse.Namespace) -> None:
    from beingvl.errors import InputError
    from beingvl.manifest import MANIFEST_FILE, verify_folder

    checks = {"shards": check_shards, "vq_codes": check_codes, "jsonl": check_jsonl, "vbpe": check_vbpe}
    for given in args.paths:
        path = given.parent if given.name == MANIFEST_FILE else given
        if not path.exists():
            raise InputError(f"{path} does not exist; give an artefact folder, or one of its files")
        if path.is_file():
            verify_one(path)
            continue
        manifest = verify_folder(path)
        if manifest.kind in checks:
            checks[manifest.kind](path, manifest)
        size = sum(int(entry["bytes"]) for entry in manifest.files.values())
        print(f"{path}: {manifest.kind}, {size:,} bytes, {manifest.hashed()}, every hash as written")


def verify_one(path: Path) -> None:
    """A file of an artefact folder, or a vbpe.json anywhere. Raises InputError for a changed one, or an unknown one."""
    from beingvl.manifest import is_complete, read_manifest, verify_file
    from beingvl.tokenizer.vbpe import VBPE_FILE

    entry = read_manifest(path.parent).files.get(path.name) if is_complete(path.parent) else None
    found = "no hash to compare with"
    if entry is not None:
        verify_file(path, entry)
        found = "the hash that the manifest beside it says"
    if entry is None or path.name == VBPE_FILE:
        check_vbpe(path)
        found = f"every merge possible, {found}"
    print(f"{path}: {path.stat().st_size:,} bytes, {found}")


def check_shards(path: Path, manifest: Manifest) -> None:
    """Raises InputError for a sample that could not have been written, or an index that does not fit the samples."""
    from beingvl.data.arrow_shards import ShardReader

    ShardReader(path).check()


def check_codes(path: Path, manifest: Manifest) -> None:
    """Raises InputError for a code outside the code book, or keys that do not fit the rows."""
    from itertools import pairwise

    from beingvl.errors import InputError
    from beingvl.tokenizer.vq_codes import CodeFolder

    folder = CodeFolder(path)
    for start in range(0, len(folder.codes), 4096):
        largest = int(folder.codes[start : start + 4096].max(initial=0))
        if largest >= folder.num_codes:
            raise InputError(
                f"{path} holds the code {largest}, its code book ends at {folder.num_codes - 1}; encode the images again"
            )
    if len(folder.keys) != len(folder.codes):
        raise InputError(f"{path} has {len(folder.codes)} rows and {len(folder.keys)} keys; encode the images again")
    if any(one >= other for one, other in pairwise(folder.keys)) and "key_offsets.npy" in manifest.files:
        raise InputError(f"{path}: the keys are not sorted and unique; encode the images again")


def check_jsonl(path: Path, manifest: Manifest) -> None:
    """Raises InputError that names the line which is not a token row, or the sample that cannot be trained on."""
    from beingvl.data.arrow_shards import check_columns
    from beingvl.data.build_shards import plan_parts
    from beingvl.data.dataset_folder import REJECTED_FILE
    from beingvl.data.token_rows import RowReader
    from beingvl.errors import InputError
    from beingvl.manifest import verify_folder
    from beingvl.vocab import VocabLayout

    layout = VocabLayout.from_dict(manifest.details["layout"], f"{path}/manifest.json")
    for shards in sorted({path / name.split("/")[0] for name in manifest.files if "/" in name}):
        check_shards(shards, verify_folder(shards))
    files = [path / name for name in manifest.files if name.endswith(".jsonl") and name != REJECTED_FILE]
    reader = RowReader(layout)
    for part in plan_parts(files, 64 << 20):
        rows = reader.read(part.path, part.start, part.stop)
        if len(rows):
            try:
                check_columns(rows, layout)
            except InputError as error:
                raise InputError(f"{part.path}: {error}; make the file again with `beingvl tokenize`") from error


def check_vbpe(path: Path, manifest: Manifest | None = None) -> None:
    """Raises InputError for merges that no training can have made."""
    from beingvl.tokenizer.vbpe import VisualBPE

    VisualBPE.load(path)
