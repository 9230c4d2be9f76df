"""`beingvl convert --being_tokenizer_config_path`: the published folder as it is."""

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from beingvl.images.vqgan import VQGAN
from beingvl.vocab import VocabLayout
from tests.command import beingvl
from tests.model.small_models import write_base_model, write_llama3_base
from tests.upstream import artefacts
from tests.upstream.artefacts import REAL


def convert(folder: Path, llama: Path, **options: object) -> int:
    folders = {
        "being_tokenizer_config_path": folder / "tokenizer",
        "being_vq_path": folder / "vq",
        "output_path": folder / "base",
    }
    return beingvl("convert", llama_path=llama, **folders | options)


@pytest.fixture
def published(tmp_path) -> Path:
    artefacts.write_tokenizer(tmp_path / "tokenizer")
    artefacts.write_vqgan(tmp_path / "vq")
    return tmp_path


def change(path: Path, **fields: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.slow
def test_the_guides_first_command_at_full_size(tmp_path):
    artefacts.write_tokenizer(tmp_path / "tokenizer", REAL)
    llama = write_llama3_base(tmp_path / "llama", hidden_size=8)
    options = {"vocab_size": 128256, "extended_vocab_size": 16389, "verify_loading": True}
    assert convert(tmp_path, llama, being_vq_path=None, **options) == 0
    assert VocabLayout.load(tmp_path / "base") == REAL
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    named = {128261: "IMGIMGAAAAAAZ", 136453: "IMGIMGBDGEFDZ", 144644: "IMGIMGBEEGEEZ"}
    assert tokenizer.convert_ids_to_tokens(list(named)) == list(named.values())


def test_the_image_processor_beside_the_tokenizer(published, capsys):
    llama = write_base_model(published / "llama")
    settings = artefacts.preprocessor_fields() | {"rescale_factor": 0.004}
    change(published / "tokenizer" / "preprocessor_config.json", **settings)
    assert convert(published, llama, num_merges=8, verify_loading=True) == 0
    inside = published / "base" / "vqgan"
    assert json.loads((inside / "preprocessor_config.json").read_text()) == settings
    assert VQGAN.load(inside).processor.rescale_factor == 0.004
    assert VQGAN.load(inside).fingerprint() != VQGAN.load(published / "vq").fingerprint()

    # where the VQ-GAN has its own, both must agree
    own = published / "vq" / "preprocessor_config.json"
    own.write_text(json.dumps(artefacts.preprocessor_fields()))
    never = {"num_merges": 8, "output_path": published / "never"}
    assert convert(published, llama, **never) == 2
    given = published / "tokenizer" / "preprocessor_config.json"
    expected = f"{own} says rescale_factor 0.0078, {given} says 0.004; remove the one"
    assert expected in capsys.readouterr().err
    assert not (published / "never").exists()
    change(given, **artefacts.preprocessor_fields())
    assert convert(published, llama, **never) == 0


def test_a_tokenizer_of_another_vocabulary(published, capsys):
    llama = write_base_model(published / "llama")
    artefacts.write_tokenizer(published / "tokenizer", VocabLayout(310, 16, 8, 308, 309))
    assert convert(published, llama, num_merges=8) == 2
    assert "token id 300 is " in capsys.readouterr().err
    artefacts.write_tokenizer(published / "tokenizer")
    assert convert(published, llama, num_merges=9) == 2
    assert "token id 329 is None" in capsys.readouterr().err
    change(published / "tokenizer" / "config.json", vocabulary_map={"IMGIMGAAAAAAZ": 4})
    assert convert(published, llama, num_merges=8) == 2
    expected = "vocabulary_map gives 'IMGIMGAAAAAAZ' id 4, the tokenizer beside it 305"
    assert expected in capsys.readouterr().err
    assert not (published / "base").exists()
