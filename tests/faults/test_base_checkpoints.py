"""Base checkpoints with something left in them: it is cleared and said, or refused by name."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from beingvl.data.conversation import TextEncoder, build_sequence, open_tokenizer
from beingvl.vocab import SPECIAL_TOKENS, VocabLayout
from tests.command import beingvl
from tests.damage import list_anew
from tests.model.small_models import TEXTS, write_base_model, write_vqgan

TRUNCATION = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
PADDING = {
    "strategy": {"Fixed": 64},
    "direction": "Right",
    "pad_to_multiple_of": None,
    "pad_id": 5,
    "pad_type_id": 0,
    "pad_token": "x",
}


@pytest.fixture(scope="module")
def vq(tmp_path_factory):
    return write_vqgan(tmp_path_factory.mktemp("vq") / "vq")


def convert(llama: Path, base: Path, vq: Path, **options: object) -> int:
    return beingvl(
        "convert",
        llama_path=llama,
        being_vq_path=vq,
        num_merges=2,
        output_path=base,
        verify_loading=True,
        **options,
    )


def change(path: Path, **fields: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"truncation": TRUNCATION}, "truncation in tokenizer.json would change texts: left out"),
        ({"padding": PADDING}, "padding in tokenizer.json would change texts: left out"),
    ],
)
def test_truncation_and_padding_left_in_the_tokenizer(tmp_path, vq, fields, said, capsys):
    llama, base = write_base_model(tmp_path / "llama"), tmp_path / "base"
    whole = [open_tokenizer(llama).encode(text).ids for text in TEXTS]
    change(llama / "tokenizer.json", **fields)
    assert convert(llama, base, vq) == 0
    assert said in capsys.readouterr().out
    converted = json.loads((base / "tokenizer.json").read_text())
    assert converted["truncation"] is None and converted["padding"] is None
    settings = json.loads((base / "tokenizer_config.json").read_text())
    assert not {"max_length", "truncation_strategy", "padding_side"} & set(settings)
    assert [open_tokenizer(base).encode(text).ids for text in TEXTS] == whole

    change(base / "tokenizer.json", **fields)  # a folder converted before this was known
    list_anew(base)
    assert [open_tokenizer(base).encode(text).ids for text in TEXTS] == whole


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("config", "config.json has quantization_config (fp8)"),
        ("float8", "'model.layers.0.mlp.up_proj.weight' is F8_E4M3"),
        ("int8", "'model.layers.0.mlp.up_proj.weight' is I8"),
        ("scales", "the weights have 'model.layers.0.mlp.up_proj.weight_scale_inv'"),
    ],
)
def test_quantised_weights(tmp_path, vq, damage, message, capsys):
    llama = write_base_model(tmp_path / "llama")
    if damage == "config":
        change(llama / "config.json", quantization_config={"quant_method": "fp8"})
    else:
        tensors = load_file(llama / "model.safetensors")
        name = "model.layers.0.mlp.up_proj.weight"
        dtype = {"float8": torch.float8_e4m3fn, "int8": torch.int8}.get(damage, torch.float32)
        tensors[name] = tensors[name].to(dtype)
        if damage == "scales":
            tensors[f"{name}_scale_inv"] = torch.ones(1, 1)
        save_file(tensors, llama / "model.safetensors", metadata={"format": "pt"})
    assert convert(llama, tmp_path / "base", vq) == 2
    error = capsys.readouterr().err
    assert f"{llama} is quantised: {message}; give the checkpoint in bfloat16" in error
    assert not (tmp_path / "base").exists()


def test_a_base_with_our_token_names(tmp_path, vq, capsys):
    """It keeps its tokens; the new ones have other names, also where a template spells them."""
    plain, llama = (write_base_model(tmp_path / name) for name in ("plain", "llama"))
    tokenizer = AutoTokenizer.from_pretrained(llama)
    taken = [*SPECIAL_TOKENS[:4], "<vbpe00001>"]
    tokenizer.add_special_tokens({"pad_token": "<pad>", "additional_special_tokens": taken[1:]})
    model = AutoModelForCausalLM.from_pretrained(llama)
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(llama)
    tokenizer.save_pretrained(llama)
    assert convert(plain, tmp_path / "plain_base", vq) == 0
    assert convert(llama, tmp_path / "base", vq) == 0
    shown = capsys.readouterr().out
    assert f"{llama} has 5 of the new tokens' names already: <pad> is now <|being_pad|>" in shown

    converted = AutoTokenizer.from_pretrained(tmp_path / "base")
    layout = VocabLayout.load(tmp_path / "base")
    assert layout.num_text == 305
    assert converted.convert_tokens_to_ids(taken) == list(range(300, 305))
    names = converted.convert_ids_to_tokens(range(layout.num_text, layout.size))
    assert names[:6] == [
        *("<|being_pad|>", "<|being_reserved08706|>", "<|being_eoss|>", "<|being_image|>"),
        *("<racm3:break>", "IMGIMGAAAAAAZ"),
    ]
    assert names[-2:] == ["<vbpe00000>", "<|being_vbpe00001|>"]
    assert converted.pad_token_id == layout.pad_id

    for template in ("default", "being-vl-0.5"):
        ours, theirs = (sequence(tmp_path / name, template) for name in ("base", "plain_base"))
        moved = [token + 5 if token >= 300 else token for token in theirs]
        assert ours == moved and layout.eoi_id in ours and layout.sep_id in ours


def sequence(base: Path, template: str) -> list[int]:
    layout = VocabLayout.load(base)
    turns = [("<image>What is this?", "seven"), ("And two times three?", "six")]
    image = layout.image_to_token_ids(np.arange(4))
    return build_sequence(turns, [image], TextEncoder(base, layout), layout, template).input_ids


def test_a_chat_template_is_kept_under_another_name_than_ours(tmp_path, vq, capsys):
    llama, base = write_base_model(tmp_path / "llama"), tmp_path / "base"
    (llama / "chat_template.jinja").write_text("own: {{ messages[0].content }}")
    assert convert(llama, base, vq) == 0
    assert "its own chat template is kept as 'base'" in capsys.readouterr().out
    assert "chat_template" not in (base / "tokenizer_config.json").read_text()
    tokenizer = AutoTokenizer.from_pretrained(base)
    asked = [{"role": "user", "content": "hi"}]
    own, ours = (
        tokenizer.apply_chat_template(asked, chat_template=name, tokenize=False)
        for name in ("base", None)
    )
    assert own == "own: hi" and ours == "<|begin|>hi<reserved08706>"


def test_the_pad_token_is_the_new_one_everywhere(tmp_path, vq):
    llama, base = write_base_model(tmp_path / "llama"), tmp_path / "base"
    change(llama / "config.json", pad_token_id=7)
    change(llama / "generation_config.json", pad_token_id=7)
    assert convert(llama, base, vq) == 0
    for name in ("config.json", "generation_config.json"):
        assert json.loads((base / name).read_text())["pad_token_id"] == 300
    assert AutoTokenizer.from_pretrained(base).pad_token_id == 300


def test_a_converted_model_is_not_converted_again(tmp_path, vq, capsys):
    llama, base = write_base_model(tmp_path / "llama"), tmp_path / "base"
    assert convert(llama, base, vq) == 0
    assert convert(base, tmp_path / "again", vq) == 2
    assert f"{base} is a Being-VL model folder already" in capsys.readouterr().err
