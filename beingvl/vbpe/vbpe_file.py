"""What all vBPE vocabularies share, and the text of `vbpe.json`, which diff can compare."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from beingvl.artefact.files import write_atomically
from beingvl.errors import InputError
from beingvl.vbpe.grids import (
    MAX_CODES,
    MAX_IDS,
    EncodeChunk,
    checked_grids,
    encode_in_chunks,
)

VBPE_FILE = "vbpe.json"
FORMAT = "beingvl-vbpe"
FORMAT_VERSION = 1


@dataclass(eq=False)
class Vocabulary:
    """Codes 0 … num_codes-1 and, for rank r, the merge that makes id `num_codes + r`.

    `merges` is int32 `[R, columns]`; the first two columns are the ids that merge. `lineage`: what
    it was made with (`vqgan`: hash). `parameters`: how it was trained. `grid`: (height, width) of
    the training images if they all had the same size. Vocabularies are equal if their codes and
    merges are.
    """

    num_codes: int
    merges: np.ndarray
    lineage: dict[str, str] = field(default_factory=dict)
    parameters: dict[str, Any] = field(default_factory=dict)
    grid: tuple[int, int] | None = None
    source: str = "vBPE"  # for messages

    kind: ClassVar[str]
    columns: ClassVar[int]
    and_expected: ClassVar[str] = ""

    def __post_init__(self) -> None:
        """Raises InputError for a vocabulary that no training can produce."""
        if not 1 <= self.num_codes <= MAX_CODES:
            raise InputError(f"{self.source}: {self.num_codes} codes, expected 1 to {MAX_CODES}")
        try:
            array = np.asarray(
                self.merges if len(self.merges) else np.zeros((0, self.columns), int)
            )
        except (TypeError, ValueError) as error:
            raise InputError(f"{self.source}: merges are not a list of lists ({error})") from error
        if array.ndim != 2 or array.shape[1] != self.columns or array.dtype.kind not in "iu":
            raise InputError(
                f"{self.source}: merges of shape {list(array.shape)} and type {array.dtype}, "
                f"expected integers [R, {self.columns}]"
            )
        if self.num_codes + len(array) > MAX_IDS:
            raise InputError(
                f"{self.source}: {self.num_codes} codes and {len(array)} merges, expected at most "
                f"{MAX_IDS} together"
            )
        good = self._are_good(array)
        if not good.all():
            rank = int(np.argmin(good))
            raise InputError(
                f"{self.source}: merge {rank} is {array[rank].tolist()}, expected two ids below "
                f"{self.num_codes + rank}{self.and_expected}"
            )
        self.merges = array.astype(np.int32)

    def _are_good(self, merges: np.ndarray) -> np.ndarray:
        """Whether each merge is possible, bool `[R]`."""
        known = self.num_codes + np.arange(len(merges))[:, None]
        return np.all((merges[:, :2] >= 0) & (merges[:, :2] < known), axis=1)

    def encode(self, grid: np.ndarray) -> np.ndarray:
        """Codes `[H, W]` to image ids `[n]` int32. Raises InputError for unknown codes."""
        return self.encode_batch(np.asarray(grid)[None])[0]

    def encode_batch(
        self, grids: np.ndarray, num_threads: int = 1
    ) -> tuple[np.ndarray, np.ndarray]:
        """Codes `[N, H, W]` to (image ids, int32 flat; offsets, int64 `[N + 1]`)."""
        grids = checked_grids(grids, self.num_codes, self.source)
        return encode_in_chunks(self._encoder(), grids, num_threads)

    def _encoder(self) -> EncodeChunk:
        raise NotImplementedError

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Vocabulary) and self.fingerprint() == other.fingerprint()

    @property
    def num_merges(self) -> int:
        return len(self.merges)

    @property
    def num_ids(self) -> int:
        """Number of image ids: codes and merges."""
        return self.num_codes + self.num_merges

    def fingerprint(self) -> str:
        """Hash of codes and merges, which two artefacts must share to be used together."""
        content = [self.kind, self.num_codes, self.merges.tolist()]
        text = json.dumps(content, separators=(",", ":"))
        return "sha256:" + hashlib.sha256(text.encode()).hexdigest()

    def save(self, path: Path | str) -> None:
        """Write `vbpe.json`, with one merge per line."""
        head = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "kind": self.kind,
            "num_codes": self.num_codes,
            "num_merges": self.num_merges,
            "fingerprint": self.fingerprint(),
            "grid": list(self.grid) if self.grid else None,
            "lineage": self.lineage,
            "parameters": self.parameters,
        }
        lines = [f"  {json.dumps(key)}: {json.dumps(value)}," for key, value in head.items()]
        merges = ",\n".join(f"    {json.dumps(merge)}" for merge in self.merges.tolist())
        lines += ['  "merges": [', *([merges] if merges else []), "  ]"]
        write_atomically(path, "\n".join(["{", *lines, "}"]) + "\n")
