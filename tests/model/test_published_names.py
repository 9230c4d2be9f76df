"""The published form holds the same bytes under the published names, loads as stock, and comes
back bit-identical.
"""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

from beingvl.artefact.manifest import read_manifest, verify_folder
from beingvl.commands.main import main
from beingvl.errors import InputError
from beingvl.images.vqgan import VQGAN
from beingvl.model import published_names
from beingvl.model.published_names import PREFIX, PUBLISHED_LAYOUT, read_published, write_published
from beingvl.model.weight_files import WeightFolder
from beingvl.vocab import LAYOUT_FILE, VocabLayout
from tests.model.small_models import write_base_model, write_vbpe, write_vqgan


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("published")
    llama = write_base_model(folder / "llama", "llama3", "sharded", torch.bfloat16)
    vq = write_vqgan(folder / "vq")
    write_vbpe(folder / "vbpe.json", vq)
    options = {
        "llama_path": llama,
        "being_vq_path": vq,
        "vbpe": folder / "vbpe.json",
        "output_path": folder / "base",
    }
    assert (
        main(
            [
                "convert",
                *(str(word) for key, value in options.items() for word in (f"--{key}", value)),
            ]
        )
        == 0
    )
    return folder / "base"


def equal_tensors(a, b) -> bool:
    ours, theirs = WeightFolder(a), WeightFolder(b)
    same = all(
        ours[name].dtype == theirs[name].dtype and torch.equal(ours[name], theirs[name])
        for name in theirs
    )
    return set(ours) == set(theirs) and same


def test_there_and_back_is_bit_identical(tmp_path, base):
    write_published(base, tmp_path / "published")
    published = WeightFolder(tmp_path / "published")
    assert {name.split(".")[0] for name in published} == {"model", "lm_head"}
    vq_weights = WeightFolder(base / "vqgan")
    assert {name.removeprefix(PREFIX) for name in published if name.startswith(PREFIX)} == set(
        vq_weights
    )
    assert (
        json.loads((tmp_path / "published" / "config.json").read_text())["vq_config"]["model_type"]
        == "janus_vqgan"
    )
    verify_folder(tmp_path / "published")

    manifest = read_published(tmp_path / "published", tmp_path / "back")
    assert equal_tensors(tmp_path / "back", base) and equal_tensors(
        tmp_path / "back" / "vqgan", base / "vqgan"
    )
    assert manifest.kind == "model" and manifest.lineage == read_manifest(base).lineage
    names = {path.relative_to(base) for path in base.rglob("*") if path.is_file()}
    assert {
        path.relative_to(tmp_path / "back")
        for path in (tmp_path / "back").rglob("*")
        if path.is_file()
    } == names
    for name in (
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "vbpe.json",
        LAYOUT_FILE,
    ):
        assert json.loads((tmp_path / "back" / name).read_text()) == json.loads(
            (base / name).read_text()
        )
    assert (
        VQGAN.load(tmp_path / "back" / "vqgan").fingerprint()
        == VQGAN.load(base / "vqgan").fingerprint()
    )
    verify_folder(tmp_path / "back")


def test_the_published_form_loads_as_a_stock_model(tmp_path, base):
    write_published(base, tmp_path / "published")
    prompt = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        ours, theirs = (
            AutoModelForCausalLM.from_pretrained(folder)(prompt).logits
            for folder in (tmp_path / "published", base)
        )
    assert torch.equal(ours, theirs)


def test_the_command_goes_there_and_back(tmp_path, base, capsys):
    there, back = tmp_path / "published", tmp_path / "back"
    assert (
        main(
            [
                "export",
                "--model",
                str(base),
                "--format",
                "being-vl-0.5",
                "--output_path",
                str(there),
            ]
        )
        == 0
    )
    assert main(["export", "--model", str(there), "--output_path", str(back)]) == 0
    assert equal_tensors(back, base) and equal_tensors(back / "vqgan", base / "vqgan")
    assert (
        main(["export", "--model", str(there), "--output_path", str(back)]) == 2
    )  # finished already
    assert main(["export", "--model", str(base), "--output_path", str(tmp_path / "nothing")]) == 2
    assert "give --checkpoint or --format" in capsys.readouterr().err


def test_unchanged_shards_are_links(tmp_path, base):
    write_published(base, tmp_path / "published")
    linked = [
        path
        for path in (tmp_path / "published").glob("*.safetensors")
        if path.samefile(base / path.name)
    ]
    assert len(linked) == len(WeightFolder(base).files) - 1


def test_a_folder_from_elsewhere_needs_no_manifest(tmp_path, base, monkeypatch):
    published = tmp_path / "published"
    write_published(base, published)
    (published / "manifest.json").unlink()
    layout = VocabLayout.load(base)
    manifest = read_published(published, tmp_path / "back")
    assert manifest.lineage["vocab"] == layout.fingerprint() and equal_tensors(
        tmp_path / "back", base
    )
    (published / LAYOUT_FILE).unlink()
    with pytest.raises(InputError, match=f"the layout has {PUBLISHED_LAYOUT.size} ids"):
        read_published(published, tmp_path / "never")
    monkeypatch.setattr(published_names, "PUBLISHED_LAYOUT", layout)
    assert read_published(published, tmp_path / "again").lineage == manifest.lineage
    wrong = VocabLayout(layout.num_text, layout.num_vq - 1, layout.num_merges, 0, 1)
    (published / LAYOUT_FILE).write_text(json.dumps(wrong.to_dict()))
    with pytest.raises(
        InputError, match=f"its VQ-GAN has 16 codes, its vocabulary 15; put the right {LAYOUT_FILE}"
    ):
        read_published(published, tmp_path / "never")
    assert not (tmp_path / "never").exists()


def test_other_folders_are_refused(tmp_path, base):
    with pytest.raises(InputError, match=r"has no weights model\.vqmodel\."):
        read_published(base, tmp_path / "never")
    write_published(base, tmp_path / "published")
    config = json.loads((tmp_path / "published" / "config.json").read_text())
    del config["vq_config"]
    (tmp_path / "published" / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="has no key 'vq_config'"):
        read_published(tmp_path / "published", tmp_path / "never")
    shutil.copytree(base, tmp_path / "blind")
    shutil.rmtree(tmp_path / "blind" / "vqgan")
    with pytest.raises(InputError, match="has no vqgan/"):
        write_published(tmp_path / "blind", tmp_path / "never")
    assert not (tmp_path / "never").exists()
