"""What rows, shards and models are made with, besides their vocabulary: the chat template
(conversation.py) and the position ids of image tokens (positions.py).

Their manifests record these facts in `details`; within a stage each has one value. A manifest older
than a fact does not have it, which means the first choice.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from beingvl.artefact.manifest import Manifest
from beingvl.errors import InputError


@dataclass(frozen=True)
class Fact:
    """`name` is its key in a manifest's details, `words` its name in messages. The first of
    `choices` holds for manifests older than the fact.
    """

    name: str
    words: str
    choices: tuple[str, ...]

    def of(self, manifest: Manifest) -> str | None:
        """The value for shards or a model; None for a base model, which no rows have trained."""
        is_base = manifest.kind == "model" and "identity" not in manifest.details
        return manifest.details.get(self.name, None if is_base else self.choices[0])

    def check(self, value: Any) -> str:
        if value not in self.choices:
            expected = f"expected one of {list(self.choices)}"
            raise InputError(f"{self.words} {value!r} is unknown, {expected}")
        return str(value)

    def join(self, values: Mapping[str, str | None], otherwise: str | None = None) -> str:
        """The common value of several inputs (name -> value), `otherwise` if none has one. Raises
        InputError naming two inputs that differ.
        """
        known = [(name, value) for name, value in values.items() if value]
        for name, value in known:
            if value != known[0][1]:
                raise InputError(
                    f"{known[0][0]} has the {self.words} {known[0][1]!r}, {name} has {value!r}; a "
                    f"stage has one {self.words}: tokenize the rows again with --{self.name}, or "
                    "train on each separately"
                )
        return known[0][1] if known else otherwise or self.choices[0]

    def in_request(self, value: str) -> dict[str, str]:
        """Its entry in requests and identities: none for the first choice, as in older ones."""
        return {} if value == self.choices[0] else {self.name: value}


DEFAULT, PUBLISHED = "default", "being-vl-0.5"
RUNNING, ANCHOR = "running", "anchor"
TEMPLATE = Fact("template", "template", (DEFAULT, PUBLISHED))
IMAGE_POSITIONS = Fact("image_positions", "kind of image positions", (RUNNING, ANCHOR))
FACTS = (TEMPLATE, IMAGE_POSITIONS)

# Tokens of the longest sample before its images were merged: the positions that anchors need.
UNMERGED = "longest_unmerged_sample"
