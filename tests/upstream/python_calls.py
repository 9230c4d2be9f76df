"""The rows of docs/how-to/coming-from-being-vl-0.5.md that are called from Python, for `CHECKS`."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch

from beingvl.errors import InputError
from beingvl.inference.model import BeingVL
from beingvl.vbpe.visual_bpe import VisualBPE
from tests.upstream.calls import ONE_SENTENCE, WORD_FOR_WORD, row
from tests.upstream.world import SIZES, World

QUESTION = "What is it?"


@cache
def model_of(world: World) -> BeingVL:
    paths = {"model_path": str(world.base), "vbpe_path": str(world.vbpe)}
    return BeingVL(**paths, device_map="cpu")


def image_of(world: World) -> str:
    return str(world.images / "0.png")


@row("from beingvl import BeingVL, vBPE", "from beingvl.model import BeingVL, vBPE")
def imports(world: World) -> str:
    for module in ("beingvl", "beingvl.model"):
        names: dict[str, object] = {}
        exec(f"from {module} import BeingVL, vBPE", names)
        assert names["BeingVL"] is BeingVL and names["vBPE"] is VisualBPE
    return WORD_FOR_WORD


@row("BeingVL(model_path=…, vbpe_path=…, device_map=…)")
def constructor(world: World) -> str:
    """Also for a stage folder."""
    assert model_of(world).model.device == torch.device("cpu")
    stage = world.folder / "stage-of-python"
    stage.mkdir()
    (stage / "final").symlink_to(world.base)
    paths = {"model_path": str(stage), "vbpe_path": str(world.pickle)}
    for device_map in ("auto", {"": "cpu"}, torch.device("cpu"), None):
        assert BeingVL(**paths, device_map=device_map).model_path == stage / "final"
    for device_map in ("balanced", {"model": 0, "lm_head": 1}):
        with pytest.raises(InputError, match="a BeingVL runs on one device; leave it out"):
            BeingVL(**paths, device_map=device_map)
    return WORD_FOR_WORD


@row("load_model(…)")
def load_model(world: World) -> str:
    """All arguments as they are; those of another model or layout are refused."""
    model = model_of(world)
    sizes = {"vbpe_init_size": SIZES["init_size"], "vbpe_vocab_pad": SIZES["vocab_pad"]}
    sizes["vbpe_vocab_end"] = SIZES["vocab_end"]
    paths = {"model_path": str(world.base), "vbpe_path": str(world.pickle)}
    more = {"torch_dtype": torch.bfloat16, "flash_attn": True}
    assert model.load_model(**paths, **sizes, **more) is model
    assert model.model.dtype == torch.bfloat16 and model.vbpe.kind != VisualBPE.kind
    model.load_model(vbpe_path=str(world.vbpe), torch_dtype="float32")
    assert model.vbpe == VisualBPE.load(world.vbpe)
    for wrong, sentence in (
        ({"model_path": "elsewhere"}, "for elsewhere create a new BeingVL"),
        ({"vbpe_init_size": 8192}, "--vbpe_init_size is 8192, the model's layout has"),
        ({"vbpe_vocab_end": 7}, "do not fit the model's layout"),
    ):
        with pytest.raises(InputError, match=sentence):
            model.load_model(**wrong)
    with pytest.raises(InputError, match="arguments by name"):
        model.load_model(str(world.base), str(world.pickle))
    return WORD_FOR_WORD


@row("generate_with_vbpe", "generate_vq")
def generate(world: World) -> str:
    model, asked = model_of(world), ([QUESTION], [image_of(world)], 4)
    [answer] = model.generate_with_vbpe(*asked)
    assert isinstance(answer, str) and model.generate_vq(*asked) == [answer]
    return WORD_FOR_WORD


@row("img2tok")
def image_to_tokens(world: World) -> str:
    model = model_of(world)
    [token_ids] = model.img2tok([image_of(world)])
    assert model.layout.is_image_token(token_ids).all()
    return WORD_FOR_WORD


@row("tok2img")
def tokens_to_image(world: World) -> str:
    """The published decoder is not one that transformers has."""
    model = model_of(world)
    with pytest.raises(InputError, match="has no decoder"):
        model.tok2img(model.img2tok([image_of(world)]))
    return ONE_SENTENCE


@row("model.model.eval()")
def evaluation_mode(world: World) -> str:
    assert not model_of(world).model.eval().training
    return WORD_FOR_WORD


@row("processor")
def processor(world: World) -> str:
    for called in (model_of(world), BeingVL):
        with pytest.raises(AttributeError, match=r"'processor': `tokenize\(prompt, image\)` makes"):
            _ = called.processor
    return ONE_SENTENCE


@row("load_data", "batch_tokenize_*", "tokenize_result", "save_tokenize_result")
def tokenizing(world: World) -> str:
    names = ("load_data", "batch_tokenize_", "batch_tokenize_pt", "tokenize_result")
    for name in (*names, "save_tokenize_result"):
        for called in (model_of(world), BeingVL):
            with pytest.raises(AttributeError, match=rf"'{name}': `beingvl.tokenize\("):
                getattr(called, name)
    assert not hasattr(model_of(world), "batch_token") and not hasattr(BeingVL, "batch_token")
    return ONE_SENTENCE


@row("torch_dtype of load_model")
def default_type(world: World) -> str:
    """Of the checkpoint on an accelerator, float32 on a CPU."""
    from beingvl.inference.reading import dtype_of

    folder = world.folder / "of-bfloat16"
    folder.mkdir()
    (folder / "config.json").write_text('{"dtype": "bfloat16"}')
    assert dtype_of(folder, None, torch.device("cuda")) == torch.bfloat16
    assert dtype_of(Path(world.base), None, torch.device("cpu")) == torch.float32
    return WORD_FOR_WORD
