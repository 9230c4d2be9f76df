"""What a piece of work was asked to make: its options and the hashes of its inputs.

Equal requests make equal bytes. So requests are stored wherever we compare later: in manifests ("is
this folder what I was asked for?"), beside unfinished parts, in checkpoints ("is this the run that
I resume?"), and across ranks ("did we all get the same?").
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import zip_longest
from typing import Any

from beingvl.artefact.hashes import PREFIX


class Request(dict[str, Any]):
    """Names and JSON values."""

    def difference(self, found: Mapping[str, Any]) -> str | None:
        """The first difference, as in "different seed (found 1, asked for 2)"; None if equal."""
        return next(iter(self.differences(found)), None)

    def differences(self, found: Mapping[str, Any]) -> list[str]:
        """All differences, each as above."""
        asked = json.loads(json.dumps(self))  # as it reads back from a file: tuples become lists
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
