import json
import math
import re
import shlex

import pytest
from transformers import LlamaConfig

from beingvl.commands import main as cli
from beingvl.data.arrow_shards import ShardReader
from beingvl.errors import InputError
from beingvl.launch.known_shapes import COLUMNS, SHAPES
from beingvl.launch.model_shapes import NEW_ROWS, named_shape
from beingvl.launch.plan import SHIPPED, parse_gpus
from beingvl.launch.plan import plan as plan_stages
from beingvl.stage.stage_config import parse_stage_config
from beingvl.train.flops import ASSUMED_MFU
from beingvl.train.memory import device_bytes, predict_memory
from tests.tiny import stage_fields, write_inputs


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("plan"), stage=stage_fields())


def plan(work, *more: str) -> int:
    return cli.main(
        ["plan", "--model", str(work / "base"), "--stage", str(work / "stage.json"), *more]
    )


def test_it_proposes_and_tells_the_time(work, capsys) -> None:
    assert plan(work, "--gpus", "2x80GB", "--data", str(work / "shards")) == 0
    shown = capsys.readouterr().out
    assert "2 ranks, ZeRO-3, micro-batch 1" in shown and "of 80 GB" in shown
    assert "largest micro-batch that fits: --set train_micro_batch_size_per_gpu=2: " in shown
    assert "one epoch: 60 samples" in shown and f"at an MFU of {ASSUMED_MFU:g}" in shown


def test_an_epoch_is_what_the_mixture_draws(work, capsys) -> None:
    """As the trainer counts it: no sample of a source that is left out, and more of the one that
    has the larger share.
    """
    data = ["--gpus", "2x80GB", "--data", str(work / "shards"), "--set"]
    shards = ShardReader(work / "shards")
    foundation, reasoning = (shards.lengths[members] for members in shards.members)
    assert plan(work, *data, 'beingvl.mixture={"reasoning": 1}') == 0
    assert (
        f"one epoch: {len(reasoning)} samples, {reasoning.sum():,} tokens"
        in capsys.readouterr().out
    )
    assert plan(work, *data, 'beingvl.mixture={"foundation": 1, "reasoning": 1}') == 0
    assert (
        f"one epoch: 60 samples, {round(30 * foundation.mean() + 30 * reasoning.mean()):,} tokens"
        in capsys.readouterr().out
    )
    assert plan(work, *data, 'beingvl.mixture={"perception": 1}') == 2
    assert "names the source 'perception'" in capsys.readouterr().err


def test_a_name_or_a_config_json_gives_the_table_of_all_stages(tmp_path, capsys) -> None:
    assert cli.main(["plan", "--model", "llama3.1-8b"]) == 0
    shown = capsys.readouterr().out
    head, *rows = shown.splitlines()[:4]
    assert head.split()[-3:] == ["1", "8", "32"]
    assert [row.split()[0] for row in rows] == ["stage1.json", "stage2.json", "stage3.json"]
    assert rows[2].split()[2] == "*" and "does not fit into 74 GB, 92% of 80" in shown
    assert "stage1.json on 32: train_batch_size 16 is not divisible by 32 ranks; the nea" in shown
    LlamaConfig(**dict(zip(COLUMNS, SHAPES["llama3.1-8b"], strict=True))).save_pretrained(tmp_path)
    assert cli.main(["plan", "--model", str(tmp_path / "config.json")]) == 0
    assert capsys.readouterr().out == shown
    assert cli.main(["plan", "--model", str(tmp_path)]) == 0
    assert capsys.readouterr().out == shown


def test_a_shape_has_the_parameters_of_its_model() -> None:
    """The makers say 8.03, 1.24, 3.21, 6.74 billion and 135 million; here embeddings are untied
    and have 16,389 new rows.
    """
    for name, (published, is_tied) in {
        "llama3.1-8b": (8.03e9, False),
        "llama3.2-1b": (1.236e9, True),
        "llama3.2-3b": (3.213e9, True),
        "llama2-7b": (6.738e9, False),
        "smollm2-135m": (134.5e6, True),
    }.items():
        shape = named_shape(name)
        hidden = shape.config.hidden_size
        added = 2 * NEW_ROWS * hidden + is_tied * shape.num_text * hidden
        total = sum(map(math.prod, shape.parameters.values()))
        assert total - added == pytest.approx(published, rel=1e-3), name


def test_what_helps_is_proposed_with_its_new_total(capsys) -> None:
    stage3 = str(SHIPPED[2])
    words = ["plan", "--model", "llama3.2-1b", "--stage", stage3, "--gpus"]
    assert cli.main([*words, "1x80GB"]) == 0
    helps = re.search(r"sub_group_size=100000000 saves (.*) GB: (.*) GB", capsys.readouterr().out)
    assert helps and float(helps[1]) == pytest.approx(10.5, abs=1)
    assert cli.main([*words, "1x24GB"]) == 0
    shown = capsys.readouterr().out
    proposed = re.search(
        r"does not fit into [^;]*; --set (.*): (.*) GB and (.*) GB of CPU memory", shown
    )
    assert proposed
    assert cli.main([*words, "1x24GB", "--set", *shlex.split(proposed[1])]) == 0
    shown = capsys.readouterr().out
    on_device = re.search(r"on the device +(.*) GB of 24", shown)
    assert on_device and float(on_device[1]) == pytest.approx(float(proposed[2]), abs=0.06)
    assert cli.main([*words, "1x4GB"]) == 0
    assert "does not fit, even with --set" in capsys.readouterr().out


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_small_recipe_fits_a_1b_base_on_one_gpu_of_24_gb(stage: int) -> None:
    small = SHIPPED[0].with_name(f"small-stage{stage}.json")
    [case] = plan_stages("llama3.2-1b", small, "1x24GB").cases
    assert case.fits(case.memory())
    assert list(case.config().beingvl.mixture) == ["foundation"]


@pytest.mark.parametrize("stage", [2, 3])
def test_adapters_bring_8b_to_one_gpu_of_40_gb_and_1b_to_24(stage: int) -> None:
    [large] = plan_stages(
        "llama3.1-8b", SHIPPED[0].with_name(f"stage{stage}-lora.json"), "1x40GB"
    ).cases
    [small] = plan_stages(
        "llama3.2-1b", SHIPPED[0].with_name(f"small-stage{stage}-lora.json"), "1x24GB"
    ).cases
    memory = large.memory()
    assert device_bytes(memory) <= 25e9 and large.fits(memory) and small.fits(small.memory())
    offload = 'zero_optimization.offload_optimizer={"device": "cpu", "pin_memory": true}'
    assert device_bytes(large.memory(offload)) <= 0.92 * 24e9
    if stage == 3:  # 12 bytes for rows of embedding and head, and rank 64 on seven matrices
        adapters = 32 * 64 * (4 * 4096 + 2 * (4096 + 1024) + 3 * (4096 + 14336))
        assert memory["optimizer"] == 12 * (2 * NEW_ROWS * 4096 + adapters)
        rules = json.loads((SHIPPED[0].with_name("stage3-lora.json")).read_text())["beingvl"]
        rules["trainable"][1]["lora"]["base"] = "nf4"  # 9/16 bytes for 6.98e9 of 8.17e9 weights
        nf4 = f"beingvl.trainable={json.dumps(rules['trainable'])}"
        assert device_bytes(large.memory("zero_optimization.stage=2", nf4)) <= 13.5e9


def test_mistakes_are_named(work, capsys) -> None:
    with pytest.raises(InputError, match="8x80GB"):
        parse_gpus("8")
    assert plan(work, "--gpus", "8x80GB", "--data", str(work / "shards"), "--gpu", "abacus") == 2
    assert "'abacus' is not known" in capsys.readouterr().err
    with pytest.raises(InputError, match="--nodes 2: expected NUMBERxMEMORY"):
        parse_gpus("80GB", nodes=2)
    assert cli.main(["plan", "--model", "llama9"]) == 2
    assert "no known shape: llama3.1-8b, " in capsys.readouterr().err
    (work / "config.json").write_text('{"model_type": "abacus"}')
    assert cli.main(["plan", "--model", str(work / "config.json")]) == 2
    assert (
        "config.json is not a causal language model that transformers knows"
        in capsys.readouterr().err
    )
    assert plan(work, "--gpus", "3x80GB") == 0
    assert "is not divisible by 3 ranks" in capsys.readouterr().out


class Llama8B:
    hidden_size, num_hidden_layers, intermediate_size = 4096, 32, 14336


def llama_plan(trainable: list[dict]):
    from beingvl.model.param_groups import plan_parameters

    layer = {"q": (4096, 4096), "k": (1024, 4096), "v": (1024, 4096), "o": (4096, 4096)}
    layer |= {"gate": (14336, 4096), "up": (14336, 4096), "down": (4096, 14336)}
    shapes = {
        f"model.layers.{n}.{name}.weight": shape for n in range(32) for name, shape in layer.items()
    }
    for stem in ("model.embed_tokens", "lm_head"):
        shapes |= {f"{stem}.text_rows": (128256, 4096), f"{stem}.visual_rows": (16389, 4096)}
    config = parse_stage_config(
        stage_fields(trainable=trainable, sequence_length=4096) | {"bf16": {"enabled": True}}, "x"
    )
    return plan_parameters(shapes, config.beingvl.trainable), config


def test_stage_1_at_full_size_needs_a_tenth_of_the_optimizer(work) -> None:
    """14.2 GB of masters and moments for all embedding rows, 1.6 GB for the new ones."""
    everything, config = llama_plan([{"match": ".*_rows"}, {"match": ".*", "train": False}])
    new_rows, _ = llama_plan([{"match": "visual_rows"}, {"match": ".*", "train": False}])
    assert predict_memory(everything, Llama8B, config, 1)["optimizer"] == pytest.approx(
        14.2e9, rel=0.01
    )
    assert predict_memory(new_rows, Llama8B, config, 1)["optimizer"] == pytest.approx(
        1.6e9, rel=0.01
    )


def test_zero_cuts_and_offload_moves(work) -> None:
    plan_8b, config = llama_plan([{"match": ".*"}])
    alone, eight = (predict_memory(plan_8b, Llama8B, config, num_ranks) for num_ranks in (1, 8))
    for purpose in ("weights", "gradients", "optimizer"):
        assert eight[purpose] == pytest.approx(alone[purpose] / 8, rel=1e-6)
    config.deepspeed["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
    offloaded = predict_memory(plan_8b, Llama8B, config, 8)
    assert offloaded["optimizer"] == 0 and offloaded["cpu_optimizer"] == eight["optimizer"]
    assert device_bytes(offloaded) == device_bytes(eight) - sum(
        eight[name] for name in ("optimizer", "gradients", "update")
    )
    config.deepspeed["zero_optimization"] = {"stage": 1}
    assert predict_memory(plan_8b, Llama8B, config, 8)["weights"] == alone["weights"]


def test_what_is_gathered_stays_as_long_as_deepspeed_is_allowed_to_keep_it(work) -> None:
    plan_8b, config = llama_plan([{"match": ".*"}])
    zero = config.deepspeed["zero_optimization"]
    largest, of_layer = 128256 * 4096, 14336 * 4096  # the text rows; an MLP's matrix
    more = of_layer + 50_000_000 + largest  # the last to be whole; and a bucket, flat
    assert predict_memory(plan_8b, Llama8B, config, 1)["gathered"] == 0
    for limits, expected in (
        ({}, 1_000_000_000 + more),
        (
            {
                "stage3_max_live_parameters": 3_000_000_000,
                "stage3_max_reuse_distance": 2_000_000_000,
            },
            3_000_000_000 + more,
        ),
        ({"prefetch_bucket_size": 0, "max_reuse_distance": 0}, 2 * largest),
    ):
        config.deepspeed["zero_optimization"] = {**zero, **limits}
        assert predict_memory(plan_8b, Llama8B, config, 8)["gathered"] == 2 * expected


def test_an_update_needs_gradients_and_temporaries_of_a_sub_group(work) -> None:
    """8B on one GPU: DeepSpeed updates a billion weights at once, 12 bytes each, where
    activations and logits were before.
    """
    plan_8b, config = llama_plan([{"match": ".*"}])
    zero = config.deepspeed["zero_optimization"]
    memory = predict_memory(plan_8b, Llama8B, config, 1)
    assert memory["update"] + memory["activations"] + memory["logits"] == 12_000_000_000
    assert memory["buffers"] == 2 * 500_000_000  # one rank alone has a bucket, too
    zero["sub_group_size"] = 100_000_000
    assert predict_memory(plan_8b, Llama8B, config, 1)["update"] == 0
    zero["offload_optimizer"] = {"device": "cpu"}  # activations are elsewhere
    assert predict_memory(plan_8b, Llama8B, config, 1)["cpu_update"] == 12 * 100_000_000


def test_on_nvme_only_buffers_stay_in_memory(work) -> None:
    """8B on one GPU: sub-groups of 100 million and one matrix more; 11 buffers as large as the
    text rows.
    """
    plan_8b, config = llama_plan([{"match": ".*"}])
    text_rows = 128256 * 4096
    nvme = {"device": "nvme", "nvme_path": "/nvme"}
    config.deepspeed["zero_optimization"] = {
        "stage": 3,
        "offload_optimizer": nvme,
        "offload_param": {**nvme, "max_in_cpu": 0},
    }
    memory = predict_memory(plan_8b, Llama8B, config, 1)
    assert memory["optimizer"] == memory["weights"] == memory["gradients"] == 0
    assert memory["cpu_optimizer"] == 4 * 4 * (100_000_000 + text_rows)
    assert memory["cpu_weights"] == 2 * (11 * text_rows + 100_000_000 + text_rows)
    config.deepspeed["zero_optimization"]["offload_param"] = (
        nvme  # a billion trained weights stay in memory then
    )
    kept = predict_memory(plan_8b, Llama8B, config, 1)
    assert kept["cpu_weights"] == memory["cpu_weights"] + 2 * 1_000_000_000
    config.deepspeed["zero_optimization"]["offload_optimizer"] = {**nvme, "pipeline_read": True}
    assert (
        predict_memory(plan_8b, Llama8B, config, 1)["cpu_optimizer"] == 2 * memory["cpu_optimizer"]
    )
