"""The parts of the documentation that are made from the code.

python -m tests.docs.generate      writes them anew

reference/command-line.md    every command's text and options, from its parser
reference/stage-json.md      the table of keys, from the fields of the block "beingvl"
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
from pathlib import Path

from beingvl.commands.main import COMMANDS
from beingvl.commands.options import share
from beingvl.commands.parser import NO_DEFAULT, OTHER_NAMES, Input, Parser
from beingvl.commands.report import KINDS
from beingvl.stage.json_schema import Allowed
from beingvl.stage.stage_config import BeingVLBlock
from tests.docs.pages import REPOSITORY

COMMAND_LINE = REPOSITORY / "docs/reference/command-line.md"
STAGE_JSON = REPOSITORY / "docs/reference/stage-json.md"
KEYS_HEAD = (
    "| key of `beingvl` | value | default | a resumed run may change it | meaning |",
    "|---|---|---|---|---|",
)
TYPES = {Path: "path", int: "number", float: "number", share: "share"}

INTRODUCTION = """# Command line

Generated from the parsers: `python -m tests.docs.generate`.

`beingvl COMMAND --help`, or `beingvl help COMMAND`, prints the same; `beingvl -V` prints the
version. Options may be written with `_` or `-` and cannot be abbreviated. `--debug`, on every
command, shows the traceback of an error. [Exit codes](exit-codes.md).

Each thing has one option name; "…" after its value means one or more. Commands that have it also
accept the name in Being-VL-0.5 or DeepSpeed:
"""


def keys_table() -> str:
    lines = list(KEYS_HEAD)
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


def keys_in_page() -> str:
    text = STAGE_JSON.read_text()
    return text[text.index(KEYS_HEAD[0]) :].split("\n\n")[0] + "\n"


def command_line() -> str:
    sections = [INTRODUCTION]
    names = "".join(f"| `{other}` | `{name}` |\n" for other, name in OTHER_NAMES.items())
    sections.append(f"| also accepted | name |\n|---|---|\n{names}")
    for name in COMMANDS:
        if name == "report":
            for kind, (module, _) in KINDS.items():
                sections.append(_section(f"report {kind}", module))
        else:
            module = importlib.import_module(f"beingvl.commands.{name.replace('-', '_')}")
            sections.append(_section(name, module))
    return "\n".join(sections)


def _section(name: str, module: object) -> str:
    parser = Parser(prog=f"beingvl {name}", add_help=False)
    module.add_arguments(parser)  # type: ignore[attr-defined]
    rows = "".join(_row(one) for one in parser._actions if one.help != argparse.SUPPRESS)
    options = f"| option | value | default | meaning |\n|---|---|---|---|\n{rows}"
    return f"## beingvl {name}\n\n```text\n{(module.__doc__ or '').strip()}\n```\n\n{options}"


def _row(action: argparse.Action) -> str:
    name = f"`{', '.join(action.option_strings) or action.dest}`"
    if action.required and action.option_strings:
        name += " (required)"
    is_input = isinstance(action.type, Input)
    value = action.metavar or ("path" if is_input else TYPES.get(action.type, "text"))  # type: ignore[call-overload]
    if action.choices:
        value = ", ".join(f"`{choice}`" for choice in action.choices)
    elif action.nargs == 0:
        value = ""
    elif isinstance(value, tuple):
        value = " ".join(value)
    if action.nargs in ("+", "*"):
        value += " …"
    none = action.default == [] or any(action.default is none for none in NO_DEFAULT)
    default = "" if none else _plain(action.default)
    meaning = (action.help or "").replace("%%", "%").replace(" (default: %(default)s)", "")
    cells = (name, value, default, meaning)
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |\n"


def _plain(default: object) -> str:
    several = isinstance(default, (list, tuple))
    return ", ".join(f"`{one}`" for one in (default if several else [default]))


if __name__ == "__main__":
    COMMAND_LINE.write_text(command_line())
    STAGE_JSON.write_text(STAGE_JSON.read_text().replace(keys_in_page(), keys_table()))
