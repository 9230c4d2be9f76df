import copy
import dataclasses
import inspect
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch

from beingvl.artefact.manifest import Manifest
from beingvl.errors import InputError
from beingvl.stage import deepspeed_keys
from beingvl.stage.deepspeed_keys import DEEPSPEED_KEYS
from beingvl.stage.json_schema import SWITCH, Allowed, Schema
from beingvl.stage.stage_config import BeingVLBlock, load_stage_config, parse_stage_config
from beingvl.train import stage_run
from beingvl.train.stage_run import run_identity
from tests.tiny import stage_fields

# What may change between two starts of a run, written down a second time.
SAME_RESULT = {
    "activation_checkpointing",
    "loss_chunk_tokens",
    "checkpoint_every_steps",
    "checkpoint_every_minutes",
    "background_save",
    "final",
    "keep_last",
    "keep_every",
    "validation_every_steps",
    "log_every_steps",
    "tensorboard",
    "max_skipped_steps",
    "stall_timeout_seconds",
    "deterministic",
}
NVME = {"device": "nvme", "nvme_path": "/nvme"}
CONFIGS = sorted((Path(__file__).parents[2] / "ds_configs").glob("*.json"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_shipped_configuration_is_valid(path: Path) -> None:
    config = load_stage_config(path)
    assert config.zero_stage == 3
    assert config.sequences_per_step % config.micro_batch_size == 0


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_deepspeed_itself_accepts_every_shipped_configuration(path: Path) -> None:
    from deepspeed.runtime.config import DeepSpeedConfig

    config = load_stage_config(path)
    one_rank = {"gradient_accumulation_steps": 1, "train_batch_size": config.micro_batch_size}
    DeepSpeedConfig({**config.deepspeed, **one_rank})


def test_the_published_recipe() -> None:
    stages = [
        load_stage_config(path) for path in CONFIGS if path.stem in ("stage1", "stage2", "stage3")
    ]
    assert [stage.learning_rate for stage in stages] == [1e-3, 3e-5, 5e-5]
    assert [stage.beingvl.epochs for stage in stages] == [2, 3, 3]
    assert [stage.accumulation_steps(8) for stage in stages] == [2, 4, 4]
    assert [stage.beingvl.warmup_ratio for stage in stages] == [0.03] * 3
    assert [list(stage.beingvl.mixture.values()) for stage in stages] == [
        [0.8, 0.2],
        [0.4, 0.3, 0.2, 0.1],
        [0.15, 0.15, 0.3, 0.4],
    ]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_large_recipe_is_the_published_one_with_a_batch_for_8_to_64_gpus(stage: int) -> None:
    published, large = (
        load_stage_config(CONFIGS[0].with_name(f"{prefix}stage{stage}.json"))
        for prefix in ("", "large-")
    )
    factor = large.sequences_per_step / published.sequences_per_step
    rate = large.learning_rate
    assert rate == pytest.approx(published.learning_rate * math.sqrt(factor), rel=0.02)
    assert [large.accumulation_steps(num_ranks) for num_ranks in (8, 32, 64)] == [8, 2, 1]
    deepspeed = copy.deepcopy(large.deepspeed) | {"train_batch_size": published.sequences_per_step}
    deepspeed["optimizer"]["params"]["lr"] = published.learning_rate
    assert (deepspeed, large.beingvl) == (published.deepspeed, published.beingvl)


def test_a_batch_that_does_not_divide_is_answered_with_those_that_do() -> None:
    stage1 = load_stage_config(CONFIGS[0].with_name("stage1.json"))
    with pytest.raises(InputError) as answer:
        stage1.accumulation_steps(12)
    assert "12 (ranks) = 12; the nearest that are: --set train_batch_size=12" in str(answer.value)
    assert "lr=0.000866 or train_batch_size=24 optimizer.params.lr=0.00122" in str(answer.value)
    with pytest.raises(InputError, match=r"are: --set train_batch_size=32 optimizer.params.lr=0.0"):
        stage1.accumulation_steps(32)


def test_our_list_of_deepspeed_keys_is_deepspeeds() -> None:
    """Every key we let through is spelt somewhere in DeepSpeed's configuration code, which
    accepts a typo silently.
    """
    import deepspeed.runtime

    root = Path(deepspeed.runtime.__file__).parents[1]
    files = [path for pattern in ("*config*.py", "*constants.py") for path in root.rglob(pattern)]
    source = "".join(path.read_text() for path in files)

    def names_in(schema: Schema) -> Iterator[str]:
        for key, inside in schema.items() if isinstance(schema, Mapping) else ():
            yield key
            yield from () if key == "params" else names_in(inside)

    optimizer = DEEPSPEED_KEYS["optimizer"]
    assert isinstance(optimizer, Mapping)
    theirs = inspect.signature(torch.optim.AdamW).parameters
    assert set(optimizer["params"]) - set(theirs) == {"torch_adam", "adam_w_mode"}, (
        "the rest goes to torch's optimizer as it is"
    )
    for name in names_in(
        {key: inside for key, inside in DEEPSPEED_KEYS.items() if key != "zero_optimization"}
    ):
        assert name in source, name


def broken(path: str, value: object) -> dict:
    fields = copy.deepcopy(stage_fields())
    *parents, last = path.split(".")
    target = fields
    for parent in parents:
        target = target[parent]
    if value is None:
        del target[last]
    else:
        target[last] = value
    return fields


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("gradient_cliping", 1.0, "unknown key gradient_cliping; did you mean gradient_clipping"),
        ("beingvl.epoch", 1, "unknown key beingvl.epoch; did you mean beingvl.epochs"),
        ("optimizer.params.beta", 1, "did you mean optimizer.params.betas"),
        ("bf16", {"enable": True}, "did you mean bf16.enabled"),
        ("gradient_clipping", None, "'gradient_clipping' is missing"),
        ("beingvl.mixture", None, "'beingvl.mixture' is missing"),
        ("scheduler", {}, "pure function of the step"),
        ("prescale_gradients", True, "ZeRO refuses it"),
        ("gradient_predivide_factor", 2.0, "ZeRO refuses it"),
        ("gradient_accumulation_steps", 2, "remove it"),
        ("fp16", {"enabled": True}, "use bf16"),
        ("optimizer.type", "Lion", "optimizer.type is 'Lion', expected one of"),
        (
            "optimizer.params.torch_adam",
            False,
            "torch_adam is False, expected true: checkpoints restore",
        ),
        ("zero_optimization.stage", 4, "expected one of 1, 2, 3"),
        ("zero_optimization.stage", 0, "is 0, expected one of 1, 2, 3; on one rank stage 1 is"),
        (
            "zero_optimization",
            {"stage": 3, "offload_param": {"device": "disk"}},
            "device is 'disk', expected one of",
        ),
        (
            "zero_optimization",
            {"stage": 3, "offload_param": {"device": "nvme"}},
            "nvme_path is None, expected a folder",
        ),
        (
            "zero_optimization",
            {"stage": 3, "offload_param": {"device": "nvme", "nvme_path": ""}},
            "nvme_path is '', expected a f",
        ),
        (
            "zero_optimization",
            {"stage": 2, "offload_optimizer": {"device": "nvme", "nvme_path": "/"}},
            "higher stage than 2",
        ),
        (
            "zero_optimization",
            {"stage": 3, "offload_optimizer": {**NVME, "buffer_count": 3}},
            "buffer_count is 3, .* at least 4",
        ),
        (
            "zero_optimization",
            {
                "stage": 3,
                "offload_optimizer": {
                    **NVME,
                    "pipeline_read": True,
                    "pipeline_write": True,
                    "buffer_count": 8,
                },
            },
            "at least 12",
        ),
        (
            "zero_optimization",
            {"stage": 3, "offload_param": {**NVME, "buffer_size": "1e8"}},
            "buffer_size is '1e8', expected a whole",
        ),
        (
            "zero_optimization",
            {"stage": 3, "offload_param": NVME, "max_reuse_distance": "auto"},
            'nothing fills in "auto"',
        ),
        (
            "zero_optimization",
            {"stage": 3, "offload_optimizer": {**NVME, "ratio": 0.5}},
            "unknown key .*offload_optimizer.ratio",
        ),
        (
            "zero_optimization",
            {"stage": 3, "offload_param": NVME, "prefetch_bucket_size": 1},
            "expected 0 at most with offload_p",
        ),
        (
            "zero_optimization",
            {"stage": 3, "offload_param": NVME, "stage3_param_persistence_threshold": 1_000_000},
            "expected 200000 at most",
        ),
        (
            "zero_optimization",
            {"stage": 2, "offload_param": {"device": "cpu"}},
            "needs a higher stage than 2",
        ),
        ("train_batch_size", "auto", 'nothing fills in "auto"'),
        (
            "bf16",
            {"enabled": True, "check_grad_overflow": False},
            "check_grad_overflow is False, expected true: weights that",
        ),
        (
            "zero_optimization",
            {"stage": 3, "compute_grad_norm": False},
            "compute_grad_norm is False, expected true: the norm",
        ),
        (
            "zero_optimization",
            {"stage": 3, "overlap_com": True},
            "unknown key zero_optimization.overlap_com; did you mean .*comm?",
        ),
        (
            "zero_optimization",
            {"stage": 2, "cpu_offload": True},
            "unknown key zero_optimization.cpu_offload",
        ),
        (
            "zero_optimization",
            {"stage": 3, "offload_param": {"devise": "cpu"}},
            "mean zero_optimization.offload_param.device?",
        ),
        (
            "zero_optimization",
            {"stage": 2, "round_robin_gradients": True},
            "is True, expected false: with it DeepSpeed reports wrong",
        ),
        (
            "zero_optimization",
            {"stage": 3, "zero_hpz_partition_size": 2},
            "is 2, expected 1: its second copy",
        ),
        (
            "zero_optimization",
            {"stage": 3, "zero_quantized_weights": True},
            "is True, expected false: weights must pass",
        ),
        ("zero_optimization", 3, "expected an object"),
        (
            "bf16",
            {"enabled": True, "bf16_master_weights_and_grads": True},
            "masters and moments in float32",
        ),
        ("seed", 1, "seed is beingvl.seed"),
        ("compile", {}, "not used here"),
        ("beingvl.log_every_steps", 0, "at least 1"),
        ("beingvl.loss_chunk_tokens", 0, "at least 1"),
        ("beingvl.epochs", 0, "a number above 0"),
        ("beingvl.epochs", "two", "expected a number"),
        ("beingvl.epochs", -1, "a number above 0"),
        ("beingvl.sequence_length", True, "expected a whole number"),
        ("beingvl.loss_on", "answers", "expected one of"),
        ("beingvl.trainable", [{"train": True}], r"trainable\[0\]: 'match' is missing"),
        ("beingvl.trainable", [{"match": "x", "lr": 1}], r"unknown key beingvl.trainable\[0\].lr"),
        ("beingvl", [], "expected an object"),
        ("beingvl.epochs", math.nan, "a number above 0"),
        (
            "beingvl.trainable",
            [{"match": "x", "train": "yes"}],
            r"trainable\[0\].train is 'yes', expected true or false",
        ),
        (
            "beingvl.trainable",
            [{"match": "x", "lora": {"rank": 0, "alpha": 1}}],
            r"\[0\].lora.rank is 0, expected a whole number, at least 1",
        ),
        (
            "beingvl.trainable",
            [{"match": "x", "lora": {"rank": 8}}],
            r"trainable\[0\].lora: 'alpha' is missing",
        ),
        (
            "beingvl.trainable",
            [{"match": "x", "lora": {"rank": 8, "alpha": 8}, "train": False}],
            r"trainable\[0\] has lora and train false",
        ),
        (
            "beingvl.trainable",
            [{"match": "x", "lora": {"rank": 8, "alpha": 8, "base": "nf4"}}],
            r"trainable\[0\].lora.base is 'nf4', and ZeRO-3 cuts every weight",
        ),
        ("beingvl.final", "both", 'expected one of "merged", "adapter"'),
        ("beingvl.final", "adapter", "no rule has lora"),
        (
            "beingvl.trainable",
            [{"match": "x", "lr_multiplier": "2"}],
            r"\[0\].lr_multiplier is '2', expected a number",
        ),
        (
            "beingvl.trainable",
            [{"match": "x", "weight_decay": -1}],
            r"\[0\].weight_decay is -1, expected a number",
        ),
        ("beingvl.max_steps", 0, "at least 1"),
        ("beingvl.max_skipped_steps", 0, "at least 1"),
        ("beingvl.warmup_ratio", 2, "expected a number from 0 to 1"),
        (
            "beingvl.sequence_length",
            10**9,
            "sequence_length is 1000000000, expected .* at most 16777216",
        ),
        ("beingvl.min_lr_ratio", 7, "expected a number from 0 to 1"),
        ("optimizer.params.lr", "1e-3", "lr is '1e-3', expected a number"),
        ("optimizer.params.eps", True, "expected a number from 0 to 1e"),
        ("optimizer.params.lr", 1e38, "expected a number from 0 to 1e"),
        ("optimizer.params.weight_decay", -0.1, "expected a number from 0 to 1e"),
        ("optimizer.params.betas", [0.9], "two numbers from 0 to below 1"),
        ("optimizer.params.betas", [0.9, 1], "two numbers from 0 to below 1"),
        ("gradient_clipping", -1, "gradient_clipping is -1, expected a number"),
        (
            "zero_optimization",
            {"stage": 3, "reduce_bucket_size": 0},
            "expected a whole number of at least 1",
        ),
        (
            "zero_optimization",
            {"stage": 3, "sub_group_size": "1e8"},
            "expected a whole number of at least 0",
        ),
        ("bf16", {"enabled": "False"}, "bf16.enabled is 'False', expected true or false"),
        (
            "optimizer.params.fused",
            "false",
            "optimizer.params.fused is 'false', expected true or false",
        ),
        (
            "zero_optimization",
            {"stage": 3, "overlap_comm": 1},
            "zero_optimization.overlap_comm is 1, expected true or false",
        ),
        (
            "zero_optimization",
            {"stage": 3, "offload_optimizer": {"device": "cpu", "pin_memory": "yes"}},
            "offload_optimizer.pin_memory is 'yes', expected true or false",
        ),
        (
            "zero_optimization",
            {"stage": 3, "stage3_max_live_parameters": "auto"},
            'nothing fills in "auto"',
        ),
        (
            "zero_optimization",
            {"stage": 3, "prefetch_bucket_size": 0.5},
            "is 0.5, expected a whole number of at least 0",
        ),
        (
            "zero_optimization",
            {"stage": 3, "sub_group_size": math.inf},
            "is inf, expected a whole number",
        ),
        ("aio", {"block_size": "1M"}, "aio.block_size is '1M', expected a whole number"),
        ("steps_per_print", 0, "steps_per_print is 0, expected a whole number of at least 1"),
        (
            "timers",
            {"throughput": {"enabled": "no"}},
            "timers.throughput.enabled is 'no', expected true or false",
        ),
        ("timers", {"throughput": False}, "timers.throughput is False, expected an object"),
        ("timers", {"throughput": {"enable": True}}, "did you mean timers.throughput.enabled"),
        (
            "comms_logger",
            {"prof_ops": "all_reduce"},
            "comms_logger.prof_ops is 'all_reduce', expected a list",
        ),
        (
            "zero_optimization",
            {"stage": 3, "offload_optimizer": []},
            r"offload_optimizer is \[\], expected an object, or null",
        ),
        ("communication_data_type", "int8", "communication_data_type is 'int8', expected one of"),
        ("train_batch_size", True, "expected a whole number"),
        ("beingvll", {}, "did you mean beingvl"),
        ("epochs", 1, r"unknown key epochs; did you mean beingvl\.epochs"),
        ("optimizer", {}, "optimizer.type. is missing"),
        ("beingvl.trainable", {}, "expected a list"),
        (
            "zero_optimization",
            {"stage": 3, "offload_param": {**NVME, "nvme_path": "/nvme\0"}},
            "expected a text without NUL",
        ),
        ("beingvl.stall_timeout_seconds", 10**400, r"below 2\*\*63"),
    ],
)
def test_mistakes_are_named(path: str, value: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_stage_config(broken(path, value), "stage.json")


def test_keys_of_zero_optimization_are_deepspeeds() -> None:
    """Every key is one of DeepSpeed's, and what we hold to true or false, or to whole numbers,
    is so there.
    """
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.runtime.zero.offload_config import (
        DeepSpeedZeroOffloadOptimizerConfig,
        DeepSpeedZeroOffloadParamConfig,
    )

    fields = dict(DeepSpeedZeroConfig.model_fields)
    fields |= {field.alias: field for field in fields.values() if field.alias}
    for name, allowed in deepspeed_keys.ZERO_KEYS.items():
        assert name in fields, name
        if isinstance(allowed, Allowed) and (
            "whole number of" in allowed.expected or allowed is SWITCH
        ):
            assert ("bool" in str(fields[name].annotation)) == (allowed is SWITCH), name
    offload = {
        "offload_param": DeepSpeedZeroOffloadParamConfig,
        "offload_optimizer": DeepSpeedZeroOffloadOptimizerConfig,
    }
    assert all(
        set(offload[key].model_fields) >= set(names)
        for key, names in deepspeed_keys.OFFLOAD_KEYS.items()
    )


def test_adapters_and_weights_on_nvme_are_refused_together() -> None:
    fields = stage_fields(trainable=[{"match": "x", "lora": {"rank": 2, "alpha": 2}}])
    with pytest.raises(InputError, match="offload_param goes to nvme and a rule has lora"):
        parse_stage_config(
            fields | {"zero_optimization": {"stage": 3, "offload_param": NVME}}, "stage.json"
        )


def test_null_is_no_offload() -> None:
    zero = {"stage": 3, "offload_param": None}
    assert (
        parse_stage_config(stage_fields() | {"zero_optimization": zero}, "stage.json").nvme_offloads
        == {}
    )


def test_what_may_change_a_sample_or_an_update_makes_another_run(monkeypatch) -> None:
    """So a checkpoint of another trainable set, mixture or seed is never resumed; how often to
    save may change.
    """
    other = {
        "trainable": [{"match": "visual_rows"}],
        "mixture": {"foundation": 1.0},
        "max_steps": 7,
        "packing": False,
    }
    other |= {
        "loss_on": "all",
        "schedule": "constant",
        "mixture_by": "tokens",
        "activation_checkpointing": False,
    }
    other |= {
        "final": "adapter",
        "tensorboard": True,
        "background_save": True,
        "deterministic": True,
        "warmup_ratio": 0.1,
        "min_lr_ratio": 0.1,
    }

    def identity(fields: dict) -> dict:
        nothing = Manifest("model", "", {}, {}, {})
        return run_identity(parse_stage_config(fields, "stage.json"), nothing, nothing, {})

    adapted = {"trainable": [{"match": "layers[:]", "lora": {"rank": 2, "alpha": 2}}]}
    before = identity(stage_fields(**adapted))
    for entry in dataclasses.fields(BeingVLBlock):
        value = (
            other[entry.name]
            if entry.name in other
            else stage_fields()["beingvl"].get(entry.name, entry.default) + 1
        )
        changed = identity(stage_fields(**{**adapted, entry.name: value})) != before
        assert changed == (entry.name not in SAME_RESULT) == entry.metadata["changes_result"]
    for key in ("train_batch_size", "gradient_clipping"):
        assert identity(stage_fields() | {key: 8}) != identity(stage_fields())
    orders = [
        stage_fields(mixture=mixture) for mixture in ({"a": 0.5, "b": 0.5}, {"b": 0.5, "a": 0.5})
    ]
    assert identity(orders[0]) != identity(orders[1]), "samples are drawn in another order"
    before = identity(stage_fields())
    monkeypatch.setattr(stage_run, "PLAN_VERSION", 0)
    assert identity(stage_fields()) != before, (
        "a beingvl with another order of samples must not go on with this run"
    )


def test_overrides(tmp_path) -> None:
    path = tmp_path / "stage.json"
    path.write_text(json.dumps(stage_fields()))
    config = load_stage_config(
        path, ["beingvl.epochs=0.5", "optimizer.params.lr=0.1", "beingvl.loss_on=all"]
    )
    assert (config.beingvl.epochs, config.learning_rate, config.beingvl.loss_on) == (
        0.5,
        0.1,
        "all",
    )
    with pytest.raises(InputError, match="KEY=VALUE"):
        load_stage_config(path, ["beingvl.epochs"])
    with pytest.raises(InputError, match="not an object"):
        load_stage_config(path, ["gradient_clipping.x=1"])


def test_missing_and_damaged_files(tmp_path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        load_stage_config(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(InputError, match="not valid JSON"):
        load_stage_config(tmp_path / "bad.json")
    for content in (b"\xff", b'{"a": ' + b"1" * 5000 + b"}", b"[" * 200_000):
        (tmp_path / "bad.json").write_bytes(content)
        with pytest.raises(InputError, match="not valid JSON"):
            load_stage_config(tmp_path / "bad.json")
    (tmp_path / "bad.json").write_text("[]")
    with pytest.raises(InputError, match="expected a JSON object"):
        load_stage_config(tmp_path / "bad.json")


def test_a_batch_that_does_not_divide() -> None:
    config = parse_stage_config(stage_fields(), "stage.json")
    assert config.accumulation_steps(2) == 2
    with pytest.raises(InputError, match=r"4 is not a multiple of 1 \(micro-batch\) x 3 \(ranks\)"):
        config.accumulation_steps(3)


def test_a_configuration_of_accelerate_is_answered_with_all_of_its_keys(tmp_path: Path) -> None:
    fields = {
        "fp16": {"enabled": "auto"},
        "bf16": {"enabled": "auto"},
        "scheduler": {"type": "WarmupLR"},
        "train_batch_size": "auto",
        "gradient_accumulation_steps": "auto",
        "zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"},
    }
    (path := tmp_path / "zero2.json").write_text(json.dumps(fields))
    with pytest.raises(InputError) as error:
        load_stage_config(path)
    message = str(error.value)
    for key in ("'fp16'", "'scheduler'", "'gradient_accumulation_steps'"):
        assert message.count(key) == 1, message
    autos = "bf16.enabled, train_batch_size, zero_optimization.reduce_bucket_size: nothing fills"
    assert autos in message and "start from ds_configs/stage1.json" in message
