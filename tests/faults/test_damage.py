"""A flipped bit in what a step reads never reaches what it writes."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from beingvl.artefact.manifest import write_manifest
from beingvl.errors import InputError
from beingvl.images.vqgan import VQGAN
from beingvl.train.checkpoint import rank_file
from beingvl.train.checkpoint_folders import complete_checkpoints
from beingvl.train.hf_folder import write_hf_folder
from beingvl.train.stage_run import open_stage
from beingvl.vbpe.train_vbpe import train_vbpe
from tests.code_folder import write_codes
from tests.command import beingvl
from tests.damage import flip_bit
from tests.launcher import log_of, run, run_alone
from tests.model.small_models import write_base_model, write_vqgan
from tests.tiny import LAYOUT, stage_fields, write_inputs, write_model

# ---- training ----


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """Inputs, and a run of two ranks that was killed before `final/`, with two checkpoints."""
    work = write_inputs(tmp_path_factory.mktemp("damage"), all=stage_fields(keep_last=2))
    inputs = work / "all.json", work / "base", work / "shards"
    assert run(2, *inputs, work / "stage") == 0, log_of(work / "stage")
    shutil.rmtree(work / "stage" / "final")
    return work


@pytest.fixture
def stage(tmp_path, work) -> Path:
    return Path(shutil.copytree(work / "stage", tmp_path / "stage"))


def test_a_damaged_start_model_is_not_trained(work, tmp_path) -> None:
    model, output = tmp_path / "base", tmp_path / "stage"
    shutil.copytree(work / "base", model)
    flip_bit(model / "model.safetensors", -1)
    assert run(2, work / "all.json", model, work / "shards", output) != 0
    said = f"{model / 'model.safetensors'} does not have the hash that manifest.json says"
    assert log_of(output).count(said) == 2  # by both ranks, though one has read it
    assert "Traceback" not in log_of(output) and not complete_checkpoints(output)


def test_a_run_does_not_go_on_from_damaged_slices(work, stage) -> None:
    older, newest = complete_checkpoints(stage)
    path = newest / rank_file(1, 2)
    flip_bit(path, path.stat().st_size // 2)
    done = run_alone(work, stage)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert f"{path} is missing or damaged: it does not have the hash" in done.stderr
    assert f"remove {newest} to continue from {older.name}" in done.stderr
    assert not (stage / "final").exists()


@pytest.mark.parametrize("name", [rank_file(0, 2), rank_file(1, 2), "state.json"])
def test_damaged_slices_do_not_reach_final(work, stage, name) -> None:
    newest = complete_checkpoints(stage)[-1]
    flip_bit(newest / name, -1)
    with pytest.raises(InputError, match=rf"{name} is missing or damaged: it does not have"):
        write_hf_folder(work / "base", newest, stage / "final")
    assert not (stage / "final").exists()


@pytest.mark.parametrize("name", ["model.safetensors", "generation_config.json"])
def test_a_start_model_that_was_damaged_during_the_run_does_not_reach_final(
    work, stage, tmp_path, name
) -> None:
    model = Path(shutil.copytree(work / "base", tmp_path / "base"))
    flip_bit(model / name, -1)
    with pytest.raises(InputError, match=rf"{model / name} does not have the hash"):
        write_hf_folder(model, complete_checkpoints(stage)[-1], stage / "final")
    assert not (stage / "final" / "manifest.json").exists()


# ---- answers and scores ----


@pytest.mark.parametrize(
    "command, options",
    [
        ("generate", {"prompt": "Which?"}),
        ("evaluate", {"data": "shards", "output_path": "scores"}),
        ("evaluate", {"text_parity": "base", "output_path": "scores"}),
    ],
)
def test_damaged_weights_neither_answer_nor_are_scored(
    work, tmp_path, monkeypatch, capsys, command, options
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("base", "shards"):
        (tmp_path / name).symlink_to(work / name)
    model = Path(shutil.copytree(work / "base", tmp_path / "model"))
    flip_bit(model / "model.safetensors", -1)
    assert beingvl(command, model=model, **options) == 2
    said = capsys.readouterr().err
    assert f"{model / 'model.safetensors'} does not have the hash that manifest.json says" in said
    assert not (tmp_path / "scores" / "manifest.json").exists()


# ---- small files, and the VQ-GAN ----


def flip_in(path: Path, text: bytes) -> None:
    """In the last byte of the first `text`."""
    flip_bit(path, path.read_bytes().index(text) + len(text) - 1)


CHANGED = "does not have the hash that manifest.json says"
EPSILON = b'"rms_norm_eps": 1'


def test_another_config_neither_answers_nor_is_trained(work, tmp_path, capsys) -> None:
    model = Path(shutil.copytree(work / "base", tmp_path / "base"))
    flip_in(model / "config.json", EPSILON)
    assert beingvl("generate", model=model, prompt="Which?") == 2
    assert f"{model / 'config.json'} {CHANGED}" in capsys.readouterr().err
    with pytest.raises(InputError, match=rf"{model / 'config.json'} {CHANGED}"):
        open_stage(model, work / "shards", tmp_path / "o", work / "all.json", (), None, None, False)


def test_samples_of_another_source_are_not_trained(work, tmp_path) -> None:
    shards = Path(shutil.copytree(work / "shards", tmp_path / "shards"))
    flip_bit(shards / "source_of.npy", -1)
    with pytest.raises(InputError, match=rf"{shards / 'source_of.npy'} {CHANGED}"):
        open_stage(work / "base", shards, tmp_path / "o", work / "all.json", (), None, None, False)


def test_another_vocabulary_is_not_converted(tmp_path, capsys) -> None:
    write_base_model(tmp_path / "llama", "llama")
    write_manifest(tmp_path / "llama", "model", {}, {})
    flip_in(tmp_path / "llama" / "tokenizer.json", b'"A": ')
    assert beingvl("convert", llama_path=tmp_path / "llama", output=tmp_path / "base") == 2
    assert f"{tmp_path / 'llama' / 'tokenizer.json'} {CHANGED}" in capsys.readouterr().err
    assert not (tmp_path / "base").exists()


@pytest.mark.parametrize(
    "name, text",
    [
        ("config.json", b'"num_res_blocks": 1'),
        ("model.safetensors", b"\0"),
        ("preprocessor_config.json", b'"image_mean": [\n    0.5'),
    ],
)
def test_a_damaged_vqgan_neither_encodes_nor_is_converted(tmp_path, capsys, name, text) -> None:
    write_base_model(tmp_path / "llama", "llama")
    vqgan, images = write_vqgan(tmp_path / "vqgan"), tmp_path / "images"
    images.mkdir()
    Image.new("RGB", (16, 16)).save(images / "1.png")
    assert beingvl("encode-images", image_path=images, vqgan=vqgan, output=tmp_path / "good") == 0
    flip_in(vqgan / name, text)
    capsys.readouterr()
    assert beingvl("encode-images", image_path=images, vqgan=vqgan, output=tmp_path / "codes") == 2
    assert f"{vqgan / name} {CHANGED}" in capsys.readouterr().err
    llama = tmp_path / "llama"
    assert beingvl("convert", llama_path=llama, vqgan=vqgan, output=tmp_path / "base") == 2
    assert f"{vqgan / name} {CHANGED}" in capsys.readouterr().err
    assert not (tmp_path / "codes" / "manifest.json").exists()
    assert not (tmp_path / "base").exists()


def test_the_damaged_vqgan_inside_a_model_is_not_used(tmp_path) -> None:
    """Its own folder has no manifest if the converted one had none."""
    write_base_model(tmp_path / "llama", "llama")
    (write_vqgan(tmp_path / "vqgan") / "manifest.json").unlink()
    base = tmp_path / "base"
    options = {"llama_path": tmp_path / "llama", "vqgan": tmp_path / "vqgan", "num_merges": 4}
    assert beingvl("convert", output=base, **options) == 0
    flip_bit(base / "vqgan" / "model.safetensors", -1)
    with pytest.raises(InputError, match=rf"{base / 'vqgan' / 'model.safetensors'} {CHANGED}"):
        VQGAN.load(base / "vqgan")


# ---- codes, and token rows ----


@pytest.fixture
def codes(tmp_path) -> Path:
    """Beside it `base/`, `rows.json` of its 200 images, and `vbpe.json`."""
    write_model(tmp_path / "base")
    rows = []
    for number in range(200):
        turns = [{"from": "human", "value": "Which?"}, {"from": "gpt", "value": "That."}]
        rows.append({"id": number, "image": f"{number:03}.png", "conversations": turns})
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    grids = np.random.default_rng(0).integers(0, LAYOUT.num_vq, (200, 4, 4))
    keys = [row["image"] for row in rows]
    folder = write_codes(tmp_path / "codes", grids.astype(np.uint16), LAYOUT.num_vq, {}, keys)
    train_vbpe(folder, tmp_path / "vbpe.json", num_merges=5)
    return folder


def tokenized(codes: Path) -> int:
    where = {"model_path": codes.parent / "base", "output_dir": codes.parent / "out"}
    rows = {"json_path": codes.parent / "rows.json", "vbpe_path": codes.parent / "vbpe.json"}
    return beingvl("tokenize", **rows, **where, vq_codes=codes)


def test_another_vocabulary_does_not_tokenize(codes, capsys) -> None:
    path = codes.parent / "base" / "tokenizer.json"
    flip_in(path, b'"A": 3')
    assert tokenized(codes) == 2
    assert f"{path} {CHANGED}" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["codes.npy", "code_hashes.npy"])
def test_a_bit_of_one_image_ends_tokenize_and_names_the_folder(codes, capsys, name) -> None:
    flip_bit(codes / name, -24)
    assert tokenized(codes) == 2
    said = capsys.readouterr().err
    assert f"{codes / 'codes.npy'} is damaged (row 19" in said and "encode-images" in said
    assert not (codes.parent / "out" / "manifest.json").exists()


def test_a_key_that_became_another_ends_tokenize(codes, capsys) -> None:
    flip_bit(codes / "keys.jsonl", -7)  # 199.png is 198.png now, which appears twice
    assert tokenized(codes) == 2
    found = "does not have the hash that manifest.json says"
    assert f"{codes / 'keys.jsonl'} {found}" in capsys.readouterr().err


def test_images_that_no_row_names_are_not_looked_at(codes) -> None:
    rows = json.loads((codes.parent / "rows.json").read_text())[:50]
    (codes.parent / "rows.json").write_text(json.dumps(rows))
    flip_bit(codes / "codes.npy", -1)
    assert tokenized(codes) == 0


def test_no_vocabulary_is_learnt_from_damaged_codes(codes, capsys) -> None:
    flip_bit(codes / "codes.npy", -1)
    options = {"output_path": codes.parent / "other.json", "num_merges": 5}
    assert beingvl("train-vbpe", data_path=codes, **options) == 2
    assert f"{codes / 'codes.npy'} changed after it was written" in capsys.readouterr().err
    assert not (codes.parent / "other.json").exists()


def test_damaged_token_rows_do_not_become_shards(codes, capsys) -> None:
    assert tokenized(codes) == 0
    path = codes.parent / "out" / "data_base.jsonl"
    at = path.read_bytes().index(b"[2") + 2
    flip_bit(path, at)  # another id, which is as good as any
    assert beingvl("build-shards", jsonl_path=path, output_path=codes.parent / "shards") == 2
    assert f"{path} does not have the hash that manifest.json says" in capsys.readouterr().err
    assert not (codes.parent / "shards").exists()
