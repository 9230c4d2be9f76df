"""The JSONL files that build-shards reads: what we know about a file before parsing its rows.

look_at    reads the manifest beside a file (from `beingvl tokenize`), or the file once
TokenFile  its content hash, what it was made with, the pieces that become parts
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
    """`content`: the file's hash, plus its name if rows are named after it. `template`: None for a
    file without rows. `image_positions`: None without a manifest. `has_spans`: whether all rows
    must have target_spans; None if it does not matter. `default_source`: the source of all rows, if
    we know that none names a category. `longest`: tokens of the longest sample in either variant, 0
    without a manifest.
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
    """`template` overrides what the file says. Raises InputError if the file does not match its
    manifest.
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
    """The manifest of a JSONL file's folder, if it lists the file."""
    if not is_complete(path.parent):
        return None
    manifest = read_manifest(path.parent, "jsonl")
    return manifest if path.name in manifest.files else None


def _content_of(path: Path, manifest: Manifest) -> str:
    """Hash of a file. The file must match its manifest, because all of it will be read."""
    if found := difference_of_file(path.parent, path.name, manifest):
        raise InputError(f"{path} {found}; make it again with `beingvl tokenize --overwrite`")
    return str(manifest.files[path.name]["hash"])


def _first_row(path: Path) -> dict[str, Any]:
    """Empty if the first line is not a row: whoever reads all rows reports it."""
    with open(path, "rb") as file:
        while (line := file.readline(MAX_LINE_BYTES)).isspace():
            pass
    try:
        row = json.loads(line)
    except NOT_READABLE:
        return {}
    return row if isinstance(row, dict) else {}


def _is_published(row: Mapping[str, Any]) -> bool:
    """Whether all of token_1 is the target; in the default template, its eoi and sep never are."""
    spans = row.get("target_spans")
    before, after = row.get("token_0"), row.get("token_1")
    image = row.get("token_image_new") or row.get("token_image") or []
    if spans is None:
        return True
    if not (isinstance(before, list) and isinstance(image, list) and isinstance(after, list)):
        return False  # whoever reads the row reports what is wrong with it
    start = len(before) + len(image)
    return bool(spans == [[start, start + len(after)]])


class _LineCounter:
    """Counts the lines that start before each piece of a file, while it is read in blocks."""

    def __init__(self, piece_bytes: int) -> None:
        self.before = [0]
        self._piece_bytes, self._at, self._newlines = piece_bytes, 0, 0

    def __call__(self, block: memoryview) -> None:
        begin = 0
        # Up to the byte before the piece: a newline there starts a line inside the piece.
        while (end := len(self.before) * self._piece_bytes - 1 - self._at) < len(block):
            self._newlines += bytes(block[begin:end]).count(b"\n")
            self.before.append(self._newlines + 1)
            begin = end
        self._newlines += bytes(block[begin:]).count(b"\n")
        self._at += len(block)
