"""Re-hash an artefact of any step (a folder with a manifest.json), and check that its content
makes sense.

Every file must have the hash of the manifest; of weight files that a step linked without reading it
has one of samples only, and their number is printed. Shards and JSONL rows are read again: ids
inside the vocabulary, target spans inside their rows; index files and the manifest's counts agree
with the shards. Codes must be inside the code book, keys sorted and unique, merges possible.
Headers of weight files must fit the files, the index and config.json, and the vocabulary the
embedding; slices of a checkpoint must make whole parameters; an evaluation must have a readable
line for every row. Weights themselves are not read a second time. Of a stage's folder its finished
checkpoints and final/ are taken. A single file is compared with the manifest beside it; a vbpe.json
without one has no hash, its merges are checked.
"""

from __future__ import annotations

import argparse
import json
from itertools import pairwise
from math import prod
from pathlib import Path

from beingvl.artefact.manifest import (
    MANIFEST_FILE,
    Manifest,
    is_complete,
    read_manifest,
    verify_file,
    verify_folder,
)
from beingvl.data.arrow_shards import ShardReader, check_columns
from beingvl.data.build_shards import plan_parts
from beingvl.data.dataset_folder import REJECTED_FILE
from beingvl.data.token_rows import RowReader
from beingvl.errors import InputError
from beingvl.evaluation.results import (
    PREDICTIONS_FILE,
    SAMPLES_FILE,
    SCORES_FILE,
    read_summary,
)
from beingvl.images.vq_codes import CodeFolder
from beingvl.model.base_model import BaseModel
from beingvl.model.weight_files import read_header
from beingvl.train.checkpoint import (
    STATE_FILE,
    StateReader,
    complete_checkpoints,
    rank_file,
    read_state,
)
from beingvl.train.partitions import STATE_KEYS
from beingvl.train.probe import load_probe
from beingvl.vbpe.vbpe_file import VBPE_FILE
from beingvl.vbpe.visual_bpe import VisualBPE
from beingvl.vocab import LAYOUT_FILE, VocabLayout


def run(args: argparse.Namespace) -> None:
    checks = {
        "shards": check_shards,
        "vq_codes": check_codes,
        "jsonl": check_jsonl,
        "vbpe": check_vbpe,
        "model": check_model,
        "checkpoint": check_checkpoint,
        "evaluation": check_evaluation,
    }
    for given in args.paths:
        path = given.parent if given.name == MANIFEST_FILE else given
        if not path.exists():
            raise InputError(f"{path} does not exist; give an artefact folder, or one of its files")
        if path.is_file():
            verify_one(path)
            continue
        for folder in artefacts_of_stage(path) or [path]:
            manifest = verify_folder(folder)
            if manifest.kind in checks:
                checks[manifest.kind](folder, manifest)
            size = sum(int(entry["bytes"]) for entry in manifest.files.values())
            print(
                f"{folder}: {manifest.kind}, {size:,} bytes, {len(manifest.files)} files re-hashed, every hash "
                "as written"
            )


def artefacts_of_stage(path: Path) -> list[Path]:
    """What is finished in the folder that a training stage writes; nothing in any other folder."""
    if is_complete(path):
        return []
    return [
        folder for folder in (*complete_checkpoints(path), path / "final") if is_complete(folder)
    ]


def verify_one(path: Path) -> None:
    """A file of an artefact folder, or a vbpe.json anywhere. Raises InputError for a changed
    one, or an unknown one.
    """
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
    """Raises InputError for a sample that could not have been written, or an index that does not
    fit the samples.
    """
    ShardReader(path).check()


def check_codes(path: Path, manifest: Manifest) -> None:
    """Raises InputError for a code outside the code book, or keys that do not fit the rows."""
    folder = CodeFolder(path)
    for start in range(0, len(folder.codes), 4096):
        largest = int(folder.codes[start : start + 4096].max(initial=0))
        if largest >= folder.num_codes:
            raise InputError(
                f"{path} holds the code {largest}, its code book ends at "
                f"{folder.num_codes - 1}; encode the images again"
            )
    if len(folder.keys) != len(folder.codes):
        raise InputError(
            f"{path} has {len(folder.codes)} rows and {len(folder.keys)} keys; encode the "
            "images again"
        )
    if (
        any(one >= other for one, other in pairwise(folder.keys))
        and "key_offsets.npy" in manifest.files
    ):
        raise InputError(f"{path}: the keys are not sorted and unique; encode the images again")


def check_jsonl(path: Path, manifest: Manifest) -> None:
    """Raises InputError that names the line which is not a token row, or the sample that cannot
    be trained on.
    """
    layout = VocabLayout.from_dict(manifest.details["layout"], f"{path}/manifest.json")
    for shards in sorted({path / name.split("/")[0] for name in manifest.files if "/" in name}):
        check_shards(shards, verify_folder(shards))
    files = [
        path / name for name in manifest.files if name.endswith(".jsonl") and name != REJECTED_FILE
    ]
    reader = RowReader(layout)
    for part in plan_parts(files, 64 << 20):
        rows = reader.read(part.path, part.start, part.stop)
        if len(rows):
            try:
                check_columns(rows, layout)
            except InputError as error:
                raise InputError(
                    f"{part.path}: {error}; make the file again with `beingvl tokenize`"
                ) from error


def check_vbpe(path: Path, manifest: Manifest | None = None) -> None:
    """Raises InputError for merges that no training can have made."""
    VisualBPE.load(path)


def check_model(path: Path, manifest: Manifest) -> None:
    """Raises InputError for weights that do not fit their files, the index, config.json or the
    vocabulary layout.
    """
    model = BaseModel.open(path)
    if stray := {file.name for file in path.glob("*.safetensors")} - set(model.weights.files):
        raise InputError(
            f"{path / min(stray)} is a weight file that {model.weights.index_file} does "
            "not name; remove it"
        )
    if (path / LAYOUT_FILE).is_file():
        layout = VocabLayout.load(path)
        if model.num_text < layout.size:
            found = (
                f"{path}: {model.input_name} has {model.num_text} rows, {LAYOUT_FILE} has "
                f"{layout.size} ids"
            )
            raise InputError(f"{found}; make the model folder again")
        if manifest.lineage.get("vocab") != layout.fingerprint():
            raise InputError(
                f"{path}: {LAYOUT_FILE} is not the vocabulary of the manifest's lineage; make "
                "the model folder again"
            )


def check_checkpoint(path: Path, manifest: Manifest) -> None:
    """Raises InputError for slices that are not in the ranks' files, or do not make whole
    parameters, or a damaged probe.
    """
    state = read_state(path)
    StateReader(path, state).__exit__()
    load_probe(path)
    for name, entry in state.parameters.items():
        reached = 0
        for start, stop in (span for span in entry["spans"] if span[0] < span[1]):
            reached = stop if start == reached else -1
        if reached != prod(entry["shape"]):
            found = f"the spans {entry['spans']} of {name} do not make its shape {entry['shape']}"
            raise InputError(
                f"{path / STATE_FILE}: {found}; remove {path} and go on from an older checkpoint"
            )
    for rank in range(state.num_ranks):
        file = path / rank_file(rank, state.num_ranks)
        slices = read_header(file)
        for name, entry in state.parameters.items():
            start, stop = entry["spans"][rank]
            for key in STATE_KEYS:
                held = slices[f"{name}.{key}"].num_bytes if f"{name}.{key}" in slices else 0
                if held != 4 * (stop - start):
                    expected = f"{4 * (stop - start)} bytes of {name}.{key} that {STATE_FILE} says"
                    raise InputError(
                        f"{file} holds {held} of {expected}; remove {path} and go on from an "
                        "older checkpoint"
                    )


def check_evaluation(path: Path, manifest: Manifest) -> None:
    """Raises InputError for scores that are not those of the manifest's rows, or a row without a
    readable line.
    """
    rows = manifest.counts["rows"]
    try:
        found = read_summary(path)["rows"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path / SCORES_FILE} cannot be read ({error!r}); evaluate again with --overwrite"
        ) from error
    if found != rows:
        raise InputError(
            f"{path / SCORES_FILE} is of {found} rows, the manifest of {rows}; evaluate "
            "again with --overwrite"
        )
    for name, field in ((PREDICTIONS_FILE, "prediction"), (SAMPLES_FILE, "loss_sum")):
        if name not in manifest.files:
            continue
        number = 0
        with open(path / name, encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                try:
                    json.loads(line)[field]
                except (ValueError, KeyError, TypeError) as error:
                    raise InputError(
                        f"{path / name}, line {number}: no {field!r} ({error!r}); evaluate again"
                    ) from error
        if number != rows:
            raise InputError(
                f"{path / name} has {number} lines, the manifest {rows} rows; evaluate again "
                "with --overwrite"
            )
