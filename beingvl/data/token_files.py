"""The JSONL files that build-shards reads: what is known of a file before its rows are read.

look_at    the manifest beside a file (of `beingvl tokenize`), or one pass over the file
TokenFile  its content's hash, what it is made with, the pieces that become parts
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from beingvl.artefact.hashes import hash_file
from beingvl.artefact.manifest import Manifest, difference_of_file, is_complete, read_manifest
from beingvl.data.dataset_folder import DEFAULT_CATEGORY, dataset_of
from beingvl.data.llava_json import NOT_READABLE
from beingvl.data.made_with import DEFAULT, IMAGE_POSITIONS, PUBLISHED, RUNNING
from beingvl.data.token_rows import MAX_LINE_BYTES
from beingvl.errors import InputError


class Piece(NamedTuple):
    """The lines of `path` that start in bytes `start … stop - 1`."""

    path: Path
    start: int
    stop: int
    lines_before: int | None
    has_spans: bool | None


@dataclass(frozen=True)
class TokenFile:
    """`content` is the file's hash, with its name where rows are named after it. `template` is
    None of a file without rows, `image_positions` of one without a manifest. `has_spans`: whether
    all rows must have target_spans, None when it does not matter. `default_source`: of all rows,
    when it is known that none names a category. `longest`: tokens of the longest sample in either
    variant, 0 when no manifest says.
    """

    path: Path
    content: str
    template: str | None
    image_positions: str | None
    has_spans: bool | None
    default_source: str | None
    lines_before: list[int] | None
    piece_bytes: int
    longest: int

    def pieces(self) -> list[Piece]:
        size = self.path.stat().st_size
        starts = range(0, size, self.piece_bytes)
        return [
            Piece(
                self.path,
                start,
                min(start + self.piece_bytes, size),
                None if self.lines_before is None else self.lines_before[number],
                self.has_spans,
            )
            for number, start in enumerate(starts)
        ]


def look_at(path: Path, piece_bytes: int, template: str | None) -> TokenFile:
    """`template` stands over what the file says. Raises InputError when the file is not the one
    of its manifest.
    """
    manifest = manifest_beside(path)
    lines_before = has_spans = default_source = image_positions = None
    longest = 0
    if manifest is not None:
        content, entry = _content_of(path, manifest), dataset_of(manifest, path.name)
        asked = entry.get("request", {})
        template = template or asked.get("template")
        image_positions = asked.get(IMAGE_POSITIONS.name, RUNNING)
        counts = entry.get("counts", {})
        longest = counts.get("longest_sample_tokens", 0)
        if counts.get("rows_with_category") == 0:
            default_source = DEFAULT_CATEGORY[asked["mode"]]
    else:
        counter = _LineCounter(piece_bytes)
        content, lines_before = hash_file(path, counter), counter.before
    first = _first_row(path)
    if first and first.get("id") in (None, ""):
        content = f"{path.name} {content}"
    if first and template is None:
        has_spans = first.get("target_spans") is not None
        template = PUBLISHED if _is_published(first) else DEFAULT
    return TokenFile(
        path,
        content,
        template,
        image_positions,
        has_spans,
        default_source,
        lines_before,
        piece_bytes,
        longest,
    )


def manifest_beside(path: Path) -> Manifest | None:
    """The manifest of the folder that a JSONL file lies in, if it lists the file."""
    if not is_complete(path.parent):
        return None
    manifest = read_manifest(path.parent, "jsonl")
    return manifest if path.name in manifest.files else None


def _content_of(path: Path, manifest: Manifest) -> str:
    """Hash of a file, which is compared with its manifest, as all of it will be read."""
    if found := difference_of_file(path.parent, path.name, manifest):
        raise InputError(f"{path} {found}; make it again with `beingvl tokenize --overwrite`")
    return str(manifest.files[path.name]["hash"])


def _first_row(path: Path) -> dict[str, Any]:
    """Empty when the first line is not a row: whoever reads all of them names it."""
    with open(path, "rb") as file:
        while (line := file.readline(MAX_LINE_BYTES)).isspace():
            pass
    try:
        row = json.loads(line)
    except NOT_READABLE:
        return {}
    return row if isinstance(row, dict) else {}


def _is_published(row: Mapping[str, Any]) -> bool:
    """Whether all of token_1 is the target; by default its end of image or sep never is."""
    spans = row.get("target_spans")
    before, after = row.get("token_0"), row.get("token_1")
    image = row.get("token_image_new") or row.get("token_image") or []
    if spans is None:
        return True
    if not (isinstance(before, list) and isinstance(image, list) and isinstance(after, list)):
        return False  # what is wrong with the row is said where it is read
    start = len(before) + len(image)
    return bool(spans == [[start, start + len(after)]])


class _LineCounter:
    """How many lines begin before each piece of a file that is read in blocks."""

    def __init__(self, piece_bytes: int) -> None:
        self.before = [0]
        self._piece_bytes, self._at, self._newlines = piece_bytes, 0, 0

    def __call__(self, block: memoryview) -> None:
        begin = 0
        # The byte before a piece's first: a line that it ends begins in the piece.
        while (end := len(self.before) * self._piece_bytes - 1 - self._at) < len(block):
            self._newlines += bytes(block[begin:end]).count(b"\n")
            self.before.append(self._newlines + 1)
            begin = end
        self._newlines += bytes(block[begin:]).count(b"\n")
        self._at += len(block)
