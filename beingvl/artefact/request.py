"""What a piece of work was asked for: its options and the hashes of its inputs.

Equal requests make equal bytes. So a request is kept wherever the same question comes up later:
in manifests ("is this folder what I was asked for?"), beside unfinished parts, in checkpoints
("is this the run that I resume?"), and between ranks ("were we given the same?").
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import zip_longest
from typing import Any

from beingvl.artefact.hashes import PREFIX


class Request(dict[str, Any]):
    """Names and values that JSON can hold."""

    def difference(self, found: Mapping[str, Any]) -> str | None:
        """What differs first in `found`, as "different seed (found 1, asked for 2)"; else None."""
        return next(iter(self.differences(found)), None)

    def differences(self, found: Mapping[str, Any]) -> list[str]:
        """All that differs, each as above."""
        asked = json.loads(json.dumps(self))  # as it reads back from a file: tuples are lists
        return [
            f"different {name} ({_how(found.get(name), asked.get(name))})"
            for name in {**found, **asked}
            if found.get(name) != asked.get(name)
        ]


def _how(found: Any, asked: Any) -> str:
    if all(isinstance(value, str) and value.startswith(PREFIX) for value in (found, asked)):
        return "its content differs"
    if isinstance(found, list) and isinstance(asked, list):
        pairs = zip_longest(found, asked)
        found, asked = next(pair for pair in pairs if pair[0] != pair[1])
    return f"found {found!r}, asked for {asked!r}"
