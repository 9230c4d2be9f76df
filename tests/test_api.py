"""The whole pipeline through the Python API, as in docs/api.md."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import beingvl
from beingvl import BeingVL, InputError, VisualBPE
from beingvl.artefact.manifest import verify_folder
from tests.images.test_encode_images import save_vqgan
from tests.model.small_models import write_base_model
from tests.tiny import stage_fields


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """Images, rows about them, a VQ-GAN, a base model and a stage's JSON."""
    folder = tmp_path_factory.mktemp("api")
    random = np.random.default_rng(0)
    (folder / "images").mkdir()
    rows = []
    for number in range(12):
        pixels = random.integers(0, 256, (20, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"images/{number}.png")
        turns = [{"from": "human", "value": "<image>\nhi"}, {"from": "gpt", "value": "yes"}]
        rows.append({"id": f"r{number}", "image": f"{number}.png", "conversations": turns})
    (folder / "rows.json").write_text(json.dumps(rows))
    save_vqgan(folder / "vqgan", seed=0)
    write_base_model(folder / "llama")
    fields = stage_fields(mixture={"instruction": 1.0}, max_steps=2, sequence_length=128)
    (folder / "stage.json").write_text(json.dumps(fields))
    return folder


def test_the_pipeline(work: Path, capfd) -> None:
    codes = beingvl.encode_images(str(work / "images"), str(work / "vqgan"), str(work / "codes"))
    assert codes.counts["images"] == 12
    vbpe = beingvl.train_vbpe(str(work / "codes"), str(work / "vbpe"), num_merges=4)
    assert isinstance(vbpe, VisualBPE) and vbpe == VisualBPE.load(work / "vbpe")
    base = beingvl.convert(
        str(work / "llama"),
        str(work / "base"),
        being_vq_path=str(work / "vqgan"),
        vbpe=str(work / "vbpe"),
    )
    assert base.kind == "model"
    rows = {"vq_codes": str(work / "codes"), "vbpe_path": str(work / "vbpe")}
    inputs = str(work / "rows.json"), str(work / "base")
    tokenized = beingvl.tokenize(*inputs, str(work / "rows"), **rows)
    assert tokenized.counts["rows"] == 12
    shards = beingvl.build_shards(str(work / "rows/data_vbpe.jsonl"), str(work / "shards"))
    beingvl.tokenize(*inputs, str(work / "direct"), format="arrow", **rows)
    assert shards.content_hash == verify_folder(work / "direct/data_vbpe").content_hash
    final = beingvl.train(
        str(work / "base"),
        str(work / "shards"),
        str(work / "stage-1"),
        deepspeed_config=str(work / "stage.json"),
    )
    assert final == work / "stage-1/final"
    exported = beingvl.export(
        str(work / "base"), str(work / "exported"), checkpoint=str(work / "stage-1")
    )
    assert exported.content_hash == verify_folder(final).content_hash
    scores = beingvl.evaluate(
        str(final), str(work / "scores"), json_path=inputs[0], max_new_tokens=2, **rows
    )
    assert scores["rows"] == 12
    model = BeingVL(final, vbpe_path=work / "vbpe")
    model.load_model()
    assert len(model.generate_with_vbpe(["hi"], [str(work / "images/0.png")], 2)) == 1


def test_errors_are_exceptions_and_name_both_sides(work: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="none"):
        beingvl.build_shards(tmp_path / "none.jsonl", tmp_path / "shards")
    with pytest.raises(InputError, match="incomplete; make it with `beingvl convert`"):
        beingvl.train(tmp_path, tmp_path, tmp_path, deepspeed_config=work / "stage.json")


def test_importing_loads_nothing_heavy_and_every_name_is_there() -> None:
    code = "import sys, beingvl; assert not {'torch', 'numpy', 'tqdm'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert all(callable(getattr(beingvl, name)) for name in beingvl.__all__ if name[0] != "_")
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        beingvl.trian  # noqa: B018
