"""Whole training runs under DeepSpeed ZeRO-3 in bf16 on one device: what is frozen and what is
resumed is bit-identical.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch

from beingvl.model.weight_files import WeightFolder
from beingvl.train.metrics import read_metrics
from tests.launcher import log_of, run
from tests.tiny import LAYOUT, stage_fields, write_model, write_shards

ROWS_AND_LAYERS = [
    {"match": "visual_rows"},
    {"match": "layers[:25%]"},
    {"match": ".*", "train": False},
]
NUM_STEPS = 6


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """Heads of 32, which the kernels of a GPU take."""
    folder = tmp_path_factory.mktemp("gpu")
    write_model(folder / "base", hidden_size=128)
    write_shards(folder / "shards")
    fields = stage_fields(
        max_steps=NUM_STEPS, epochs=6, trainable=ROWS_AND_LAYERS, deterministic=True, keep_last=5
    )
    (folder / "stage.json").write_text(json.dumps({**fields, "bf16": {"enabled": True}}))
    return folder


@pytest.fixture(scope="module")
def whole_run(work: Path, device: torch.device) -> Path:
    return train(work, work / "whole", device)


def train(work: Path, output: Path, device: torch.device) -> Path:
    code = run(1, work / "stage.json", work / "base", work / "shards", output, device=device.type)
    assert code == 0, log_of(output)[-4000:]
    return output


def test_frozen_parameters_keep_their_bits_and_trained_ones_move(work, whole_run) -> None:
    """The run itself compared the frozen weights on the device with those of its start before
    each save.
    """
    rows = slice(LAYOUT.num_text, None)
    start = dict(WeightFolder(work / "base"))
    for name, tensor in WeightFolder(whole_run / "final").items():
        if name in ("model.embed_tokens.weight", "lm_head.weight"):
            assert torch.equal(tensor[: LAYOUT.num_text], start[name][: LAYOUT.num_text])
            assert not torch.equal(tensor[rows], start[name][rows])
        else:  # weight decay is 0.1: a frozen layer that is in the optimizer moves
            assert torch.equal(tensor, start[name]) != name.startswith("model.layers.0."), name
    losses = [row["loss"] for row in read_metrics(whole_run)]
    assert len(losses) == NUM_STEPS and losses[-1] < losses[0]


def test_a_resumed_run_ends_with_the_same_bits(work, whole_run, device) -> None:
    resumed = work / "resumed"
    (half,) = (whole_run / "checkpoints").glob("step-*3")
    shutil.copytree(half, resumed / "checkpoints" / half.name)
    train(work, resumed, device)
    assert "resumed from" in log_of(resumed)
    found, expected = (
        [(row["loss"], row["gradient_norm"]) for row in read_metrics(of)]
        for of in (resumed, whole_run)
    )
    assert found == expected[NUM_STEPS // 2 :]
    whole = dict(WeightFolder(whole_run / "final"))
    assert all(
        torch.equal(tensor, whole[name]) for name, tensor in WeightFolder(resumed / "final").items()
    )


def test_memory_is_reported_beside_its_prediction(whole_run, cuda) -> None:
    assert "of the whole process" not in log_of(whole_run), (
        "the peak is the device's, not the process's"
    )
    peaks = [row["peak_memory_bytes"] for row in read_metrics(whole_run)]
    assert 0 < peaks[-1] < torch.cuda.get_device_properties(cuda).total_memory
