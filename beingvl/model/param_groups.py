"""The freezer: ordered rules say which parameters a stage trains, and how.

    "trainable": [
        {"match": "visual_rows"},                                   new rows of embedding and head
        {"match": "layers[:25%]", "lr_multiplier": 0.5},            the first quarter of the layers
        {"match": "layers[25%:]", "lora": {"rank": 64, "alpha": 128}},      adapters in the others
        {"match": ".*", "train": false}                             everything else is frozen
    ]

The first rule that matches a parameter applies. Every parameter must match a rule and every rule
must apply to something, so neither a forgotten parameter nor a misspelt rule goes unnoticed. A rule
names a group (`visual_rows`, `text_rows`, `layers[k:l]` with numbers or percentages, `norm`) or is
a regular expression that matches the full parameter name.

A rule with `lora` freezes its parameters and trains two adapters beside each (model/adapters.py).
It names linear layers: a regular expression matches their names from any dot on, without `.weight`,
and `layers[k:l]` means the matrices of those layers.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from beingvl.errors import InputError
from beingvl.stage.stage_config import Lora, Rule

_LAYERS = re.compile(r"layers\[(\d*%?):(\d*%?)\]")
_LAYER_NUMBER = re.compile(r"\.layers\.(\d+)\.")
A, B = ".lora_A.weight", ".lora_B.weight"


@dataclass(frozen=True)
class PlannedParameter:
    """What happens to one parameter in this stage."""

    name: str
    shape: tuple[int, ...]
    num_elements: int
    rule: Rule

    @property
    def is_trained(self) -> bool:
        return is_adapter(self.name) if self.rule.lora else self.rule.train

    @property
    def is_in_nf4(self) -> bool:
        """Whether it is frozen in 4 bits, with adapters beside it."""
        return bool(self.rule.lora and self.rule.lora.base) and not is_adapter(self.name)


def is_adapter(name: str) -> bool:
    return name.endswith((A, B))


def whole_shape(parameter: Any) -> tuple[int, ...]:
    """A parameter's full shape; if ZeRO-3 has partitioned it, its own shape is 0."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def plan_parameters(
    shapes: Mapping[str, tuple[int, ...]], rules: Sequence[Rule]
) -> list[PlannedParameter]:
    """Assign to each parameter (name -> full shape) the first rule that matches it; adapters follow
    their weight.

    Raises InputError if a parameter matches no rule, a rule applies to nothing, nothing is trained,
    or a rule puts adapters where they cannot be.
    """
    plan = []
    for name, shape, rule in _decide(shapes, rules):
        if rule is None:
            raise InputError(
                f"no rule of beingvl.trainable matches the parameter {name!r}; end the rules with "
                '{"match": ".*", "train": false}'
            )
        plan.append(PlannedParameter(name, tuple(shape), math.prod(shape), rule))
        if rule.lora:
            plan += _adapters(name, shape, rule)
    for rule in rules:
        if not any(planned.rule is rule for planned in plan):
            raise InputError(
                f"the rule {rule.match!r} of beingvl.trainable applies to no parameter of this "
                f"model, which has {_num_layers(shapes)} layers; correct or remove it"
            )
    if not any(planned.is_trained for planned in plan):
        raise InputError("the rules of beingvl.trainable train no parameter at all")
    return plan


def adapters_by_weight(
    shapes: Mapping[str, tuple[int, ...]], rules: Sequence[Rule]
) -> dict[str, Lora]:
    """Weight name -> the adapters beside it."""
    return {name: rule.lora for name, _, rule in _decide(shapes, rules) if rule and rule.lora}


Decision = tuple[str, tuple[int, ...], Rule | None]


def _decide(shapes: Mapping[str, tuple[int, ...]], rules: Sequence[Rule]) -> Iterator[Decision]:
    """(name, shape, first matching rule) for each parameter."""
    matchers = [(_matcher(rule, _num_layers(shapes)), rule) for rule in rules]
    for name, shape in shapes.items():
        matching = [rule for matches, rule in matchers if matches(name, shape)]
        first = matching[0] if matching else None
        adapted = [rule for rule in matching if rule.lora]
        if adapted and first and first.train and not first.lora:
            raise InputError(
                f"the rule {first.match!r} of beingvl.trainable trains {name!r} as a whole, and "
                f"{adapted[0].match!r} puts adapters on it; let only one of them match it"
            )
        yield name, shape, first


def _adapters(name: str, shape: Sequence[int], rule: Rule) -> list[PlannedParameter]:
    assert rule.lora
    if len(shape) != 2 or not name.endswith(".weight"):
        raise InputError(
            f"the rule {rule.match!r} of beingvl.trainable puts adapters on {name!r}, which is not "
            'the weight of a linear layer; "layers[:]" names all linear layers'
        )
    stem, rank = name.removesuffix(".weight"), rule.lora.rank
    return [
        PlannedParameter(stem + A, (rank, shape[1]), rank * shape[1], rule),
        PlannedParameter(stem + B, (shape[0], rank), rank * shape[0], rule),
    ]


def _num_layers(names: Iterable[str]) -> int:
    numbers = (int(found[1]) for name in names if (found := _LAYER_NUMBER.search(name)))
    return max(numbers, default=-1) + 1


def _matcher(rule: Rule, num_layers: int) -> Callable[[str, Sequence[int]], bool]:
    text = rule.match
    if text in ("visual_rows", "text_rows"):
        return lambda name, shape: name.endswith(f".{text}")
    if text == "norm":
        return lambda name, shape: name.endswith("norm.weight") and not _LAYER_NUMBER.search(name)
    layers = _LAYERS.fullmatch(text)
    if layers:
        wanted = range(_bound(layers[1], num_layers, 0), _bound(layers[2], num_layers, num_layers))
        return lambda name, shape: (
            (not rule.lora or len(shape) == 2)
            and any(int(number) in wanted for number in _LAYER_NUMBER.findall(name))
        )
    try:
        pattern = re.compile(rf"(?:.*\.)?(?:{text})(?:\.weight)?" if rule.lora else text)
    except re.error as error:
        raise InputError(
            f"beingvl.trainable: {text!r} is neither a group nor a regular expression ({error})"
        ) from error
    return lambda name, shape: pattern.fullmatch(name) is not None


def _bound(text: str, num_layers: int, default: int) -> int:
    if not text:
        return default
    return round(num_layers * int(text[:-1]) / 100) if text.endswith("%") else int(text)


def format_plan(plan: Sequence[PlannedParameter], rules: Sequence[Rule]) -> str:
    """The plan as a table, one line per rule."""
    rows = [("rule", "trained", "tensors", "parameters", "lr x", "decay", "for example")]
    for rule in rules:
        members = [
            planned
            for planned in plan
            if planned.rule is rule and (not rule.lora or planned.is_trained)
        ]
        count = sum(planned.num_elements for planned in members)
        decay = "optimizer's" if rule.weight_decay is None else f"{rule.weight_decay:g}"
        how = (f"{rule.lr_multiplier:g}", decay) if rule.train else ("-", "-")
        trained = "yes" if rule.train else "frozen"
        trained = f"rank {rule.lora.rank}" if rule.lora else trained
        sizes = (str(len(members)), f"{count:,}")
        rows.append((rule.match, trained, *sizes, *how, members[0].name))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    num_trained = sum(planned.num_elements for planned in plan if planned.is_trained)
    total = sum(planned.num_elements for planned in plan)
    share = f"{num_trained:,} of {total:,} parameters are trained ({num_trained / total:.1%})"
    return "\n".join([*lines, share])
