"""A schema for JSON files, nested like the file: names, and the allowed values for each.

    {"optimizer": {"type": one_of("Adam", "AdamW"), "params": {"lr": number(), "fused": SWITCH}},
     "rules": [{"match": TEXT}]}

`check` finds the first value that is not allowed and reports it in one sentence; for an unknown
name it asks "did you mean". A dataclass with fields made by `key` is a schema, too (`schema_of`):
each field states its allowed values, its meaning, and whether it changes a result.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from beingvl.errors import InputError


@dataclass(frozen=True)
class Allowed:
    """Values for which `holds` is true; `expected` describes them in words."""

    expected: str
    holds: Callable[[Any], bool]


# A list with one schema means a list of any number of such values.
Schema: TypeAlias = "Allowed | Sequence[Schema] | Mapping[str, Schema]"

SWITCH = Allowed("true or false", lambda value: isinstance(value, bool))
TEXT = Allowed(
    "a text without NUL characters", lambda value: isinstance(value, str) and "\0" not in value
)
OBJECT = Allowed("an object", lambda value: isinstance(value, Mapping))


def whole(fewest: int = 0, most: int = 2**63 - 1) -> Allowed:
    above = f"at most {most}" if most < 2**63 - 1 else "below 2**63"
    return Allowed(
        f"a whole number, at least {fewest} and {above}",
        lambda value: type(value) is int and fewest <= value <= most,
    )


def count(fewest: int = 0) -> Allowed:
    """A whole number that may be written as 5e8."""
    return Allowed(
        f"a whole number of at least {fewest}, below 2**63",
        lambda value: (
            type(value) in (int, float) and fewest <= value < 2**63 and value == int(value)
        ),
    )


def number(fewest: float = 0, most: float = 2**63) -> Allowed:
    return Allowed(
        f"a number from {fewest:g} to {most:g}",
        lambda value: type(value) in (int, float) and fewest <= value <= most,
    )


POSITIVE = Allowed(
    "a number above 0 and below 2**63",
    lambda value: type(value) in (int, float) and 0 < value < 2**63,
)


def one_of(*choices: object) -> Allowed:
    listed = ", ".join(map(json.dumps, choices))
    # in Python 1 equals True and 1.0; in JSON they are different
    return Allowed(
        f"one of {listed}",
        lambda value: any(type(value) is type(choice) and value == choice for choice in choices),
    )


def only(choice: object, reason: str) -> Allowed:
    return Allowed(f"{json.dumps(choice)}: {reason}", one_of(choice).holds)


def maybe(allowed: Allowed) -> Allowed:
    return Allowed(
        f"{allowed.expected}, or null", lambda value: value is None or allowed.holds(value)
    )


def key(
    allowed: Schema, help: str, default: Any = dataclasses.MISSING, *, changes_result: bool = True
) -> Any:
    """A field of a dataclass that describes a JSON object; without a default it is required.

    changes_result: whether the value can change a sample or an update.
    """
    metadata = {"allowed": allowed, "help": help, "changes_result": changes_result}
    return dataclasses.field(default=default, metadata=metadata)


def schema_of(block: type) -> dict[str, Schema]:
    return {field.name: field.metadata["allowed"] for field in dataclasses.fields(block)}


def required_keys(block: type) -> list[str]:
    fields = dataclasses.fields(block)
    return [field.name for field in fields if field.default is dataclasses.MISSING]


def check(value: Any, schema: Schema, source: str, name: str = "") -> None:
    """Raises InputError for the first value that is not allowed, with `source` and its path."""
    found = f"{source}: {name or 'the file'} is {repr(value)[:200]}"
    if isinstance(schema, Allowed):
        if not schema.holds(value):
            raise InputError(f"{found}, expected {schema.expected}")
    elif isinstance(schema, Mapping):
        if not isinstance(value, Mapping):
            raise InputError(f"{found}, expected an object")
        for word, inside in value.items():
            inner = f"{name}.{word}" if name else word
            if word not in schema:
                hint = _hint(word, schema, inner.removesuffix(word))
                raise InputError(f"{source}: unknown key {inner}; {hint}")
            check(inside, schema[word], source, inner)
    else:
        if not isinstance(value, list):
            raise InputError(f"{found}, expected a list")
        for at, inside in enumerate(value):
            check(inside, schema[0], source, f"{name}[{at}]")


def _hint(word: str, schema: Mapping[str, Any], place: str) -> str:
    """A guess for an unknown key: a similar name, or the same name one level deeper."""
    near = difflib.get_close_matches(word, schema, n=1)
    near += [
        f"{outer}.{word}"
        for outer, inside in schema.items()
        if isinstance(inside, Mapping) and word in inside
    ]
    return f"did you mean {place}{near[0]}?" if near else f"known are {', '.join(sorted(schema))}"


def check_present(
    fields: Mapping[str, Any], paths: Sequence[str], source: str, why: str = ""
) -> None:
    """Raises InputError for the first of `paths` (`a.b.c`) that is missing."""
    for path in paths:
        inside: Any = fields
        for word in path.split("."):
            if not isinstance(inside, Mapping) or word not in inside:
                raise InputError(f"{source}: {path!r} is missing{why}")
            inside = inside[word]
