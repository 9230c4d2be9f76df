import pytest

from beingvl.errors import InputError
from beingvl.model.param_groups import Lora, Rule, format_plan, plan_parameters

SHAPES = {
    "model.embed_tokens.text_rows": (10, 4),
    "model.embed_tokens.visual_rows": (5, 4),
    **{
        f"model.layers.{n}.{part}": (4, 4)
        for n in range(8)
        for part in ("mlp.weight", "input_layernorm.weight")
    },
    "model.norm.weight": (4,),
    "lm_head.text_rows": (10, 4),
    "lm_head.visual_rows": (5, 4),
}
REST = Rule(".*", train=False)


def trained(*rules: Rule) -> list[str]:
    return [
        planned.name for planned in plan_parameters(SHAPES, [*rules, REST]) if planned.is_trained
    ]


def test_the_three_stages() -> None:
    rows = ["model.embed_tokens.visual_rows", "lm_head.visual_rows"]
    assert trained(Rule("visual_rows")) == rows
    second = trained(Rule("visual_rows"), Rule("layers[:25%]"))
    assert sorted(second) == sorted(
        rows + [name for name in SHAPES if ".layers.0." in name or ".layers.1." in name]
    )
    assert len(plan_parameters(SHAPES, [Rule(".*")])) == len(SHAPES)


@pytest.mark.parametrize(
    ("match", "layers"),
    [
        ("layers[:2]", [0, 1]),
        ("layers[6:]", [6, 7]),
        ("layers[3:5]", [3, 4]),
        ("layers[50%:75%]", [4, 5]),
    ],
)
def test_layer_ranges(match: str, layers: list[int]) -> None:
    assert trained(Rule(match)) == [
        name for n in layers for name in SHAPES if f".layers.{n}." in name
    ]


def test_norm_is_the_final_norm_only_and_the_first_rule_decides() -> None:
    assert trained(Rule("norm")) == ["model.norm.weight"]
    assert trained(Rule("model.layers.0.*", train=False), Rule("layers[:2]")) == [
        n for n in SHAPES if ".layers.1." in n
    ]


def test_mistakes_are_errors() -> None:
    with pytest.raises(
        InputError,
        match=r"no rule of beingvl.trainable matches the parameter 'model.embed_tokens.text_rows'",
    ):
        plan_parameters(SHAPES, [Rule("visual_rows")])
    with pytest.raises(
        InputError, match=r"'visual_row' of beingvl\.trainable applies to no parameter"
    ):
        plan_parameters(SHAPES, [Rule("visual_row"), REST])
    with pytest.raises(InputError, match="no parameter at all"):
        plan_parameters(SHAPES, [REST])
    with pytest.raises(InputError, match="neither a group nor a regular expression"):
        plan_parameters(SHAPES, [Rule("(")])


ADAPTERS = Lora(rank=2, alpha=4)


def test_adapters_are_planned_beside_what_stays_frozen() -> None:
    names = ["model.layers.0.mlp.lora_A.weight", "model.layers.0.mlp.lora_B.weight"]
    shapes = {**SHAPES, "model.layers.0.input_layernorm.weight": (4,)}
    for match in ("layers[:1]", r"layers\.0\.mlp", r"mod.*\.0\.mlp.weight"):
        rules = [Rule(match, lora=ADAPTERS), REST]
        plan = plan_parameters(shapes, rules)
        assert [planned.name for planned in plan if planned.is_trained] == names
        assert [planned.shape for planned in plan if planned.is_trained] == [(2, 4), (4, 2)]
        assert "rank 2   2        16" in format_plan(plan, rules)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([Rule(".*", lora=ADAPTERS)], "'model.embed_tokens.text_rows', which is not the weight of"),
        (
            [Rule(".*_rows"), Rule("layers.*", lora=ADAPTERS), REST],
            "input_layernorm.weight', which is not the weight of a linear layer",
        ),
        (
            [Rule("layers[:25%]"), Rule("layers.*mlp", lora=ADAPTERS), REST],
            r"'layers\[:25%\]' of beingvl.trainable trains 'model.layers.0.mlp.weight' as a whole",
        ),
    ],
)
def test_where_adapters_cannot_be(rules: list[Rule], message: str) -> None:
    shapes = {n: (4,) if "norm" in n else shape for n, shape in SHAPES.items()}
    with pytest.raises(InputError, match=message):
        plan_parameters(shapes, rules)


def test_plan_table() -> None:
    rules = [Rule("visual_rows", lr_multiplier=2.0, weight_decay=0.1), REST]
    table = format_plan(plan_parameters(SHAPES, rules), rules)
    assert "visual_rows  yes      2        40          2     0.1" in table
    assert "40 of 380 parameters are trained (10.5%)" in table
