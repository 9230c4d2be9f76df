"""The freezer: ordered rules say which parameters a stage trains, and how.

    "trainable": [
        {"match": "visual_rows"},                                   new rows of embedding and head
        {"match": "layers[:25%]", "lr_multiplier": 0.5},            the first quarter of the layers
        {"match": ".*", "train": false}                             everything else stays
    ]

The first rule that matches a parameter decides; every parameter must be matched and every rule must
match something, so neither a forgotten parameter nor a misspelt rule goes unnoticed. Rules name a
group (`visual_rows`, `text_rows`, `layers[k:l]` with numbers or percentages, `norm`) or are a
regular expression over the full parameter name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from beingvl.errors import InputError
from beingvl.stage.stage_config import Rule

_LAYERS = re.compile(r"layers\[(\d*%?):(\d*%?)\]")
_LAYER_NUMBER = re.compile(r"\.layers\.(\d+)\.")


@dataclass(frozen=True)
class PlannedParameter:
    """What happens to one parameter in this stage."""

    name: str
    shape: tuple[int, ...]
    num_elements: int
    rule: Rule


def plan_parameters(
    shapes: Mapping[str, tuple[int, ...]], rules: Sequence[Rule]
) -> list[PlannedParameter]:
    """Assign every parameter (name -> full shape) the first rule that matches it.

    Raises InputError when a parameter matches no rule, a rule decides nothing, or nothing is
    trained.
    """
    layer_numbers = [int(found[1]) for name in shapes if (found := _LAYER_NUMBER.search(name))]
    num_layers = max(layer_numbers, default=-1) + 1
    matchers = [(_matcher(rule.match, num_layers), rule) for rule in rules]
    plan = []
    for name, shape in shapes.items():
        rule = next((rule for matches, rule in matchers if matches(name)), None)
        if rule is None:
            raise InputError(
                f"no rule of beingvl.trainable matches the parameter {name!r}; end the rules with "
                '{"match": ".*", "train": false}'
            )
        plan.append(PlannedParameter(name, tuple(shape), math.prod(shape), rule))
    for rule in rules:
        if not any(planned.rule is rule for planned in plan):
            raise InputError(
                f"the rule {rule.match!r} of beingvl.trainable decides no parameter; correct "
                "or remove it"
            )
    if not any(planned.rule.train for planned in plan):
        raise InputError("the rules of beingvl.trainable train no parameter at all")
    return plan


def _matcher(text: str, num_layers: int) -> Callable[[str], bool]:
    if text in ("visual_rows", "text_rows"):
        return lambda name: name.endswith(f".{text}")
    if text == "norm":
        return lambda name: name.endswith("norm.weight") and not _LAYER_NUMBER.search(name)
    layers = _LAYERS.fullmatch(text)
    if layers:
        wanted = range(_bound(layers[1], num_layers, 0), _bound(layers[2], num_layers, num_layers))
        return lambda name: any(int(number) in wanted for number in _LAYER_NUMBER.findall(name))
    try:
        pattern = re.compile(text)
    except re.error as error:
        raise InputError(
            f"beingvl.trainable: {text!r} is neither a group nor a regular expression ({error})"
        ) from error
    return lambda name: pattern.fullmatch(name) is not None


def _bound(text: str, num_layers: int, default: int) -> int:
    if not text:
        return default
    return round(num_layers * int(text[:-1]) / 100) if text.endswith("%") else int(text)


def format_plan(plan: Sequence[PlannedParameter], rules: Sequence[Rule]) -> str:
    """The plan as a table, one line per rule."""
    rows = [("rule", "trained", "tensors", "parameters", "lr x", "decay", "for example")]
    for rule in rules:
        members = [planned for planned in plan if planned.rule is rule]
        count = sum(planned.num_elements for planned in members)
        decay = "optimizer's" if rule.weight_decay is None else f"{rule.weight_decay:g}"
        how = (f"{rule.lr_multiplier:g}", decay) if rule.train else ("-", "-")
        trained = "yes" if rule.train else "frozen"
        sizes = (str(len(members)), f"{count:,}")
        rows.append((rule.match, trained, *sizes, *how, members[0].name))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    num_trained = sum(planned.num_elements for planned in plan if planned.rule.train)
    total = sum(planned.num_elements for planned in plan)
    share = f"{num_trained:,} of {total:,} parameters are trained ({num_trained / total:.1%})"
    return "\n".join([*lines, share])
