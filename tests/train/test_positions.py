"""Anchors from shards to a finished model: exported, scored, and never mixed with running
positions.
"""

import json
import re
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

from beingvl.artefact.manifest import read_manifest
from beingvl.commands.main import main
from beingvl.data.arrow_shards import ShardReader
from beingvl.data.loader import shifted_targets
from beingvl.errors import InputError
from beingvl.model.published_names import write_published
from beingvl.train.export_hf import export
from beingvl.train.metrics import read_metrics
from tests import launcher
from tests.plain_torch import plain_positions
from tests.tiny import stage_fields, write_image_shards, write_model, write_vbpe_inside


def stock_loss(folder, shards: ShardReader) -> float:
    model, total, count = AutoModelForCausalLM.from_pretrained(folder), 0.0, 0
    for sample in map(shards.__getitem__, range(len(shards))):
        ids = torch.from_numpy(sample.input_ids.astype("int64"))[None]
        position_ids = torch.tensor(plain_positions(sample, shards, folder))[None]
        targets = torch.from_numpy(shifted_targets(sample, shards.layout))
        with torch.no_grad():
            logits = model(ids, torch.ones_like(ids), position_ids).logits[0]
        total += float(torch.nn.functional.cross_entropy(logits, targets, reduction="sum"))
        count += int((targets >= 0).sum())
    return total / count


def test_a_model_stands_where_its_rows_do(tmp_path, capsys) -> None:
    base = write_model(tmp_path / "base")
    vbpe = write_vbpe_inside(base)
    anchor = write_image_shards(tmp_path / "shards", vbpe, image_positions="anchor")
    running = write_image_shards(tmp_path / "running", vbpe)
    (tmp_path / "all.json").write_text(json.dumps(stage_fields(max_steps=2)))
    every_step = ("--set", "beingvl.checkpoint_every_steps=1")
    done = launcher.run_alone(tmp_path, tmp_path / "stage-1", *every_step)
    assert done.returncode == 0, done.stderr
    final = tmp_path / "stage-1/final"
    resumed = tmp_path / "resumed"  # as if it was ended after its first step
    shutil.copytree(
        tmp_path / "stage-1/checkpoints/step-00000001", resumed / "checkpoints/step-00000001"
    )
    done = launcher.run_alone(tmp_path, resumed, *every_step)
    assert done.returncode == 0 and "step-00000001" in done.stdout, done.stderr
    for file in final.glob("*.safetensors"):
        assert (resumed / "final" / file.name).read_bytes() == file.read_bytes()
    assert read_manifest(final).details["image_positions"] == "anchor"
    replayed = launcher.run_alone(tmp_path, tmp_path / "stage-1", "--replay", "1").stdout
    loss = float(re.search(r"  loss +([\d.]+)", replayed)[1])
    assert loss == pytest.approx(read_metrics(tmp_path / "stage-1")[0]["loss"], rel=1e-5)
    exported = export(base, tmp_path / "exported", checkpoint=tmp_path / "stage-1")  # asks a probe
    assert exported.details["image_positions"] == "anchor"

    with pytest.raises(InputError, match="published code counts positions along the sequence"):
        write_published(final, tmp_path / "published", {"model_type": "chameleon"})

    score = ["evaluate", f"--model={final}", f"--output={tmp_path}/scores", "--device=cpu"]
    assert main([*score, f"--data={anchor}"]) == 0
    scores = json.loads((tmp_path / "scores/scores.json").read_text())
    expected = stock_loss(final, ShardReader(anchor))
    assert scores["scores"]["loss"] == pytest.approx(expected, rel=1e-5)

    trainer = launcher.stage_words(tmp_path / "all.json", final, running, tmp_path / "stage-2")
    for words in ([*score, f"--data={running}"], ["train", *map(str, trainer)]):
        assert main(words) == 2
        assert f"{running} has 'running'; a stage has one kind" in capsys.readouterr().err
