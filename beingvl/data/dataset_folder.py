"""The output folder of `beingvl tokenize`, which several datasets may share.

NAME_base.jsonl, NAME_vbpe.jsonl    or the shard folders NAME_base/, NAME_vbpe/
rejected.jsonl                      {"dataset", "index", "id", "reason"} of every rejected row of
                                    all datasets
manifest.json                       details.datasets has one entry per finished dataset; an entry
                                    is replaced without touching the others; only the files of
                                    finished datasets are listed
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from beingvl.artefact.files import write_atomically
from beingvl.artefact.manifest import (
    MANIFEST_FILE,
    Manifest,
    is_complete,
    join_lineages,
    read_manifest,
    write_manifest,
)
from beingvl.artefact.request import Request
from beingvl.data.made_with import FACTS
from beingvl.errors import InputError
from beingvl.json_file import parse_json
from beingvl.vocab import VocabLayout

REJECTED_FILE = "rejected.jsonl"
VARIANTS = ("base", "vbpe")
DEFAULT_CATEGORY = {"pt": "foundation", "sft": "instruction"}  # by --mode


class DatasetFolder:
    """One dataset's part of an output folder: its files, and its entry in the manifest's
    `datasets`.
    """

    def __init__(self, folder: Path, name: str, layout: VocabLayout) -> None:
        self.folder, self.name, self.layout = folder, name, layout
        self.parts_name = f"{name}.parts.tmp"

    def file(self, variant: str) -> Path:
        return self.folder / f"{self.name}_{variant}.jsonl"

    def shards(self, variant: str) -> Path:
        return self.folder / f"{self.name}_{variant}"

    def _manifest(self) -> Manifest | None:
        return read_manifest(self.folder, "jsonl") if is_complete(self.folder) else None

    def is_finished(self, lineage: dict[str, str]) -> bool:
        """Raises InputError if it is unfinished and its lineage contradicts another dataset's."""
        manifest = self._manifest()
        if manifest is None:
            return False
        datasets = manifest.details["datasets"]
        if self.name in datasets:
            return True
        others = {f"{self.folder} ({name})": entry["lineage"] for name, entry in datasets.items()}
        join_lineages({**others, f"{self.folder} ({self.name})": lineage})
        return False

    def check_finished(self, request: Request) -> None:
        """Raises InputError if the finished dataset was made with a different request."""
        entry = read_manifest(self.folder, "jsonl").details["datasets"][self.name]
        if difference := request.difference(entry["request"]):
            raise InputError(
                f"{self.folder} is finished, but {self.name} has {difference}; choose another "
                "folder or add --overwrite"
            )
        shown = f"{self.name}{with_images(entry['counts'])}"
        print(f"{self.folder}: {shown} is finished already, with the same inputs: reused")

    def remove(self) -> None:
        """Remove this dataset from the folder; the others stay complete throughout."""
        manifest = self._manifest()
        if manifest is not None and self.name in manifest.details["datasets"]:
            others = {
                name: entry
                for name, entry in manifest.details["datasets"].items()
                if name != self.name
            }
            if others:
                self._write(others, self._rejected_of_others(), self._hashes_of_others(manifest))
            else:
                (self.folder / MANIFEST_FILE).unlink()
        self.delete_files()

    def delete_files(self) -> None:
        """Remove what an interrupted run left of this dataset; never called when it is finished."""
        for variant in VARIANTS:
            self.file(variant).unlink(missing_ok=True)
            shutil.rmtree(self.shards(variant), ignore_errors=True)

    def _rejected_of_others(self) -> list[str]:
        path = self.folder / REJECTED_FILE
        if self._manifest() is None or not path.is_file():
            return []
        with open(path, encoding="utf-8", newline="\n") as file:
            return [line for line in file if parse_json(line, path)["dataset"] != self.name]

    def _hashes_of_others(self, manifest: Manifest | None) -> dict[str, str]:
        if manifest is None:
            return {}
        others = set(manifest.details["datasets"]) - {self.name}
        return {
            name: str(file["hash"])
            for name, file in manifest.files.items()
            if _is_file_of(others, name)
        }

    def finish(
        self, entry: dict[str, Any], rejected: list[str], known_hashes: dict[str, str]
    ) -> None:
        """Add this dataset to the manifest; its files are already in place."""
        manifest = self._manifest()
        datasets = {**(manifest.details["datasets"] if manifest else {}), self.name: entry}
        self._write(
            datasets,
            self._rejected_of_others() + rejected,
            {**self._hashes_of_others(manifest), **known_hashes},
        )

    def _write(
        self, datasets: dict[str, Any], rejected: list[str], known_hashes: dict[str, str]
    ) -> None:
        write_atomically(
            self.folder / REJECTED_FILE, "".join(sorted(rejected, key=_dataset_and_index))
        )
        counts = add_counts([entry["counts"] for entry in datasets.values()])
        lineage = join_lineages({name: entry["lineage"] for name, entry in datasets.items()})
        details = {"layout": self.layout.to_dict(), "datasets": dict(sorted(datasets.items()))}
        for fact in FACTS:
            values = {e["request"].get(fact.name, fact.choices[0]) for e in datasets.values()}
            if len(values) == 1:
                details[fact.name] = values.pop()

        def belongs(file: str) -> bool:
            return file == REJECTED_FILE or _is_file_of(datasets, file)

        write_manifest(self.folder, "jsonl", counts, lineage, details, known_hashes, belongs)


def dataset_of(manifest: Manifest, file: str) -> dict[str, Any]:
    """The entry of the dataset that a file belongs to; empty if the manifest has none."""
    datasets = manifest.details.get("datasets", {})
    return next((entry for name, entry in datasets.items() if _is_file_of([name], file)), {})


def _is_file_of(datasets: Iterable[str], file: str) -> bool:
    first = file.partition("/")[0]
    return any(
        first in (f"{name}_{variant}.jsonl", f"{name}_{variant}")
        for name in datasets
        for variant in VARIANTS
    )


def add_counts(parts: Sequence[Mapping[str, int]]) -> dict[str, int]:
    """Sums, except for `longest_…`: the maximum."""
    return {
        name: (max if name.startswith("longest") else sum)(part.get(name, 0) for part in parts)
        for name in dict.fromkeys(name for part in parts for name in part)
    }


def with_images(counts: Mapping[str, int]) -> str:
    """` (20 with 0 images, 400 with 1)` from a dataset's counts; old manifests do not have them."""
    found = [(re.fullmatch(r"rows_with_(\d+)_images", name), n) for name, n in counts.items()]
    rows = sorted((int(match[1]), num_rows) for match, num_rows in found if match)
    shown = [f"{num_rows} with {images}" for images, num_rows in rows]
    if rows:
        shown[0] += " image" if rows[0][0] == 1 else " images"
    return f" ({', '.join(shown)})" if shown else ""


def _dataset_and_index(line: str) -> tuple[str, int]:
    entry = json.loads(line)
    return entry["dataset"], entry["index"]
