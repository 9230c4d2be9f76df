"""Every ZeRO stage, number of ranks, accumulation, packing and chunk size gives plain torch's
losses and weights.

A few configurations in CI, the whole grid marked slow.
"""

import itertools
import json
from pathlib import Path

import pytest
import torch

from beingvl.data.arrow_shards import ShardReader
from beingvl.model.weight_files import WeightFolder
from beingvl.stage.stage_config import load_stage_config
from beingvl.train.checkpoint import StateReader
from beingvl.train.checkpoint_folders import complete_checkpoints, step_of
from beingvl.train.metrics import read_metrics
from beingvl.train.partitions import MOMENTS
from tests.plain_torch import train_plain
from tests.tiny import (
    LAYOUT,
    stage_fields,
    write_image_shards,
    write_inputs,
    write_model,
    write_vbpe_inside,
)
from tests.train.run_stages import added_bytes, run_stages

ROWS_AND_LAYERS = [
    {"match": "visual_rows"},
    {"match": "layers[:2]"},
    {"match": ".*", "train": False},
]
OFFLOAD = [
    "zero_optimization.offload_optimizer.device=cpu",
    "zero_optimization.offload_param.device=cpu",
]
NUM_STEPS = 5


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    fields = stage_fields(max_steps=NUM_STEPS, epochs=6)
    # Adam turns the rounding of a gradient near 0 into an update of any sign, as large as the
    # learning rate: keep it small
    fields["optimizer"]["params"]["lr"] = 3e-4
    fields["train_batch_size"] = 12  # divides for 1, 2 and 3 ranks with any accumulation below
    return write_inputs(tmp_path_factory.mktemp("zero"), all=fields)


def settings(
    stage: int, num_ranks: int, accumulation: int, packing: bool = True, chunk: int = 1024
) -> list[str]:
    micro = 12 // num_ranks // accumulation
    return [
        f"zero_optimization.stage={stage}",
        f"train_micro_batch_size_per_gpu={micro}",
        f"beingvl.packing={json.dumps(packing)}",
        f"beingvl.loss_chunk_tokens={chunk}",
    ]


def job(work: Path, name: str, *more: str) -> dict:
    places = {
        "config": work / "all.json",
        "model": work / "base",
        "data": work / "shards",
        "output": work / name,
    }
    return {**places, "set": list(more)}


@pytest.fixture(scope="module")
def anchors(work) -> dict:
    """Merged images whose tokens stand at their anchors: what a job changes for them."""
    model = write_model(work / "base-vbpe")
    vbpe = write_vbpe_inside(model)
    shards = write_image_shards(work / "shards-anchor", vbpe, image_positions="anchor")
    positions = ShardReader(shards, model).positions(ShardReader(shards)[0].input_ids)
    assert (positions[1:] - positions[:-1]).max() > 1
    return {"model": model, "data": shards}


def assert_equals_plain_torch(
    work: Path, output: Path, packing: bool, other: dict | None = None
) -> None:
    """`other`: a model and shards of their own."""
    config = load_stage_config(work / "all.json", [f"beingvl.packing={json.dumps(packing)}"])
    inputs = other or {"model": work / "base", "data": work / "shards"}
    losses, weights = _plain(inputs["model"], inputs["data"], config, packing)
    assert [row["loss"] for row in read_metrics(output)] == pytest.approx(losses, rel=1e-5)
    for name, tensor in dict(WeightFolder(output / "final")).items():
        assert (tensor - weights[name]).norm() <= 1e-5 * weights[name].norm(), name


_PLAIN: dict = {}


def _plain(model: Path, data: Path, config, packing: bool):
    if (data, packing) not in _PLAIN:
        _PLAIN[data, packing] = train_plain(model, data, config)
    return _PLAIN[data, packing]


def test_every_stage_equals_plain_torch(work, anchors) -> None:
    """2 ranks, accumulation 2; stage 3 also with everything offloaded to the CPU; bf16 near it;
    rules with their own rates.
    """
    more = {f"stage-{stage}": (settings(stage, 2, 2), True) for stage in (1, 2)}
    more["offload-3"] = ([*settings(3, 2, 2), *OFFLOAD], True)
    more["offload-2"] = ([*settings(2, 2, 2), OFFLOAD[0]], True)
    more["unpacked"] = (settings(3, 2, 3, packing=False, chunk=7), False)
    jobs = [job(work, name, *words) for name, (words, _) in more.items()]
    for stage in (1, 2, 3):
        jobs.append(job(work, f"anchors-{stage}", *settings(stage, 2, 2)) | anchors)
    jobs += [
        job(work, f"bf16-{stage}", *settings(stage, 2, 2), "bf16.enabled=true")
        for stage in (1, 2, 3)
    ]
    jobs += [
        job(work, f"rates-{stage}", *settings(stage, 2, 2), *ONE_STEP_OF_RATES)
        for stage in (1, 2, 3)
    ]
    run_stages(2, jobs, work)
    for name, (_, packing) in more.items():
        assert_equals_plain_torch(work, work / name, packing)
    for stage in (1, 2, 3):
        assert_equals_plain_torch(work, work / f"anchors-{stage}", True, anchors)
    losses = [row["loss"] for row in read_metrics(work / "stage-2")]
    for stage in (1, 2, 3):
        assert [row["loss"] for row in read_metrics(work / f"bf16-{stage}")] == pytest.approx(
            losses, rel=1e-3
        )
    for stage in (1, 2, 3):
        assert_first_step_has_the_rules_rates(work, work / f"rates-{stage}")


RATES = {"visual_rows": (1.0, 0.0), "layers[:2]": (0.5, 0.4), "layers[2:]": (0.25, 0.1)}
ONE_STEP_OF_RATES = [
    "beingvl.max_steps=1",
    "optimizer.params.eps=1e-12",
    "beingvl.trainable="
    + json.dumps(
        [
            {"match": match, "lr_multiplier": multiplier, "weight_decay": decay}
            for match, (multiplier, decay) in RATES.items()
        ]
        + [{"match": ".*", "train": False}]
    ),
]


def assert_first_step_has_the_rules_rates(work: Path, output: Path) -> None:
    """Adam's first update is the learning rate in the gradient's direction, after the decay of
    the weight by rate x decay.
    """
    before, after = dict(WeightFolder(work / "base")), dict(WeightFolder(output / "final"))
    (row,) = read_metrics(output)
    for names, (multiplier, decay) in (
        (("layers.0.", "layers.1."), RATES["layers[:2]"]),
        (("layers.2.", "layers.3."), RATES["layers[2:]"]),
    ):
        rate = row["learning_rate"] * multiplier
        assert row[f"learning_rate/x{multiplier:g}"] == rate
        for name in [
            name
            for name in before
            if any(part in name for part in names) and "layernorm" not in name
        ]:
            moved = after[name].double() - before[name].double() * (1 - rate * decay)
            assert moved.abs().median().item() == pytest.approx(rate, rel=1e-2), name


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_the_grid(work, num_ranks: int) -> None:
    grid = list(itertools.product((1, 2, 3), (1, 2, 4), (True, False), (7, 1024)))
    names = {f"grid-{num_ranks}-{'-'.join(map(str, point))}": point for point in grid}
    jobs = []
    for name, (stage, accumulation, packing, chunk) in names.items():
        jobs.append(job(work, name, *settings(stage, num_ranks, accumulation, packing, chunk)))
    run_stages(num_ranks, jobs, work)
    for name, (_, _, packing, _) in names.items():
        assert_equals_plain_torch(work, work / name, packing)


def test_frozen_stays_frozen_in_every_stage_and_any_stage_resumes_any_other(work) -> None:
    """Weight decay is 0.1. One stage writes the checkpoint after step 3, another goes on, the
    third starts from nothing.
    """
    rows = [f"beingvl.trainable={json.dumps(ROWS_AND_LAYERS)}", "beingvl.checkpoint_every_steps=3"]
    straight = [job(work, f"frozen-{stage}", *settings(stage, 2, 1), *rows) for stage in (1, 2, 3)]
    run_stages(2, straight, work)
    start = dict(WeightFolder(work / "base"))
    expected = dict(WeightFolder(work / "frozen-3" / "final"))
    for stage in (1, 2):
        for name, tensor in dict(WeightFolder(work / f"frozen-{stage}" / "final")).items():
            assert (tensor - expected[name]).norm() <= 1e-5 * expected[name].norm(), name
            if "layers.2" in name or "layers.3" in name or name == "model.norm.weight":
                assert torch.equal(tensor, start[name]), name
            if "embed_tokens" in name or "lm_head" in name:
                assert torch.equal(tensor[: LAYOUT.num_text], start[name][: LAYOUT.num_text])
                assert not torch.equal(tensor[LAYOUT.num_text :], start[name][LAYOUT.num_text :])
    moments = moments_of(work / "frozen-3", num_ranks=2)
    # drop what came after step 3, and let other stages and another number of ranks go on from there
    resumed = []
    for stage, other in ((1, 2), (2, 3), (3, 1)):
        output = work / f"frozen-{stage}"
        (output / "final" / "manifest.json").unlink()
        (output / "checkpoints" / f"step-{NUM_STEPS:08d}" / "manifest.json").unlink()
        resumed.append(job(work, output.name, *settings(other, 3, 1), *rows))
    run_stages(3, resumed, work)
    for stage in (1, 2, 3):
        for name, tensor in dict(WeightFolder(work / f"frozen-{stage}" / "final")).items():
            assert (tensor - expected[name]).norm() <= 1e-5 * expected[name].norm(), name
        for name, tensor in moments_of(work / f"frozen-{stage}", num_ranks=3).items():
            assert (tensor - moments[name]).norm() <= 1e-3 * moments[name].norm(), (stage, name)


def moments_of(output: Path, num_ranks: int) -> dict[str, torch.Tensor]:
    """Both of every trained parameter, whole, from the last checkpoint, which must be of that
    many ranks.
    """
    with StateReader(complete_checkpoints(output)[-1]) as reader:
        assert (
            reader.state.num_ranks == num_ranks
            and step_of(complete_checkpoints(output)[-1]) == NUM_STEPS
        )
        sizes = {
            name: torch.Size(entry["shape"]).numel()
            for name, entry in reader.state.parameters.items()
        }
        return {
            f"{name}.{key}": reader.fetch(name, key, 0, sizes[name])
            for name in sizes
            for key in MOMENTS
        }


@pytest.mark.slow
def test_a_resumed_run_has_the_same_bytes_in_every_stage(work, anchors) -> None:
    """Losses, weights and moments, on two ranks: in float32, in bf16, with what can lie on the
    CPU there, and with merged images at their anchors.
    """
    types = {"fp32": "bf16.enabled=false", "bf16": "bf16.enabled=true"}
    words = {
        f"same-{stage}-{name}": [*settings(stage, 2, 2), word]
        for stage in (1, 2, 3)
        for name, word in types.items()
    }
    for stage, offload in ((1, OFFLOAD[:1]), (2, OFFLOAD[:1]), (3, OFFLOAD)):
        words |= {
            f"same-{stage}-{name}-offload": [*settings(stage, 2, 2), word, *offload]
            for name, word in types.items()
        }
    rules = [f"beingvl.trainable={json.dumps(ROWS_AND_LAYERS)}", "beingvl.checkpoint_every_steps=3"]
    jobs = [job(work, name, *more, *rules) for name, more in words.items()]
    for stage in (1, 2, 3):
        jobs.append(job(work, f"same-{stage}-anchors", *settings(stage, 2, 2), *rules) | anchors)
    outputs = [one["output"] for one in jobs]
    run_stages(2, jobs, work)
    expected = [bytes_of(output) for output in outputs]
    for output in outputs:  # as if killed after step 3
        for folder in (output / "final", output / "checkpoints" / f"step-{NUM_STEPS:08d}"):
            (folder / "manifest.json").unlink()
    run_stages(2, jobs, work)
    for output, before in zip(outputs, expected, strict=True):
        assert bytes_of(output) == before, output.name


def bytes_of(output: Path) -> list:
    newest = output / "checkpoints" / f"step-{NUM_STEPS:08d}"
    files = [*sorted((output / "final").glob("*.safetensors")), *sorted(newest.glob("rank-*"))]
    return [[row["loss"] for row in read_metrics(output)], *(path.read_bytes() for path in files)]


ROWS_ONLY = [{"match": "visual_rows"}, {"match": ".*", "train": False}]
# DeepSpeed keeps a billion gathered parameters by default, which is all of a small model.
FEW_GATHERED = {
    "max_live_parameters": 2_000_000,
    "max_reuse_distance": 0,
    "prefetch_bucket_size": 500_000,
}


def test_no_rank_ever_holds_the_whole_model(work) -> None:
    """From building to final/, one of three ranks has its third, beside a few gathered matrices,
    activations and buffers.
    """
    write_model(work / "large", num_layers=6, hidden_size=1024)
    model_bytes = sum(tensor.nbytes for tensor in dict(WeightFolder(work / "large")).values())
    rules = [f"beingvl.trainable={json.dumps(ROWS_ONLY)}", "beingvl.max_steps=1"]
    few = [f"zero_optimization.stage3_{key}={value}" for key, value in FEW_GATHERED.items()]
    warm_up = job(
        work, "warm-up", *settings(3, 3, 1), *rules
    )  # imports, the process group's buffers
    large = {**job(work, "held", *settings(3, 3, 1), *rules, *few), "model": work / "large"}
    run_stages(
        3, [warm_up, large], work, MALLOC_MMAP_THRESHOLD_="65536"
    )  # what is freed goes back, so the peak is what is held
    shares = [amount / model_bytes for amount in added_bytes(work / "held", 3)]
    assert all(1 / 3 < share < 0.85 for share in shares), shares
