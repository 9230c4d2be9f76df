"""The stand-in for Llama-3.1-8B: it learns its lines, loads as stock, and converts."""

import os
import stat
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from beingvl.artefact.manifest import verify_folder
from beingvl.commands.main import main as beingvl
from beingvl.vocab import VocabLayout

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))
import make_text_llama

LINES = [
    "Which digit is this? It is seven.",
    "Is seven even? No.",
    "Is two greater than four, or is it an even number?",
]
SIZES = "--vocab_size 300 --hidden_size 32 --num_layers 1 --steps 40 --sequence_length 24"
SMALL = SIZES.split()


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    (folder / "texts.txt").write_text("\n\n".join(LINES * 20))
    arguments = [
        "--texts",
        str(folder / "texts.txt"),
        "--output_path",
        str(folder / "llama"),
        *SMALL,
    ]
    assert make_text_llama.main(arguments) == 0
    return folder / "llama"


def test_it_is_a_stock_folder_that_has_learnt_something(llama):
    manifest = verify_folder(llama)
    assert manifest.kind == "model" and manifest.counts["loss"] < 3.0
    os.umask(umask := os.umask(0))
    assert {stat.S_IMODE(path.stat().st_mode) for path in llama.iterdir()} == {0o666 & ~umask}
    tokenizer = AutoTokenizer.from_pretrained(llama)
    model = AutoModelForCausalLM.from_pretrained(llama)
    assert model.config.vocab_size == len(tokenizer) == 300 and not model.config.tie_word_embeddings
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == 299
    ids = tokenizer(LINES[0])["input_ids"]
    assert ids[0] == tokenizer.bos_token_id == 298
    assert model(torch.tensor([ids]), labels=torch.tensor([ids])).loss < 3.5


def test_any_text_encodes_and_comes_back(llama):
    tokenizer = AutoTokenizer.from_pretrained(llama)
    for text in (*LINES, "naïve façade 日本語 🙂\n\ttab"):
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_it_converts(llama, tmp_path):
    assert (
        beingvl(
            [
                "convert",
                "--llama_path",
                str(llama),
                "--output_path",
                str(tmp_path / "base"),
                "--num_merges",
                "4",
            ]
        )
        == 0
    )
    layout = VocabLayout.load(tmp_path / "base")
    assert (layout.num_text, layout.bos_id, layout.eos_id) == (300, 298, 299)


def test_wrong_input_is_named(llama, tmp_path, capsys):
    texts = tmp_path / "texts.txt"
    arguments = ["--texts", str(texts), "--output_path", str(tmp_path / "out")]
    for content, extra, message in [
        (None, [], "is not a file"),
        (" \n", [], "holds no text"),
        ("a line", ["--vocab_size", "257"], "expected at least 258"),
        ("a line", ["--hidden_size", "48"], "expected a multiple of 32"),
        ("a line", ["--output_path", str(llama)], "is finished, but with different"),
    ]:
        if content is not None:
            texts.write_text(content)
        assert make_text_llama.main([*arguments, *extra]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
