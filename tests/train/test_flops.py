import pytest
import torch

from beingvl.model.param_groups import Rule, plan_parameters
from beingvl.train.flops import peak_flops, step_flops

SHAPES = {
    "model.embed_tokens.text_rows": (100, 8),
    "model.embed_tokens.visual_rows": (20, 8),
    "model.layers.0.mlp.weight": (8, 8),
    "model.layers.0.input_layernorm.weight": (8,),
    "model.layers.1.mlp.weight": (8, 8),
    "model.norm.weight": (8,),
    "lm_head.text_rows": (100, 8),
    "lm_head.visual_rows": (20, 8),
}
TOKENS, PAIRS, TARGETS, WIDTH = 10, 50, 3, 8


def flops(*rules: Rule) -> float:
    return step_flops(plan_parameters(SHAPES, rules), WIDTH, TOKENS, PAIRS, TARGETS)


def test_everything_trained_is_three_times_the_forward_pass() -> None:
    forward = 2 * 2 * 64 * TOKENS + 2 * 2 * WIDTH * PAIRS + 2 * 120 * 8 * TARGETS
    assert flops(Rule(".*")) == 3 * forward


def test_frozen_weights_above_trained_rows_cost_the_gradient_of_their_input_only() -> None:
    layers, attention = 2 * 2 * 64 * TOKENS, 2 * 2 * WIDTH * PAIRS
    head_frozen, head_trained = 2 * 100 * 8 * TARGETS, 2 * 20 * 8 * TARGETS
    found = flops(Rule("visual_rows"), Rule(".*", train=False))
    assert found == 2 * layers + 3 * attention + 2 * head_frozen + 3 * head_trained


def test_below_everything_trained_only_forward_is_counted() -> None:
    layer, attention = 2 * 64 * TOKENS, 2 * WIDTH * PAIRS
    head = 2 * 120 * 8 * TARGETS
    found = flops(Rule("layers[1:]"), Rule(".*", train=False))
    assert found == layer + attention + 3 * layer + 3 * attention + 2 * head


def test_a_cpu_has_no_peak_and_so_no_mfu() -> None:
    assert peak_flops(torch.device("cpu")) is None


def test_the_whole_head_counts_for_targets_only() -> None:
    more = step_flops(plan_parameters(SHAPES, [Rule(".*")]), WIDTH, TOKENS, PAIRS, TARGETS + 1)
    assert more - flops(Rule(".*")) == pytest.approx(3 * 2 * 120 * 8)
