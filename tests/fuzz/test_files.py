"""Mutated folders and rows: each is read, or refused in a sentence (harness.py says what else).

Who changes a file changes its manifest too, hashes included, so that no hash refuses it first.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from beingvl.artefact.manifest import (
    MANIFEST_FILE,
    read_manifest,
    sealed,
    start_folder,
    verify_folder,
)
from beingvl.data.arrow_shards import ShardReader
from beingvl.data.dialects import DIALECTS
from beingvl.data.token_rows import read_rows
from beingvl.data.tokenize_dataset import tokenize
from beingvl.errors import InputError
from beingvl.evaluation.answering import read_questions
from beingvl.images.vq_codes import CodeFolder
from beingvl.model.base_model import BaseModel
from beingvl.model.weight_files import WeightFolder
from beingvl.stage.stage_config import load_stage_config
from beingvl.train.checkpoint import CheckpointState, CheckpointWriter, rank_file
from beingvl.train.hf_folder import write_hf_folder
from beingvl.vbpe.train_vbpe import train_vbpe
from beingvl.vbpe.visual_bpe import VisualBPE
from beingvl.vocab import LAYOUT_FILE, VocabLayout
from tests.code_folder import write_codes
from tests.damage import list_anew
from tests.fuzz.harness import REFUSED, RETURNED, judged, mutated, mutated_values, nested
from tests.model.small_models import write_base_model
from tests.tiny import LAYOUT, stage_fields, write_model, write_shards

TRAINED = "model.norm.weight"
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    """One small folder of every kind."""
    root = tmp_path_factory.mktemp("good")
    write_model(root / "model", num_layers=1, hidden_size=16)
    write_base_model(root / "sharded", "llama", "sharded")
    write_shards(root / "shards", num_samples=40)
    grids = np.random.default_rng(0).integers(0, LAYOUT.num_vq, (8, 4, 4)).astype(np.uint16)
    write_codes(root / "codes", grids, LAYOUT.num_vq, {})
    train_vbpe(root / "codes", root / "vbpe", num_merges=5)
    (root / "stage").mkdir()
    (root / "stage" / "stage.json").write_text(json.dumps(stage_fields()))
    _write_checkpoint(root / "checkpoint", root / "model")
    return root


def _write_checkpoint(folder: Path, model: Path) -> None:
    manifest, weights = read_manifest(model), WeightFolder(model)[TRAINED]
    identity = {"start_model": manifest.content_hash, "lineage": manifest.lineage}
    spans = {"shape": list(weights.shape), "spans": [[0, len(weights)]], "adam_steps": 1}
    state = CheckpointState(3, 3, 1, identity, {TRAINED: spans})
    slices = {f"{TRAINED}.{key}": weights.clone() for key in ("master", "exp_avg", "exp_avg_sq")}
    writer = CheckpointWriter(0, lambda value: [value])
    writer.begin(folder, state, slices.items(), lambda folder: None)
    writer.commit()


# ---- who reads them ----


def read_weights(folder: Path, good: Path) -> None:
    weights = WeightFolder(folder)
    for name in weights:
        weights[name].clone()


def read_shards(folder: Path, good: Path) -> None:
    shards = ShardReader(folder)
    for number in range(0, len(shards), 7):
        assert shards[number].input_ids.max(initial=0) < shards.layout.size
    assert len(shards.members) == len(shards.sources)


def read_codes(folder: Path, good: Path) -> None:
    codes = CodeFolder(folder)
    assert codes.grid == codes.codes.shape[1:]
    codes.grids({key: codes.row(key) for key in ("1.png", "7.png")})


def verify_and_replace(folder: Path, good: Path) -> None:
    try:
        verify_folder(folder)
    finally:
        start_folder(folder, "model")


def export(folder: Path, good: Path) -> None:
    write_hf_folder(good / "model", folder, folder.parent / "out")


def export_from(folder: Path, good: Path) -> None:
    write_hf_folder(folder, good / "checkpoint", folder.parent / "out")


Read = Callable[[Path, Path], object]
BYTES: dict[str, tuple[str, str, Read, int]] = {
    "weights": ("model", "model.safetensors", read_weights, 450),
    "index": ("sharded", INDEX, read_weights, 250),
    "manifest": ("shards", MANIFEST_FILE, read_shards, 250),
    "slices": ("checkpoint", rank_file(0, 1), export, 150),
    "shard": ("shards", "shard-00000.arrow", read_shards, 150),
    "lengths": ("shards", "lengths.npy", read_shards, 50),
    "codes": ("codes", "codes.npy", read_codes, 50),
    "keys": ("codes", "keys.jsonl", read_codes, 50),
    "key offsets": ("codes", "key_offsets.npy", read_codes, 50),
    "vbpe": ("vbpe", "vbpe.json", lambda folder, good: VisualBPE.load(folder), 50),
}
"""Kind -> folder, file, who reads it, how many."""
VALUES: dict[str, tuple[str, str, Read, int]] = {
    "index": ("sharded", INDEX, read_weights, 250),
    "manifest of shards": ("shards", MANIFEST_FILE, read_shards, 150),
    "manifest of codes": ("codes", MANIFEST_FILE, read_codes, 150),
    "manifest of a model": ("model", MANIFEST_FILE, verify_and_replace, 150),
    "manifest of a start model": ("model", MANIFEST_FILE, export_from, 100),
    "manifest of a checkpoint": ("checkpoint", MANIFEST_FILE, export, 100),
    "state": ("checkpoint", "state.json", export, 150),
    "vbpe": ("vbpe", "vbpe.json", lambda folder, good: VisualBPE.load(folder), 150),
    "layout": ("model", LAYOUT_FILE, lambda folder, good: VocabLayout.load(folder), 50),
    "config": ("sharded", "config.json", lambda folder, good: BaseModel.open(folder), 50),
    "stage": ("stage", "stage.json", lambda at, good: load_stage_config(at / "stage.json"), 100),
}


def changed_folders(
    good: Path, at: Path, name: str, file: str, contents: Iterator[bytes]
) -> Iterator[tuple[int, Path]]:
    """(number, folder) of copies of a folder in which one file is other bytes."""
    for number, content in enumerate(contents):
        shutil.rmtree(at, ignore_errors=True)
        folder = Path(shutil.copytree(good / name, at / "checkpoints" / "folder"))
        (folder / file).write_bytes(content)
        if file != MANIFEST_FILE:
            list_anew(folder)
        yield number, folder


def count_outcomes(
    kind: str, read: Read, good: Path, at: Path, folders: Iterator[tuple[int, Path]]
) -> Counter[str]:
    return Counter(
        judged(f"{kind}, number {number}", partial(read, folder, good), at)
        for number, folder in folders
    )


@pytest.mark.slow
@pytest.mark.parametrize("kind", BYTES)
def test_files_of_other_bytes(good, tmp_path, kind) -> None:
    name, file, read, count = BYTES[kind]
    contents = mutated([(good / name / file).read_bytes()], count, seed=1)
    at = tmp_path / "at"
    folders = changed_folders(good, at, name, file, contents)
    outcomes = count_outcomes(kind, read, good, at, folders)
    assert outcomes.total() == count and outcomes[REFUSED]


@pytest.mark.slow
@pytest.mark.parametrize("kind", VALUES)
def test_files_of_other_values(good, tmp_path, kind) -> None:
    name, file, read, count = VALUES[kind]
    seeds = [json.loads((good / name / file).read_text())]
    at = tmp_path / "at"

    def contents() -> Iterator[bytes]:
        for value in mutated_values(seeds, count, seed=2):
            if file == MANIFEST_FILE and isinstance(value, Mapping):
                value = sealed(value)
            yield json.dumps(value).encode()

    folders = changed_folders(good, at, name, file, contents())
    outcomes = count_outcomes(kind, read, good, at, folders)
    assert outcomes.total() == count and outcomes[REFUSED]


@pytest.mark.parametrize("kind", VALUES)
def test_json_that_is_deeper_than_a_stack(good, tmp_path, kind) -> None:
    name, file, read, _ = VALUES[kind]
    for depth in (70, 900, 200_000):
        folders = changed_folders(good, tmp_path / "at", name, file, iter([nested(depth)]))
        for _, folder in folders:
            with pytest.raises(InputError, match=r"not valid JSON \(nested more than 64 deep\)"):
                read(folder, good)


# ---- rows ----

TURNS = [{"from": "human", "value": "<image>\nWhich?"}, {"from": "gpt", "value": "That."}]
ROWS: list[dict[str, Any]] = [
    {"id": 1, "image": "1.png", "conversations": TURNS, "size": {"width": [3, 4], "height": 5}},
    {"id": "b", "image": ["2.png", "3.png"], "category": "perception", "conversations": TURNS * 2},
    {"id": "c", "conversations": [{"from": "human", "value": "Hi"}, *TURNS[1:]]},
]
CODES = [*range(LAYOUT.first_image_id, LAYOUT.first_image_id + 4)]
TOKEN_ROWS: list[dict[str, Any]] = [
    {"id": "a", "image": "1.png", "category": "c", "token_0": [1, 2], "token_1": [3, 4, 5]}
    | {"token_image": CODES, "token_image_new": CODES, "target_spans": [[7, 9]]},
    {"id": 2, "token_0": [1], "token_1": [3, 4]},
]
ROWS_PER_FILE = 50


@pytest.mark.slow
@pytest.mark.parametrize("how", ["values", "bytes"])
def test_rows_to_tokenize(good, tmp_path, how) -> None:
    """In files of many: a bad row is rejected, the others are not."""
    if how == "values":
        lines = [json.dumps(row).encode() for row in mutated_values(ROWS, 2000, seed=3)]
    else:
        seeds = [json.dumps(row, ensure_ascii=False).encode() for row in ROWS]
        lines = [line.replace(b"\n", b" ") for line in mutated(seeds, 500, seed=4)]
    path, outcomes = tmp_path / "at" / "rows.jsonl", Counter[str]()
    path.parent.mkdir()
    model = {"model_path": good / "model", "vq_codes": good / "codes"}
    options = {"vbpe_path": good / "vbpe", "max_rejected": 1, "num_workers": 0}
    options["row_format"] = "llava"  # mutated rows may look like those of several dialects
    for start in range(0, len(lines), ROWS_PER_FILE):
        path.write_bytes(b"\n".join(lines[start : start + ROWS_PER_FILE]) + b"\n")
        call = partial(tokenize, path, output_path=path.parent / f"{start}", **model, **options)
        outcomes[judged(f"rows from {start} on, {how}", call, path.parent)] += 1
    made = [read_manifest(folder).counts for folder in path.parent.iterdir() if folder.is_dir()]
    assert sum(counts["rows"] for counts in made) and sum(counts["rejected"] for counts in made)


SAID = [{"role": "user", "content": "<image>Which?"}, {"role": "assistant", "content": "That."}]
PARTS = [{"type": "image_url", "image_url": {"url": "1.png"}}, {"type": "text", "text": "Which?"}]
RECORDS: dict[str, dict[str, Any]] = {
    "llava": ROWS[0],
    "sharegpt": {"conversations": TURNS, "system": "Be short.", "images": ["1.png"]},
    "messages": {"messages": [{**SAID[0], "content": PARTS}, SAID[1], *SAID], "images": ["2.png"]},
    "texts": {"texts": [{"user": "Which?", "assistant": "That."}], "images": ["1.png"]},
    "caption": {"caption": "That.", "image": "1.png"},
    "alpaca": {"instruction": "Which?", "output": "That.", "history": [["Is it?", "Yes."]]},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", DIALECTS)
def test_records_of_a_dialect(tmp_path, name) -> None:
    outcomes = Counter[str]()
    for number, record in enumerate(mutated_values([RECORDS[name]], 300, seed=7)):
        if isinstance(record, dict):
            outcomes[judged(f"{number}", partial(DIALECTS[name], record), tmp_path)] += 1
    assert outcomes[RETURNED] > 20


@pytest.mark.slow
@pytest.mark.parametrize(
    ("seeds", "read"),
    [
        (TOKEN_ROWS, lambda path, vbpe: read_rows(path, 0, path.stat().st_size, LAYOUT, vbpe)),
        (ROWS, lambda path, vbpe: read_questions(path, None, "exact_match")),
    ],
    ids=["token rows", "questions"],
)
def test_rows_one_by_one(good, tmp_path, seeds, read) -> None:
    path, vbpe, outcomes = tmp_path / "rows.jsonl", VisualBPE.load(good / "vbpe"), Counter[str]()
    lines = [json.dumps(row).encode() for row in mutated_values(seeds, 900, seed=5)]
    lines += mutated([json.dumps(row).encode() for row in seeds], 600, seed=6)
    for number, line in enumerate([*lines, nested()]):
        path.write_bytes(line + b"\n")
        outcomes[judged(f"row {number}", partial(read, path, vbpe), tmp_path)] += 1
    assert outcomes[RETURNED] > 50 and outcomes[REFUSED] > 50
