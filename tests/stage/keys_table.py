"""The table of keys in docs/how-to/training.md, made from the fields of the block "beingvl".

python -m tests.stage.keys_table      writes it there anew
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from beingvl.stage.json_schema import Allowed
from beingvl.stage.stage_config import BeingVLBlock

PAGE = Path(__file__).parents[2] / "docs/how-to/training.md"
HEAD = (
    "| key of `beingvl` | value | default | a resumed run may change it | meaning |",
    "|---|---|---|---|---|",
)


def table() -> str:
    lines = list(HEAD)
    for field in dataclasses.fields(BeingVLBlock):
        allowed, default = field.metadata["allowed"], ""
        if field.default is not dataclasses.MISSING:
            default = f"`{json.dumps(field.default)}`"
        value = allowed.expected if isinstance(allowed, Allowed) else "a list of rules"
        for unlimited in (" and below 2**63", " to 9.22337e+18"):
            value = value.replace(unlimited, "")
        may_change = "" if field.metadata["changes_result"] else "yes"
        cells = (f"`{field.name}`", value, default, may_change, field.metadata["help"])
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def in_docs() -> str:
    """The table as it stands in the page."""
    text = PAGE.read_text()
    return text[text.index(HEAD[0]) :].split("\n\n")[0] + "\n"


if __name__ == "__main__":
    PAGE.write_text(PAGE.read_text().replace(in_docs(), table()))
