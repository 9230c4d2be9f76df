"""Exporting a checkpoint: the probe decides before the folder is finished, and inputs are never
touched.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from beingvl.artefact.hashes import hash_file
from beingvl.artefact.manifest import is_complete, read_manifest, verify_folder
from beingvl.artefact.owner import UNFINISHED_FILE
from beingvl.commands.main import main
from beingvl.model.weight_files import WeightFolder
from beingvl.train.checkpoint import CheckpointState, CheckpointWriter, rank_file
from beingvl.train.probe import PROBE_FILE, Probe, compare_logits, save_probe
from tests.model.small_models import write_base_model, write_vqgan

TRAINED = "model.norm.weight"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    llama, vq = write_base_model(folder / "llama", "llama", "sharded"), write_vqgan(folder / "vq")
    options = [
        "--llama_path",
        llama,
        "--being_vq_path",
        vq,
        "--num_merges",
        0,
        "--output_path",
        folder / "base",
    ]
    assert main(["convert", *map(str, options)]) == 0
    return folder / "base"


@pytest.fixture
def checkpoint(tmp_path, base) -> Path:
    """A stage's checkpoint of one trained tensor, with the probe logits of the model it makes."""
    weights = WeightFolder(base)[TRAINED] * 2
    model = AutoModelForCausalLM.from_pretrained(base)
    model.get_parameter(TRAINED).data.copy_(weights)
    probe = Probe(torch.tensor([1, 2, 3, 4]), torch.tensor([0, 1, 4, 5]), torch.tensor([1, 3]))
    with torch.no_grad():
        logits = model(**probe.as_stock_arguments(), use_cache=False).logits[0, probe.positions]
    manifest = read_manifest(base)
    identity = {"start_model": manifest.content_hash, "lineage": manifest.lineage, "bf16": None}
    parameters = {
        TRAINED: {"shape": list(weights.shape), "spans": [[0, len(weights)]], "adam_steps": 1}
    }
    folder = tmp_path / "stage" / "checkpoints" / "step-00000003"
    state = CheckpointState(3, 3, 1, identity, parameters)
    slices = {f"{TRAINED}.{key}": weights.clone() for key in ("master", "exp_avg", "exp_avg_sq")}
    writer = CheckpointWriter(0, lambda value: [value])
    writer.begin(folder, state, slices.items(), lambda folder: save_probe(folder, probe, logits))
    writer.commit()
    return folder


def export(*arguments: object) -> int:
    return main(["export", *map(str, arguments)])


def snapshot(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hash_file(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def other_probe(checkpoint: Path) -> None:
    probe = Probe(torch.tensor([4, 3, 2, 1]), torch.arange(4), torch.tensor([1, 3]))
    save_probe(checkpoint, probe, torch.zeros(2, 321).index_fill_(1, torch.tensor([5]), 9.0))


def test_a_checkpoint_becomes_a_finished_folder(tmp_path, base, checkpoint, capsys):
    assert (
        export(
            "--model", base, "--checkpoint", tmp_path / "stage", "--output_path", tmp_path / "out"
        )
        == 0
    )
    assert "the same model" in capsys.readouterr().out
    verify_folder(tmp_path / "out")
    assert torch.equal(WeightFolder(tmp_path / "out")[TRAINED], WeightFolder(base)[TRAINED] * 2)
    assert not list((tmp_path / "out").glob("*.tmp"))
    assert "question sep answer eos" in (tmp_path / "out" / "chat_template.jinja").read_text()


@pytest.mark.parametrize("output_format", ["hf", "being-vl-0.5"])
def test_another_answer_to_the_probe_leaves_no_finished_folder(
    tmp_path, base, checkpoint, output_format, capsys
):
    other_probe(checkpoint)
    arguments = [
        "--model",
        base,
        "--checkpoint",
        checkpoint,
        "--format",
        output_format,
        "--output_path",
        tmp_path / "out",
    ]
    assert export(*arguments) == 1
    assert "NOT the model that was trained" in capsys.readouterr().err
    assert not is_complete(tmp_path / "out") and main(["verify", str(tmp_path / "out")]) == 2
    assert not list(tmp_path.glob(".out*"))
    assert export(*arguments, "--no_probe") == 0  # the unfinished folder is no obstacle


@pytest.mark.parametrize(
    ("damage", "message"),
    [("no probe", "probe.safetensors is missing"), ("truncated", "is missing or damaged: it has")],
)
def test_a_damaged_checkpoint_is_named_before_anything_is_written(
    tmp_path, base, checkpoint, damage, message, capsys
):
    if damage == "no probe":
        (checkpoint / PROBE_FILE).unlink()
    else:
        path = checkpoint / rank_file(0, 1)
        path.write_bytes(path.read_bytes()[:-5])
    assert (
        export("--model", base, "--checkpoint", checkpoint, "--output_path", tmp_path / "out") == 2
    )
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "what", ["itself", "symbolic link", "inside", "around", "the checkpoint", "published"]
)
def test_inputs_are_never_the_target(tmp_path, base, checkpoint, what, capsys):
    (tmp_path / "link").symlink_to(base)
    target = {
        "symbolic link": tmp_path / "link",
        "inside": base / "sub",
        "around": base.parent,
        "the checkpoint": checkpoint.parent,
    }.get(what, base)
    chosen = ["--format", "being-vl-0.5"] if what == "published" else ["--checkpoint", checkpoint]
    before = snapshot(base), snapshot(checkpoint)
    assert export("--model", base, *chosen, "--output_path", target, "--overwrite") == 2
    assert "are inside each other" in capsys.readouterr().err
    assert (snapshot(base), snapshot(checkpoint)) == before


def test_files_of_another_model_are_refused_and_do_not_survive(tmp_path, base, checkpoint, capsys):
    target = tmp_path / "out"
    (target / "vqgan").mkdir(parents=True)
    for name in ("model.safetensors", "chat_template.jinja", "vqgan/old.json"):
        (target / name).write_text("stale")
    arguments = ["--model", base, "--checkpoint", checkpoint, "--output_path", target]
    for more in ([], ["--overwrite"]):
        assert export(*arguments, *more) == 2
        assert "holds files that beingvl did not write" in capsys.readouterr().err
    (target / UNFINISHED_FILE).touch()  # of a run that was killed
    assert export(*arguments) == 0
    assert "stale" not in [
        path.read_text()
        for path in target.rglob("*")
        if path.is_file() and path.stat().st_size == 5
    ]
    assert not (target / "model.safetensors").exists() and json.loads(
        (target / "model.safetensors.index.json").read_text()
    )


def test_the_disk_is_checked_before_an_older_folder_is_removed(
    tmp_path, base, checkpoint, capsys, monkeypatch
):
    ours = ["--model", base, "--checkpoint", checkpoint, "--output_path", tmp_path / "ours"]
    published = [
        "--model",
        base,
        "--format",
        "being-vl-0.5",
        "--output_path",
        tmp_path / "published",
    ]
    assert export(*ours) == 0 and export(*published) == 0
    before = snapshot(tmp_path / "ours"), snapshot(tmp_path / "published")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    for chosen in (ours, published):
        assert export(*chosen, "--overwrite") == 2
        assert "are to be written" in capsys.readouterr().err
    assert (snapshot(tmp_path / "ours"), snapshot(tmp_path / "published")) == before
    assert export(*published[:-1], tmp_path / "ours", "--overwrite") == 2
    assert (
        "holds 'model', which a step that writes 'published_model' does not replace"
        in capsys.readouterr().err
    )


def test_padding_rows_are_not_compared_and_fewer_rows_are_another_model():
    stored = torch.tensor([[1.0, 2.0, 3.0]])
    padded = torch.cat([stored, torch.zeros(1, 2)], dim=1)
    comparison = compare_logits(stored, padded, torch.float32)
    assert comparison.matches and comparison.max_difference == 0
    assert not compare_logits(padded, stored, torch.float32).matches
