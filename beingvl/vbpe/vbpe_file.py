"""The text of `vbpe.json`: readable, and two of them can be compared with diff."""

from __future__ import annotations

import json
from typing import Any, Protocol

import numpy as np

VBPE_FILE = "vbpe.json"


FORMAT = "beingvl-vbpe"


FORMAT_VERSION = 1


class Vocabulary(Protocol):
    """What the file says of a vocabulary: `VisualBPE`, or the published one."""

    kind: str
    num_codes: int
    merges: np.ndarray
    lineage: dict[str, str]
    parameters: dict[str, Any]
    grid: tuple[int, int] | None

    @property
    def num_merges(self) -> int: ...

    def fingerprint(self) -> str: ...


def write_vbpe_json(vbpe: Vocabulary) -> str:
    """The text of `vbpe.json`, with one merge per line."""
    head = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "kind": vbpe.kind,
        "num_codes": vbpe.num_codes,
        "num_merges": vbpe.num_merges,
        "fingerprint": vbpe.fingerprint(),
        "grid": list(vbpe.grid) if vbpe.grid else None,
        "lineage": vbpe.lineage,
        "parameters": vbpe.parameters,
    }
    lines = [f"  {json.dumps(key)}: {json.dumps(value)}," for key, value in head.items()]
    merges = ",\n".join(f"    {json.dumps(merge)}" for merge in vbpe.merges.tolist())
    return (
        "\n".join(["{", *lines, '  "merges": [', *([merges] if merges else []), "  ]", "}"]) + "\n"
    )
