"""A stage whose sequences or samples exceed what the model has positions for."""

import json
from contextlib import nullcontext

import pytest

from beingvl.artefact.manifest import write_manifest
from beingvl.errors import InputError
from beingvl.launch.plan import plan
from beingvl.launch.preflight import preflight
from beingvl.train.stage_run import open_stage
from tests.tiny import LAYOUT, stage_fields, write_image_shards, write_inputs, write_vbpe_inside


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Samples of up to 39 tokens, sequences of 128, and models for 32 and for 64 tokens."""
    folder = write_inputs(tmp_path_factory.mktemp("context"), stage=stage_fields())
    config = folder / "base/config.json"
    fields = json.loads(config.read_text())
    for context in (64, 32):
        model = folder / f"base-{context}"
        model.mkdir()
        for path in (folder / "base").iterdir():
            if path.name != "manifest.json":
                (model / path.name).write_bytes(path.read_bytes())
        fields["max_position_embeddings"] = context
        (model / "config.json").write_text(json.dumps(fields))
        write_manifest(model, "model", {"parameters": 0}, {"vocab": LAYOUT.fingerprint()})
    return folder


def test_train_refuses_a_longer_sample_and_notes_longer_sequences(work) -> None:
    def stage(model: str):
        paths = work / model, work / "shards", work / "out", work / "stage.json"
        return open_stage(*paths, ["beingvl.sequence_length=128"], None, None, False)

    with pytest.raises(InputError, match=r"longest .* takes 39 positions, .* for 32 tokens"):
        stage("base-32")
    assert "beingvl.sequence_length is 128" in stage("base-64").note
    assert "positions" not in stage("base").note


def test_plan_and_preflight_say_so(work) -> None:
    overrides = ["beingvl.sequence_length=128"]
    said = str(plan(work / "base-64", work / "stage.json", "2x80GB", overrides=overrides))
    assert "sequence_length is 128" in said and "for 64 tokens" in said
    with pytest.raises(InputError, match="takes 39 positions"):
        plan(work / "base-32", work / "stage.json", "2x80GB", data=work / "shards")
    (work / "hostfile").write_text("localhost slots=2\n")

    def data_of(model: str):
        given = {"model": work / model, "data": work / "shards", "stage": work / "stage.json"}
        found = preflight(work / "hostfile", **given, overrides=overrides, seconds=0)
        return next(finding for finding in found if finding.check == "data")

    assert "for 64 tokens" in data_of("base-64").seen and not data_of("base-64").remedy
    assert "takes 39 positions" in data_of("base-32").remedy


def test_a_merged_image_takes_the_positions_of_its_codes(work) -> None:
    vbpe = write_vbpe_inside(work / "base-64")
    unmerged = {"longest_unmerged_sample": 65}
    for kind, failure in (("running", nullcontext()), ("anchor", pytest.raises(InputError))):
        shards = write_image_shards(work / kind, vbpe, image_positions=kind, **unmerged)
        with failure as refused:
            plan(work / "base-64", work / "stage.json", "2x80GB", data=shards)
    assert "takes 65 positions" in str(refused.value)
