"""The template travels from rows to shards, checkpoints and models; a stage has one."""

import json

import pytest

from beingvl.artefact.manifest import read_manifest, write_manifest
from beingvl.commands.main import main
from beingvl.data.made_with import DEFAULT, PUBLISHED, TEMPLATE
from beingvl.data.shard_writer import ShardWriter
from beingvl.data.tokenize_dataset import tokenize
from beingvl.train.export_hf import export
from tests import launcher
from tests.tiny import LAYOUT, random_samples, stage_fields, write_model

TURNS = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yes"}]


def write_shards(folder, **details: str):
    writer = ShardWriter(folder, LAYOUT)
    for sample in random_samples(LAYOUT, [(length, 4) for length in range(10, 40)]):
        writer.add(sample)
    writer.finish({"vocab": LAYOUT.fingerprint()}, details)
    return folder


def refused(capsys, *words: object) -> str:
    assert main(list(map(str, words))) == 2
    return capsys.readouterr().err


def test_a_model_is_of_the_template_of_its_rows(tmp_path, capsys) -> None:
    base = write_model(tmp_path / "base")
    fields = stage_fields(mixture={"a": 1}, max_steps=2)
    (tmp_path / "all.json").write_text(json.dumps(fields))
    write_shards(tmp_path / "shards", template=PUBLISHED)
    assert TEMPLATE.of(read_manifest(base)) is None
    done = launcher.run_alone(tmp_path, tmp_path / "stage-1")
    assert done.returncode == 0, done.stderr
    final = tmp_path / "stage-1/final"
    assert read_manifest(final).details["template"] == PUBLISHED
    exported = export(base, tmp_path / "exported", checkpoint=tmp_path / "stage-1", probe=False)
    assert exported.details["template"] == PUBLISHED

    ours = write_shards(tmp_path / "ours")  # of before: without a word
    sentence = f"{final} has the template 'being-vl-0.5', {ours} has 'default'; a stage has one"
    trainer = launcher.stage_words(tmp_path / "all.json", final, ours, tmp_path / "stage-2")
    assert sentence in refused(capsys, "train", *trainer)
    (tmp_path / "hostfile").write_text("localhost slots=1\n")
    assert sentence in refused(capsys, "launch", f"--hostfile={tmp_path}/hostfile", "--", *trainer)
    trainer = launcher.stage_words(
        tmp_path / "all.json", base, tmp_path / "shards", tmp_path / "stage-2"
    )
    held_out = ["--validation_data", ours, "--set", "beingvl.validation_every_steps=1"]
    assert "has 'default'; a stage has one" in refused(capsys, "train", *trainer, *held_out)


@pytest.mark.parametrize("template", [DEFAULT, PUBLISHED])
def test_rows_are_of_the_models_template_and_say_so(tmp_path, template, capsys) -> None:
    base = write_model(tmp_path / "base")
    lineage = {"vocab": LAYOUT.fingerprint()}
    write_manifest(base, "model", {}, lineage, {"template": template})
    (tmp_path / "rows.json").write_text(json.dumps([{"conversations": TURNS}] * 3))
    rows = tmp_path / "rows.json"
    for form, folder in (("jsonl", tmp_path / "rows"), ("arrow", tmp_path / "shards")):
        assert tokenize(rows, base, folder, format=form).details["template"] == template
    assert read_manifest(tmp_path / "shards/data_base").details["template"] == template
    jsonl = tmp_path / "rows/data_base.jsonl"
    words = ["build-shards", "--jsonl_path", jsonl, "--num_workers=0", "--output_path"]
    assert main(list(map(str, [*words, tmp_path / "built"]))) == 0
    built = read_manifest(tmp_path / "built")
    assert built.details["template"] == template and not built.details["names_categories"]
    assert built.content_hash == read_manifest(tmp_path / "shards/data_base").content_hash
    other = {DEFAULT: PUBLISHED, PUBLISHED: DEFAULT}[template]
    mixed = [*words, tmp_path / "mixed", f"--template={other}", "--model_path", base]
    assert "a stage has one template" in refused(capsys, *mixed)
