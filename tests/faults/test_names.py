"""Names that files give: nothing outside of their folder is read, written or removed."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from beingvl.artefact.manifest import MANIFEST_FILE, read_manifest, start_folder, write_manifest
from beingvl.errors import InputError
from beingvl.inference.reading import read_model
from beingvl.model.tokenizer_files import load_tokenizer
from beingvl.model.weight_files import WeightFolder
from tests.command import beingvl
from tests.damage import change_manifest
from tests.model.small_models import make_tokenizer, write_base_model, write_vqgan
from tests.tiny import stage_fields, write_inputs

PAYLOAD = "../payload"


@pytest.fixture
def work(tmp_path) -> Path:
    write_inputs(tmp_path, stage=stage_fields())
    (tmp_path / "payload").write_text("mine")
    return tmp_path


def list_payload(folder: Path, name: str = PAYLOAD) -> None:
    files = json.loads((folder / MANIFEST_FILE).read_text())["files"]
    change_manifest(folder, files={**files, name: next(iter(files.values()))})


def set_fields(path: Path, **fields: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_a_downloaded_model_makes_training_write_nothing_beside_final(work, capsys) -> None:
    list_payload(work / "base")
    paths = {"model": work / "base", "data": work / "shards", "output": work / "run" / "stage"}
    assert beingvl("train", deepspeed_config=work / "stage.json", **paths) == 2
    said = capsys.readouterr().err
    assert f"base/{MANIFEST_FILE} names the file '{PAYLOAD}'" in said and said.count("\n") == 1
    assert not (work / "run").exists() and (work / "payload").read_text() == "mine"


def test_overwriting_a_downloaded_folder_removes_nothing_beside_it(work, capsys) -> None:
    list_payload(work / "base")
    llama = write_base_model(work / "llama", "llama", "single")
    paths = {"llama_path": llama, "output_path": work / "base", "num_merges": 0}
    assert beingvl("convert", **paths, overwrite=True) == 2
    assert f"names the file '{PAYLOAD}'" in capsys.readouterr().err
    assert (work / "payload").read_text() == "mine" and (work / "base" / "config.json").is_file()


def test_a_link_out_of_a_folder_is_not_followed(work, capsys) -> None:
    (work / "outside").mkdir()
    (work / "outside" / "kept").write_text("mine")
    (work / "base" / "sub").symlink_to(work / "outside")
    list_payload(work / "base", "sub/kept")
    assert beingvl("verify", work / "base") == 2
    assert f"sub/kept leads out of {work / 'base'}" in capsys.readouterr().err
    with pytest.raises(InputError, match=r"sub/kept leads out of"):
        start_folder(work / "base", "model")
    assert (work / "outside" / "kept").read_text() == "mine"
    assert read_manifest(work / "base").kind == "model"  # nothing was removed before


@pytest.mark.parametrize("name", ["../payload.safetensors", "/{}/payload.safetensors", "out"])
def test_an_index_of_weights_reads_no_file_beside_its_folder(work, name) -> None:
    folder = work / "llama"
    write_base_model(folder, "llama", "sharded")
    shutil.copy(work / "base" / "model.safetensors", work / "payload.safetensors")
    (folder / "out").symlink_to(work / "payload.safetensors")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"] = dict.fromkeys(index["weight_map"], name.format(work))
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match=r"names the file|leads out of"):
        WeightFolder(folder)


@pytest.mark.parametrize(
    "key, name",
    [
        ("fast_tokenizer_files", ["../tokenizer.4.0.0.json"]),
        ("gguf_file", "../tokenizer.4.0.0.json"),
        ("vocab_file", "{}/tokenizer.4.0.0.json"),
        ("tokenizer_file", "link"),
    ],
)
def test_the_config_of_a_tokenizer_reads_no_file_beside_its_folder(tmp_path, key, name) -> None:
    folder = write_base_model(tmp_path / "llama")
    set_fields(folder / "tokenizer_config.json", vocab_file="/of/another/machine/vocab.json")
    assert len(load_tokenizer(folder)) == 300
    make_tokenizer(290).backend_tokenizer.save(str(tmp_path / "tokenizer.4.0.0.json"))
    (folder / "link").symlink_to(tmp_path / "tokenizer.4.0.0.json")
    value = name.format(tmp_path) if isinstance(name, str) else name
    set_fields(folder / "tokenizer_config.json", **{key: value})
    with pytest.raises(InputError, match=r"names the file|leads out of"):
        load_tokenizer(folder)


def test_weights_of_a_name_that_only_transformers_knows_are_refused(tmp_path) -> None:
    folder = write_base_model(tmp_path / "llama")
    set_fields(folder / "config.json", transformers_weights="../payload.safetensors")
    with pytest.raises(
        InputError, match=r"rename that file to model.safetensors and remove the key"
    ):
        WeightFolder(folder)


def test_code_that_a_config_names_is_not_run(tmp_path) -> None:
    """Its classes are ones that transformers knows, so it has its own."""
    folder = write_base_model(tmp_path / "llama")
    (folder / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    classes = ("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer")
    for file in ("config.json", "tokenizer_config.json"):
        set_fields(folder / file, auto_map=dict.fromkeys(classes, "code.Anything"))
    set_fields(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["code.A", "code.B"]})
    assert len(load_tokenizer(folder)) == 300
    assert read_model(folder, torch.float32, torch.device("cpu")).config.model_type == "llama"
    assert not (tmp_path / "ran").exists()


def test_a_file_of_a_vqgan_that_is_a_link_to_a_secret_is_not_copied(tmp_path, capsys) -> None:
    vqgan = write_vqgan(tmp_path / "vq")
    (tmp_path / "secret").write_text("mine")
    (vqgan / "notes.txt").symlink_to(tmp_path / "secret")
    llama = write_base_model(tmp_path / "llama", "llama", "single")
    paths = {"llama_path": llama, "being_vq_path": vqgan, "output_path": tmp_path / "base"}
    assert beingvl("convert", **paths, num_merges=0) == 2
    assert "notes.txt leads out of" in capsys.readouterr().err
    assert not (tmp_path / "base" / "vqgan" / "notes.txt").exists()


def test_a_manifest_lists_no_name_that_it_would_not_read(tmp_path) -> None:
    (tmp_path / "folder" / "a..b").mkdir(parents=True)
    (tmp_path / "folder" / "a..b" / "..c").write_text("fine")
    write_manifest(tmp_path / "folder", "shards", {}, {})
    assert list(read_manifest(tmp_path / "folder").files) == ["a..b/..c"]
