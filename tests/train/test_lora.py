"""Adapters beside trained rows: PEFT's own layers in plain torch are the oracle, and stock PEFT
reads what a stage leaves.
"""

import itertools
import json
import sys
import warnings
from pathlib import Path

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from beingvl.artefact.manifest import read_manifest, verify_folder
from beingvl.errors import InputError
from beingvl.model.adapters import initial_adapter, nf4_values
from beingvl.model.param_groups import A, B
from beingvl.model.weight_files import WeightFolder
from beingvl.stage.stage_config import load_stage_config
from beingvl.train.checkpoint import StateReader
from beingvl.train.checkpoint_folders import complete_checkpoints, step_of
from beingvl.train.export_hf import export
from beingvl.train.metrics import VALIDATION_FILE, read_metrics
from tests.launcher import log_of, run, run_alone
from tests.plain_torch import train_plain
from tests.tiny import LAYOUT, stage_fields, write_inputs
from tests.train.run_stages import run_stages
from tests.train.storm import Storm, kill
from tests.train.test_extras import stock_loss
from tests.train.test_zero_stages import NUM_STEPS, OFFLOAD, job, moments_of, settings

RULES = [
    {"match": "visual_rows"},
    {"match": "layers[:25%]", "lora": {"rank": 4, "alpha": 8}},
    {
        "match": "layers.*(q|k|v|o|gate|up|down)_proj",
        "lora": {"rank": 2, "alpha": 6},
    },
    {"match": ".*", "train": False},
]
ADAPTED = r".*(q|k|v|o|gate|up|down)_proj"
ROWS = list(range(LAYOUT.num_text, LAYOUT.size))


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    fields = stage_fields(max_steps=NUM_STEPS, epochs=6, trainable=RULES)
    fields["optimizer"]["params"]["lr"] = 3e-3
    fields["train_batch_size"] = 12
    return write_inputs(tmp_path_factory.mktemp("lora"), all=fields)


NF4 = [
    {**rule, "lora": {**rule["lora"], "base": "nf4"}} if "lora" in rule else rule for rule in RULES
]


class Peft:
    """PEFT's adapters, and its trained tokens, on a stock model, whose adapted weights may be what
    4 bits leave of them.
    """

    def __init__(self, nf4: bool = False) -> None:
        self.nf4 = nf4

    def __call__(self, model: torch.nn.Module) -> None:
        for name, weights in model.named_parameters() if self.nf4 else ():
            if "_proj." in name:
                from bitsandbytes.functional import dequantize_4bit, quantize_4bit  # 2 s

                weights.data = dequantize_4bit(*quantize_4bit(weights.data, quant_type="nf4"))
        early = r".*\.layers\.0\..*"
        config = peft.LoraConfig(
            r=2,
            lora_alpha=6,
            rank_pattern={early: 4},
            alpha_pattern={early: 8},
            target_modules=ADAPTED,
            trainable_token_indices={"embed_tokens": ROWS, "lm_head": ROWS},
        )
        self.model = peft.get_peft_model(model, config)
        for name, weights in self.model.named_parameters():
            if ".lora_A." in name:
                name = name.removeprefix("base_model.model.").replace(".default", "")
                weights.data.copy_(initial_adapter(name, weights.shape, seed=0))


_PLAIN: dict = {}


def assert_equals_peft(work: Path, output: Path, packing: bool, nf4: bool = False) -> None:
    if (packing, nf4) not in _PLAIN:
        words, oracle = [f"beingvl.packing={json.dumps(packing)}"], Peft(nf4)
        config = load_stage_config(work / "all.json", words)
        losses, _ = train_plain(work / "base", work / "shards", config, adapt=oracle)
        _PLAIN[packing, nf4] = losses, oracle.model.merge_and_unload().state_dict()
    losses, weights = _PLAIN[packing, nf4]
    assert [row["loss"] for row in read_metrics(output)] == pytest.approx(losses, rel=1e-5)
    for name, tensor in dict(WeightFolder(output / "final")).items():
        assert (tensor - weights[name]).norm() <= 1e-5 * weights[name].norm(), name


@pytest.fixture(scope="module")
def trained(work) -> Path:
    """Two ranks, to the end."""
    words = {f"stage-{stage}": settings(stage, 2, 2) for stage in (2, 3)}
    words["unpacked"] = settings(1, 2, 1, packing=False)
    words["bf16"] = [*settings(3, 2, 2), "bf16.enabled=true"]
    run_stages(2, [job(work, name, *more) for name, more in words.items()], work)
    return work


def test_a_stage_equals_peft_in_plain_torch(trained) -> None:
    for name in ("stage-2", "stage-3", "unpacked"):
        assert_equals_peft(trained, trained / name, packing=name != "unpacked")
    near = [row["loss"] for row in read_metrics(trained / "stage-3")]
    assert [row["loss"] for row in read_metrics(trained / "bf16")] == pytest.approx(near, rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_the_grid_equals_peft(work, num_ranks: int) -> None:
    grid = {
        f"grid-{num_ranks}-{stage}-{accumulation}-{packing}": (stage, accumulation, packing)
        for stage, accumulation, packing in itertools.product((1, 2, 3), (1, 2), (True, False))
    }
    jobs = []
    for name, (stage, accumulation, packing) in grid.items():
        jobs.append(job(work, name, *settings(stage, num_ranks, accumulation, packing)))
    name = f"offload-{num_ranks}"
    jobs.append(job(work, name, *settings(3, num_ranks, 2), *OFFLOAD))
    grid[name] = (3, 2, True)
    run_stages(num_ranks, jobs, work)
    for name, (_, _, packing) in grid.items():
        assert_equals_peft(work, work / name, packing)


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_base_in_4_bits_equals_peft_on_what_they_leave(work, num_ranks: int) -> None:
    rules = f"beingvl.trainable={json.dumps(NF4)}"
    names = [(stage, f"nf4-{num_ranks}-{stage}") for stage in (1, 2)]
    jobs = [job(work, name, *settings(stage, num_ranks, 2), rules) for stage, name in names]
    run_stages(num_ranks, jobs, work)
    for _, name in names:
        assert_equals_peft(work, work / name, packing=True, nf4=True)


def test_a_base_in_4_bits_needs_its_package(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(InputError, match=r"pip install '\.\[quantized\]'"):
        nf4_values(torch.zeros(2, 2))


def test_final_is_start_model_and_adapters_merged_and_stock_peft_reads_them(trained) -> None:
    """Weight decay is 0.1: nothing but new rows and adapted weights moves."""
    base, output = trained / "base", trained / "stage-3"
    start, final = dict(WeightFolder(base)), dict(WeightFolder(output / "final"))
    names = set()
    with StateReader(complete_checkpoints(output)[-1]) as reader:
        for name in reader.state.parameters:
            if name.endswith(A):
                stem, scale = name.removesuffix(A), 2.0 if ".layers.0." in name else 3.0
                a, b = reader.master(stem + A).double(), reader.master(stem + B).double()
                merged = start[f"{stem}.weight"].double() + scale * b @ a
                assert (final[f"{stem}.weight"] - merged).abs().max() < 1e-7
                names.add(f"{stem}.weight")
        assert len(reader.state.parameters) == 2 * len(names) + 2
    assert names == {name for name in start if name.endswith("_proj.weight")}
    for name in start.keys() - names:
        frozen = slice(0, LAYOUT.num_text if name in EMBEDDINGS else None)
        assert torch.equal(final[name][frozen], start[name][frozen]), name
    verify_folder(base)
    verify_folder(output / "adapter")
    modes = {path.stat().st_mode for path in (output / "adapter").iterdir()}
    assert len(modes) == 1  # whoever reads one file of it reads them all
    assert read_manifest(output / "adapter").kind == "adapter"
    assert_same_logits(base, output / "adapter", output / "final")


EMBEDDINGS = ("model.embed_tokens.weight", "lm_head.weight")


def assert_same_logits(base: Path, adapter: Path, final: Path) -> None:
    """Of stock PEFT on the base, and of the merged model, whatever the base's logits are."""
    ids = torch.arange(LAYOUT.size)[None]
    stock = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    without = stock(ids).logits
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # of keys that PEFT does not know, or misses
        adapted = peft.PeftModel.from_pretrained(stock, adapter)(ids).logits
    merged = AutoModelForCausalLM.from_pretrained(final, dtype=torch.float32)(ids).logits
    assert (adapted - merged).abs().max() < 1e-5
    assert (adapted - without).abs().max() > 1e-2


def test_other_trained_parts_go_with_the_adapters(work) -> None:
    """Whole matrices, the last norm, layers without adapters; and `final` as an adapter, which no
    command takes for a model.
    """
    rules = [
        {"match": ".*_rows"},
        {"match": "norm"},
        {"match": r".*layers\.0\.self_attn.*"},
        {"match": "layers[1:]", "lora": {"rank": 3, "alpha": 3}},
        {"match": ".*", "train": False},
    ]
    words = [f"beingvl.trainable={json.dumps(rules)}", "beingvl.max_steps=2"]
    places = [job(work, "merged", *settings(3, 1, 1), *words)]
    places.append(job(work, "alone", *settings(2, 1, 1), *words, "beingvl.final=adapter"))
    run_stages(1, places, work)
    assert_same_logits(work / "base", work / "merged" / "adapter", work / "merged" / "final")
    assert_same_logits(work / "base", work / "alone" / "final", work / "merged" / "final")
    done = run_alone(work, work / "next", model=work / "alone")
    assert done.returncode == 2 and "holds PEFT adapters on" in done.stderr
    with pytest.raises(InputError, match=r"--model .*gone does not exist"):
        export(work / "gone", work / "later", checkpoint=work / "alone")
    export(work / "base", work / "later", checkpoint=work / "alone")
    assert_same_logits(work / "base", work / "alone" / "final", work / "later")
    run_stages(1, places, work)  # nothing to do


@pytest.mark.slow
def test_a_run_of_two_ranks_goes_on_with_three_and_then_with_one(trained) -> None:
    output, every = trained / "resumed", ["beingvl.checkpoint_every_steps=2", "beingvl.keep_last=9"]
    for num_ranks, last_step in ((2, 2), (3, 4), (1, NUM_STEPS)):
        stage = {2: 3, 3: 1, 1: 2}[num_ranks]
        run_stages(
            num_ranks, [job(trained, "resumed", *settings(stage, num_ranks, 1), *every)], trained
        )
        if last_step < NUM_STEPS:  # as if killed after it
            (output / "final" / "manifest.json").unlink()
            for folder in complete_checkpoints(output):
                if step_of(folder) > last_step:
                    (folder / "manifest.json").unlink()
    expected = dict(WeightFolder(trained / "stage-3" / "final"))
    for name, tensor in dict(WeightFolder(output / "final")).items():
        assert (tensor - expected[name]).norm() <= 1e-5 * expected[name].norm(), name
    moments = moments_of(trained / "stage-3", num_ranks=2)
    for name, tensor in moments_of(output, num_ranks=1).items():
        assert (tensor - moments[name]).norm() <= 1e-3 * moments[name].norm(), name


def test_the_next_stage_carries_moments_and_the_adapters_they_belong_to(trained) -> None:
    """A goes on, B is merged and starts at zero: so the first loss is that of fresh adapters, and
    two steps in any ZeRO stage end the same.
    """
    words = ["beingvl.max_steps=2", "beingvl.checkpoint_every_steps=1", "beingvl.seed=1"]
    moments = complete_checkpoints(trained / "stage-2")[-1]
    jobs = [job(trained, "fresh", *settings(3, 2, 1), *words)]
    for stage in (1, 3):
        jobs.append(job(trained, f"carried-{stage}", *settings(stage, 2, 1), *words))
        jobs[-1]["moments"] = moments
    run_stages(2, [{**one, "model": trained / "stage-2" / "final"} for one in jobs], trained)
    fresh, first, third = (
        [row["loss"] for row in read_metrics(trained / name)]
        for name in ("fresh", "carried-1", "carried-3")
    )
    assert first == pytest.approx(third, rel=1e-5)
    assert first[0] == pytest.approx(fresh[0], rel=1e-5) and first[1] != fresh[1]
    with (
        StateReader(moments) as before,
        StateReader(complete_checkpoints(trained / "carried-3")[0]) as after,
    ):
        name = "model.layers.2.mlp.up_proj"
        assert after.state.parameters[name + A]["adam_steps"] == NUM_STEPS + 1
        assert (before.master(name + A) - after.master(name + A)).abs().max() < 0.02
        assert before.master(name + B).norm() > 2 * after.master(name + B).norm() > 0


@pytest.mark.slow
def test_a_replay_finds_the_loss_of_a_step_and_validation_that_of_the_merged_model(
    trained,
) -> None:
    words = ["--set", *settings(3, 1, 1), "beingvl.checkpoint_every_steps=2"]
    output, held_out = trained / "replayed", trained / "shards"
    validation = ["beingvl.validation_every_steps=5", "--validation_data", str(held_out)]
    assert run_alone(trained, output, *words, *validation).returncode == 0
    (row,) = read_metrics(output, VALIDATION_FILE)
    expected = stock_loss(output / "final", held_out)
    assert row["step"] == NUM_STEPS and row["validation/loss"] == pytest.approx(expected, rel=1e-5)
    done = run_alone(trained, output, "--replay", "5", *words)
    assert done.returncode == 0 and f"{read_metrics(output)[4]['loss']:.6f}" in done.stdout


def test_other_ranks_of_adapters_carry_no_moments(trained) -> None:
    rules = [{**RULES[1], "match": "layers[:]"}, RULES[3]]
    words = ["--carry_moments", "--set", f"beingvl.trainable={json.dumps(rules)}"]
    done = run_alone(trained, trained / "other", *words, model=trained / "stage-3")
    assert done.returncode == 2 and "give both stages adapters of the same rank" in done.stderr


@pytest.mark.slow
def test_a_storm_of_kills_ends_with_the_same_bytes(trained) -> None:
    whole = trained / "whole"
    places = (trained / name for name in ("all.json", "base", "shards"))
    assert run(2, *places, whole) == 0, log_of(whole)
    storm = Storm(trained, whole, trained / "storm", seed=0)
    storm.run([kill] * 10)
    assert storm.num_interrupted >= 5
    for name in ("adapter/adapter_model.safetensors", "final/model.safetensors"):
        assert (whole / name).read_bytes() == (storm.output / name).read_bytes()
