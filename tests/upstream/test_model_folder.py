"""A published model folder: imported, used, trained, exported again; and what is refused."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from beingvl.artefact.manifest import read_manifest
from beingvl.images.vqgan import VQGAN
from beingvl.model.weight_files import WeightFolder
from beingvl.vocab import VocabLayout
from tests.command import beingvl
from tests.launcher import ENVIRONMENT, PYTHON, stage_words
from tests.model.small_models import LLAMA3_ROPE, make_tokenizer, write_base_model
from tests.tiny import stage_fields, write_shards
from tests.upstream import artefacts
from tests.upstream.artefacts import PREFIX, TINY

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> Path:
    return artefacts.write_model(tmp_path_factory.mktemp("published") / "model")


@pytest.fixture(scope="module")
def imported(published) -> Path:
    folder = published.parent / "base"
    assert beingvl("export", model=published, output_path=folder) == 0
    return folder


def fields(path: Path) -> dict:
    return json.loads(path.read_text())


def change(path: Path, **changed: object) -> None:
    path.write_text(json.dumps(fields(path) | changed))


def plain_llama(published: Path) -> LlamaForCausalLM:
    """The published language model, its config mapped by hand."""
    config = fields(published / "config.json")
    sizes = {key: config[key] for key in LlamaConfig().to_dict().keys() & config.keys()}
    rope = {"rope_type": "default", "rope_theta": config["rope_theta"]}
    sizes |= {"model_type": "llama", "rope_parameters": rope}
    model = LlamaForCausalLM(LlamaConfig.from_dict(sizes)).eval()
    weights = WeightFolder(published)
    model.load_state_dict({name: weights[name] for name in weights if PREFIX not in name})
    return model


def test_the_import_is_a_stock_folder(published, imported):
    assert beingvl("verify", imported) == 0
    manifest, layout = read_manifest(imported, "model"), VocabLayout.load(imported)
    assert layout == TINY and manifest.details == {"template": "being-vl-0.5"}
    model = AutoModelForCausalLM.from_pretrained(imported).eval()
    assert type(model) is LlamaForCausalLM and model.config.pad_token_id == TINY.pad_id
    prompt = torch.arange(TINY.size)[None]
    with torch.no_grad():
        assert torch.equal(model(prompt).logits, plain_llama(published)(prompt).logits)
    # its own names, and the decoder that no class here reads
    names = [artefacts.token_text(token_id, TINY) for token_id in range(300, TINY.size)]
    tokenizer = AutoTokenizer.from_pretrained(imported)
    assert tokenizer.convert_tokens_to_ids(names) == list(range(300, TINY.size))
    decoder = [name for name in WeightFolder(imported / "vqgan") if name.startswith("decoder.")]
    assert len(decoder) == artefacts.DECODER_TENSORS
    vqgan = VQGAN.load(imported / "vqgan")
    assert vqgan.grid == artefacts.GRID
    assert manifest.lineage == {"vocab": TINY.fingerprint(), "vqgan": vqgan.fingerprint()}


def test_it_answers(imported, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (16, 16, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    options = {"model": imported, "prompt": "What?", "image": tmp_path / "a.png", "raw": True}
    assert beingvl("generate", **options, max_new_tokens=3) == 0


def test_train_export_import(tmp_path, imported):
    (tmp_path / "all.json").write_text(json.dumps(stage_fields(max_steps=1)))
    turns = [("human", "<image>\nWhat is it?"), ("gpt", "seven")]
    row = {"image": "a.png", "conversations": [{"from": who, "value": text} for who, text in turns]}
    grids = np.random.default_rng(0).integers(0, TINY.num_vq, (8, *artefacts.GRID))
    rows, _ = artefacts.write_rows(tmp_path, "rows", [row] * len(grids), list(grids))
    shards = tmp_path / "shards"
    made = beingvl("build-shards", jsonl_path=rows, model_path=imported, output_path=shards)
    assert made == 0
    words = stage_words(tmp_path / "all.json", imported, shards, tmp_path / "stage")
    command = [*PYTHON, "-m", "beingvl", "train", *words]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    final, there, back = tmp_path / "stage" / "final", tmp_path / "there", tmp_path / "back"
    assert beingvl("export", model=final, format="being-vl-0.5", output_path=there) == 0
    assert beingvl("export", model=there, output_path=back) == 0
    for ours, theirs in ((back, final), (back / "vqgan", imported / "vqgan")):
        one, other = WeightFolder(ours), WeightFolder(theirs)
        assert set(one) == set(other)
        assert all(torch.equal(one[name], other[name]) for name in other)
    assert not torch.equal(
        WeightFolder(back)["lm_head.weight"], WeightFolder(imported)["lm_head.weight"]
    )
    prompt = torch.arange(100)[None]
    with torch.no_grad():
        ours = AutoModelForCausalLM.from_pretrained(back)(prompt).logits
        assert torch.equal(ours, plain_llama(there)(prompt).logits)
    assert fields(there / "config.json")["vocabulary_map"] == dict(
        AutoTokenizer.from_pretrained(imported).get_vocab()
    )
    details = [read_manifest(folder).details for folder in (back, final)]
    assert details[0] == details[1]


def test_commands_that_are_given_it_name_the_import(tmp_path, published, capsys):
    (tmp_path / "rows.json").write_text("[]")
    (tmp_path / "all.json").write_text(json.dumps(stage_fields()))
    Image.new("RGB", (16, 16)).save(tmp_path / "a.png")
    shards = write_shards(tmp_path / "shards", layout=TINY)
    never = {"output_path": tmp_path / "never"}
    rows = {"json_path": tmp_path / "rows.json", "output_dir": tmp_path / "never"}
    stage = {"stage": tmp_path / "all.json", "model": published, "gpus": "8x80GB"}
    for command, options in {
        "convert": {"llama_path": published, **never},
        "tokenize": {"model_path": published, **rows},
        "generate": {"model": published, "prompt": "What?"},
        "plan": stage,
        "encode-images": {"image_path": tmp_path, "vq_path": published, **never},
        "train": {
            "deepspeed_config": tmp_path / "all.json",
            "model": published,
            "data": shards,
            "output": tmp_path / "never",
        },
    }.items():
        assert beingvl(command, **options) == 2, command
        expected = f"import it with `beingvl export --model {published} --output NEW_FOLDER`"
        assert expected in capsys.readouterr().err, command

    assert beingvl("verify", published) == 2
    assert expected in capsys.readouterr().err

    script = ["bash", str(REPOSITORY / "scripts" / "train-stage-1.sh"), "0", str(published)]
    paths = {"DATA_PATH": str(shards), "OUTPUT_DIR": str(tmp_path / "never")}
    done = subprocess.run(script, env=os.environ | paths, capture_output=True, text=True)
    assert done.returncode == 2 and expected in done.stderr
    assert not (tmp_path / "never").exists()


@pytest.fixture
def copy(published, tmp_path) -> Path:
    return Path(shutil.copytree(published, tmp_path / "model"))


def refused(folder: Path, message: str, capsys) -> None:
    target = folder.parent / "never"
    assert beingvl("export", model=folder, output_path=target) == 2
    error = capsys.readouterr().err
    assert message in error, error
    assert not target.exists()


def test_other_tokenizers_and_contradictions(copy, capsys):
    change(copy / "config.json", vocabulary_map={"<eoss>": 7})
    refused(copy, "vocabulary_map gives '<eoss>' id 7, the tokenizer beside it 302", capsys)
    change(copy / "config.json", vocabulary_map=None, vocab_size=323)
    refused(copy, "has vocab_size 323, its tokenizer 329 tokens", capsys)
    change(copy / "config.json", vocab_size=TINY.size, hidden_size=64)
    refused(copy, "'model.embed_tokens.weight' is [329, 32], config.json says [329, 64]", capsys)
    vq_config = artefacts.vq_fields() | {"num_embeddings": 17}
    change(copy / "config.json", vq_config=vq_config, hidden_size=32)
    refused(copy, "quantize.embedding.weight has shape (16, 8), config.json says (17, 8)", capsys)
    change(copy / "config.json", vq_config=artefacts.vq_fields(), rope_scaling=LLAMA3_ROPE)
    refused(copy, "scales its rope by 'llama3', which the published class does not know", capsys)
    change(copy / "config.json", rope_scaling=None, hidden_act="none")
    refused(copy, "config.json is not usable (", capsys)
    change(copy / "config.json", hidden_act="silu", swin_norm=True)
    refused(copy, "has swin_norm True: it normalises after attention and MLP", capsys)
    change(copy / "config.json", swin_norm=False, boi_token_id=7)
    refused(copy, "has boi_token_id 7, the tokenizer beside it 304; take both from one", capsys)
    change(copy / "config.json", boi_token_id=TINY.boi_id, eos_token_id=[7, 8])
    refused(copy, "has eos_token_id [7, 8], the tokenizer beside it 299; take both", capsys)
    change(copy / "config.json", eos_token_id=[7, 299])
    tensors = load_file(copy / "model.safetensors")
    more = tensors | {"model.layers.0.self_attn.q_proj.bias": torch.ones(32)}
    save_file(more, copy / "model.safetensors", {"format": "pt"})
    refused(copy, "'model.layers.0.self_attn.q_proj.bias' is [32], config.json says None", capsys)
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    make_tokenizer().save_pretrained(copy)
    refused(copy, "its tokenizer has no 'IMGIMGAAAAAAZ', so it is not Being-VL's", capsys)
    (copy / "tokenizer.json").unlink()
    refused(copy, "has no tokenizer: expected one of tokenizer.json", capsys)


def test_a_model_without_merges(tmp_path):
    """`llama3+vqgan`: the layout follows from the tokenizer."""
    layout = VocabLayout(num_text=300, num_vq=16, num_merges=0, bos_id=298, eos_id=299)
    published = artefacts.write_model(tmp_path / "model", layout)
    assert beingvl("export", model=published, output_path=tmp_path / "base") == 0
    assert VocabLayout.load(tmp_path / "base") == layout


def test_a_folder_without_a_manifest_is_of_the_published_template(published, imported, capsys):
    """Also an export of ours that lost it; a model that was trained otherwise says so."""
    folder = published.parent
    assert beingvl("export", model=published, output_path=folder / "told", template="default") == 0
    assert "trained on the template" not in capsys.readouterr().out
    assert read_manifest(folder / "told").details == {"template": "default"}
    there = {"model": folder / "told", "format": "being-vl-0.5", "output_path": folder / "there"}
    assert beingvl("export", **there) == 0
    assert beingvl("export", **there, template="default") == 2  # of an import only
    (folder / "there" / "manifest.json").unlink()
    assert beingvl("export", model=folder / "there", output_path=folder / "back") == 0
    assert "has no manifest.json, so it is taken to be trained on" in capsys.readouterr().out
    assert read_manifest(folder / "back").details == {"template": "being-vl-0.5"}


def test_other_folders_with_a_vqgan_are_not_published(copy, tmp_path, capsys):
    """Chameleon itself, whose image tokens stand in front of its text, and other architectures."""
    vocabulary = {"IMGIMGAAAAAAZ": 4, "IMGIMGAAAAABZ": 5, "text": 6}
    change(copy / "config.json", vocabulary_map=vocabulary)
    for command, options in {
        "generate": {"prompt": "What?"},
        "export": {"output_path": tmp_path / "never"},
    }.items():
        assert beingvl(command, model=copy, **options) == 2
        error = capsys.readouterr().err
        assert "is a Chameleon model: it normalises" in error and "import it" not in error
    change(copy / "config.json", model_type="janus")
    assert beingvl("generate", model=copy, prompt="What?") == 2
    assert "has no vocab_layout.json: it is not a Being-VL model folder" in capsys.readouterr().err


def test_chameleon_is_refused(copy, tmp_path, capsys):
    """`chameleon+8k`: its base, and what was trained from it."""
    tensors = load_file(copy / "model.safetensors")
    tensors["model.layers.0.self_attn.q_norm.weight"] = torch.ones(4, 8)
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    message = "is a Chameleon model: it normalises queries and keys, and its image codes are ids"
    refused(copy, message, capsys)
    assert beingvl("convert", llama_path=copy, output_path=tmp_path / "never") == 2
    assert message in capsys.readouterr().err and not (tmp_path / "never").exists()


def test_what_is_neither_ours_nor_published(tmp_path, capsys):
    llama = write_base_model(tmp_path / "llama")
    refused(llama, "it is not a Being-VL model folder; make one with `beingvl convert`", capsys)
