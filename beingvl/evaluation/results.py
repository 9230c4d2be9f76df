"""What all evaluations share: work in parts of rows, and the output folder.

Evaluation          computes parts and joins them; answering.py, held_out_loss.py and
                    text_parity.py define the result of a part, and of all parts together
scores.json         the scores, their standard errors, and scores of groups of rows
predictions.jsonl   answers, one line per row; for losses samples.jsonl
manifest.json       written last, with the request, and the seconds of all ranks together
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from beingvl.artefact.files import printable, to_json, write_atomically
from beingvl.artefact.manifest import read_manifest, write_manifest
from beingvl.artefact.parts import Parts
from beingvl.artefact.request import Request
from beingvl.artefact.work import Work
from beingvl.errors import InputError
from beingvl.json_file import parse_json, read_json

KIND = "evaluation"
SCORES_FILE = "scores.json"
PREDICTIONS_FILE = "predictions.jsonl"
SAMPLES_FILE = "samples.jsonl"
MAX_TABLE_ROWS = 20
_PART_FILE = "found.json"


@dataclass(frozen=True)
class SharedOptions:
    """The options of `evaluate` that every evaluation has. `template` overrides the model's."""

    model: Path
    output: Path
    name: str
    template: str | None
    dtype: torch.dtype
    device: torch.device
    limit: int | None
    rows_per_part: int

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")


class Evaluation(Work):
    """Work whose parts are ranges of rows. A subclass sets `num_rows` and `lineage`."""

    kind = KIND
    num_rows: int
    lineage: dict[str, str]

    def __init__(self, shared: SharedOptions) -> None:
        self.shared, self.output = shared, shared.output

    def options(self) -> Request:
        """Everything that determines the parts' results and is known without reading images."""
        raise NotImplementedError

    def evaluate_rows(self, rows: range, advance: Callable[[int], object]) -> Any:
        """The result for a range of rows; must be JSON-serializable."""
        raise NotImplementedError

    def combine(self, found: Sequence[Any]) -> tuple[dict[str, Any], Request]:
        """Results of all parts, in order -> contents of scores.json, and the whole request. Writes
        the file with one line per row.
        """
        raise NotImplementedError

    # ---- as work in parts ----

    @property
    def num_parts(self) -> int:
        return -(-self.num_rows // self.shared.rows_per_part)

    def rows_of_part(self, number: int) -> range:
        size = self.shared.rows_per_part
        return range(number * size, min((number + 1) * size, self.num_rows))

    def size_of_part(self, number: int) -> int:
        return len(self.rows_of_part(number))

    def request(self) -> Request:
        return self.options()

    def request_of_parts(self) -> Request:
        return Request({**self.options(), "rows_per_part": self.shared.rows_per_part})

    def write_part(self, number: int, folder: Path, advance: Callable[[int], object]) -> None:
        started = time.perf_counter()
        found = self.evaluate_rows(self.rows_of_part(number), advance)
        part = {"found": found, "seconds": time.perf_counter() - started}
        (folder / _PART_FILE).write_text(json.dumps(part))

    def join(self, parts: Parts) -> None:
        all_parts = parts.read_json(self.num_parts, _PART_FILE)
        seconds = sum(part["seconds"] for part in all_parts)
        found, request = self.combine([part["found"] for part in all_parts])
        scores = {"name": self.shared.name, **found}
        write_atomically(self.output / SCORES_FILE, to_json(scores))
        details = {"request": request, "seconds": seconds}
        write_manifest(self.output, KIND, {"rows": scores["rows"]}, self.lineage, details)
        print(f"{self.output}: {self.num_rows} {self.unit}s, {seconds:.1f} s of work")


def write_lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """One JSON line per row; a lone surrogate stays an escape, as in the input."""
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    write_atomically(path, printable("".join(lines)))


# ---- what is read and shown ----


def read_summary(folder: Path) -> dict[str, Any]:
    """scores.json of a finished evaluation. Raises InputError if the folder is not one."""
    read_manifest(folder, KIND)
    return read_json(folder / SCORES_FILE)


def named_summary(folder: Path, name: str | None) -> dict[str, Any]:
    """As `read_summary`. Raises InputError if the evaluation has a different name than `name`."""
    scores = read_summary(folder)
    if name not in (None, scores["name"]):
        raise InputError(
            f"{folder} is finished with the name {scores['name']!r}, asked for {name!r}; choose "
            "another folder or add --overwrite"
        )
    return scores


def read_predictions(folder: Path) -> list[dict[str, Any]]:
    """All lines of a finished evaluation's predictions.jsonl."""
    read_manifest(folder, KIND)
    # An answer may contain U+2028, where str.splitlines would split it.
    with open(folder / PREDICTIONS_FILE, encoding="utf-8") as file:
        return [parse_json(line, file.name) for line in file]


def print_scores(scores: Mapping[str, Any]) -> None:
    """Print all scores with standard errors, then categories, sources, kinds or questions."""
    variant = f" ({scores['variant']})" if "variant" in scores else ""
    print(f"{scores['name']}: {scores['metric']}, {scores['rows']} rows{variant}")
    for name, value in scores["scores"].items():
        error = scores["standard_errors"].get(name)
        print(f"  {name:<22} {value:12.6g}" + (f"  ± {error:.2g}" if error is not None else ""))
    for group in ("categories", "sources", "kinds"):
        for name, entry in scores.get(group, {}).items():
            values = "  ".join(f"{key} {value:.4g}" for key, value in entry.items())
            print(f"  {name:<22} {values}")
    if "equal" in scores:
        print(f"  text logits are {'bit-identical' if scores['equal'] else 'not equal'}")
        if scores["equal_is_expected"] and not scores["equal"]:
            print("DIFFERENT: only visual rows were trained, so text logits must not change")
    if "questions" in scores:
        print_questions(scores)


def print_questions(scores: Mapping[str, Any]) -> None:
    """Print accuracy, chance and majority of each question; at most MAX_TABLE_ROWS, the most
    frequent ones.
    """
    entries = sorted(scores["questions"].items(), key=lambda item: -item[1]["rows"])
    width = max(len(text[:60]) for text, _ in entries)
    print(f"  {'question':<{width}}  accuracy  chance  majority    rows")
    for text, entry in entries[:MAX_TABLE_ROWS]:
        print(
            f"  {text[:60]:<{width}}  {entry['accuracy']:8.3f}  {entry['chance']:6.3f}  "
            f"{entry['majority']:8.3f}  {entry['rows']:6d}"
        )
    if len(entries) > MAX_TABLE_ROWS:
        print(f"  … and {len(entries) - MAX_TABLE_ROWS} more questions in {SCORES_FILE}")
    mean = f"{scores['accuracy_mean']:8.3f}  {'':6}  {'':8}  {scores['rows']:6d}"
    print(f"  {'mean over questions':<{width}}  {mean}")
