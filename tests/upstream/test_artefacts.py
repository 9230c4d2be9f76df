"""The writers write what the facts about the published artefacts say, at both sizes."""

import json

import numpy as np
import pytest
from safetensors import safe_open
from tokenizers import Tokenizer

from beingvl.images.vqgan import VQGAN
from beingvl.vbpe.published import import_published
from tests.upstream import artefacts
from tests.upstream.artefacts import REAL, TINY

FILES = {
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "config.json"),
    *("generation_config.json", "preprocessor_config.json", "processor_config.json"),
}
ROW = {
    "image": "a.png",
    "conversations": [
        {"from": "human", "value": "<image>\n What is it? "},
        {"from": "gpt", "value": "Seven."},
        {"from": "human", "value": " And <image>? "},
        {"from": "gpt", "value": "Six."},
    ],
}


def test_merges_are_named_by_their_ids():
    names = {128261: "AAAAAA", 128271: "AAAABA", 136453: "BDGEFD", 144644: "BEEGEE"}
    for token_id, letters in names.items():
        assert artefacts.token_text(token_id, REAL) == f"IMGIMG{letters}Z"
    assert artefacts.token_text(128260, REAL) == "<racm3:break>"


def test_rows(tmp_path):
    grid = np.arange(16).reshape(4, 4) % 4
    base, vbpe = artefacts.write_rows(tmp_path, "data", [ROW, {**ROW, "image": None}], [grid])
    (row,) = map(json.loads, vbpe.read_text().splitlines())
    published = ["image", "original", "token_0", "token_1", "token_image"]
    assert list(json.loads(base.read_text())) == published
    assert list(row) == [*published, "token_image_new"]
    assert row["original"] == ROW and row["token_0"] == [TINY.bos_id, TINY.boi_id]
    assert row["token_1"][0] == TINY.eoi_id and TINY.eos_id not in row["token_1"]
    assert row["token_1"].count(TINY.sep_id) == 1
    assert row["token_1"].count(TINY.image_placeholder_id) == 1  # of the later question
    assert artefacts.published_text(artefacts.turns_of(ROW)) == (
        "<eoss>What is it? Seven.</s><reserved08706> And <image>?  Six.</s>"
    )
    assert len(row["token_image"]) == 16 > len(row["token_image_new"])


def test_vqgan_and_pickle(tmp_path):
    folder = artefacts.write_vqgan(tmp_path / "vq")
    (folder / "preprocessor_config.json").write_text(json.dumps(artefacts.preprocessor_fields()))
    assert VQGAN.load(folder).grid == artefacts.GRID
    merges = artefacts.write_pickle(tmp_path / "vbpe.pkl", vocab_pad=300)
    assert import_published(merges, vocab_pad=300).merges.tolist() == [
        list(pair) for pair in artefacts.MERGES
    ]


@pytest.mark.parametrize("layout", [TINY, REAL])
def test_model_folder(tmp_path, layout):
    folder = artefacts.write_model(tmp_path, layout, hidden_size=16)
    assert {path.name for path in folder.iterdir()} == FILES | {"model.safetensors"}
    fields = json.loads((folder / "config.json").read_text())
    assert fields["model_type"] == "chameleon" and fields["vocab_size"] == layout.size
    with safe_open(folder / "model.safetensors", "pt") as weights:
        names = list(weights.keys())
    decoder = [name for name in names if name.startswith("model.vqmodel.decoder.")]
    assert len(decoder) == artefacts.DECODER_TENSORS and "lm_head.weight" in names

    text = (folder / "tokenizer.json").read_text()
    assert isinstance(json.loads(text)["model"]["merges"][0], str)
    tokenizer = Tokenizer.from_str(text)
    assert tokenizer.get_vocab_size() == layout.size
    for token_id in (layout.num_text, layout.first_image_id, layout.first_vbpe_id, layout.size - 1):
        token = artefacts.token_text(token_id, layout)
        assert tokenizer.id_to_token(token_id) == token
        assert fields["vocabulary_map"][token] == token_id
