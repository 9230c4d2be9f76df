import pytest
import torch
from transformers import AutoModelForCausalLM

from beingvl.data.arrow_shards import ShardReader
from beingvl.train.probe import (
    MAX_POSITIONS,
    Probe,
    compare_logits,
    compare_probe,
    load_probe,
    save_probe,
)
from tests.tiny import write_model, write_shards


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A folder with the probe that a random model would have stored."""
    folder = tmp_path_factory.mktemp("probe")
    model = AutoModelForCausalLM.from_pretrained(write_model(folder / "model"))
    probe = Probe.of_shards(ShardReader(write_shards(folder / "shards")))
    with torch.no_grad():
        logits = model(input_ids=probe.input_ids[None], use_cache=False).logits[0, probe.positions]
    save_probe(folder, probe, logits)
    return folder


def test_a_probe_is_the_first_sample_at_a_few_positions(checkpoint) -> None:
    probe, logits = load_probe(checkpoint)
    assert probe.input_ids.tolist() == ShardReader(checkpoint / "shards")[0].input_ids.tolist()
    assert probe.positions[0] == 0 and probe.positions[-1] == len(probe.input_ids) - 1
    assert len(probe.positions) <= MAX_POSITIONS and logits.shape[0] == len(probe.positions)


def test_the_same_model_gives_the_same_answer(checkpoint) -> None:
    comparison = compare_probe(checkpoint, checkpoint / "model", torch.float32)
    assert comparison.matches and comparison.kl_nats < 1e-9, comparison.describe()


@pytest.mark.parametrize(
    "tensor", ["model.layers.2.mlp.down_proj.weight", "lm_head.weight", "model.norm.weight"]
)
def test_one_wrong_tensor_shows(checkpoint, tmp_path, tensor: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoint / "model")
    with torch.no_grad():
        model.get_parameter(tensor).mul_(1.1)
    model.save_pretrained(tmp_path)
    comparison = compare_probe(checkpoint, tmp_path, torch.float32)
    assert not comparison.matches and "NOT the model" in comparison.describe()


def test_logits_that_are_not_numbers_never_match() -> None:
    stored = torch.zeros(2, 4)
    assert not compare_logits(stored, stored + float("nan"), torch.bfloat16).matches
