"""Writers of each published Being-VL-0.5 artefact, from facts about them alone.

    write_tokenizer   being-tokenizer-config/   tokenizer and image processor, merges named by id
    write_vqgan       being-vq-8k/              VQ-GAN, its decoder not Janus'; no processor
    write_pickle      vbpe.pkl                  a list of ((token1, token2), new_token)
    write_rows        NAME_base.jsonl and NAME_vbpe.jsonl
    write_model       a model folder: config `chameleon`, weights, all files of the tokenizer folder

Everything takes a layout: TINY, over the tokenizer of `tests.model.small_models` (so that its base
models fit), or REAL, the published 144,645 ids over Llama-3's own tokenizer. Hidden sizes are
always tiny.
"""

from __future__ import annotations

import json
import pickle
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer
from transformers import ChameleonVQVAE, ChameleonVQVAEConfig, LlamaConfig, LlamaForCausalLM

from beingvl.model.tokenizer_files import load_tokenizer
from beingvl.vbpe.published import encode_legacy_reference
from beingvl.vocab import SPECIAL_TOKENS, VocabLayout
from tests.model.small_models import llama3_tokenizer_file, make_tokenizer

REAL = VocabLayout(num_text=128256, num_vq=8192, num_merges=8192, bos_id=128000, eos_id=128001)
TINY = VocabLayout(num_text=300, num_vq=16, num_merges=8, bos_id=298, eos_id=299)
MERGES = ((1, 2), (3, 3), (16, 5))  # image ids of TINY; the third uses the first
IMAGE_SIZE, GRID = 16, (4, 4)
DECODER_TENSORS = 86
PREFIX = "model.vqmodel."
Turns = Sequence[tuple[str, str]]


# ---- tokenizer folder ----


def token_text(token_id: int, layout: VocabLayout) -> str:
    """Published text of a new token: codes are named by code, merges by their own id."""
    if token_id < layout.first_image_id:
        return SPECIAL_TOKENS[token_id - layout.num_text]
    number = token_id - layout.first_image_id if token_id < layout.first_vbpe_id else token_id
    return "IMGIMG" + f"{number:06d}".translate(str.maketrans("0123456789", "ABCDEFGHIJ")) + "Z"


@cache
def tokenizer_text(layout: VocabLayout) -> str:
    """tokenizer.json as tokenizers 0.19 writes it: merges of the text are strings."""
    tokenizer = Tokenizer.from_str(_base_tokenizer(layout).backend_tokenizer.to_str())
    texts = [token_text(token_id, layout) for token_id in range(layout.num_text, layout.size)]
    specials = len(SPECIAL_TOKENS)
    tokenizer.add_tokens(
        [AddedToken(text, special=True, normalized=False) for text in texts[:specials]]
        + [AddedToken(text, normalized=False) for text in texts[specials:]]
    )
    fields = json.loads(tokenizer.to_str())
    fields["model"]["merges"] = [" ".join(pair) for pair in fields["model"]["merges"]]
    return json.dumps(fields, ensure_ascii=False)


def _base_tokenizer(layout: VocabLayout) -> Any:
    if layout.num_text != REAL.num_text:
        return make_tokenizer(layout.num_text)
    with tempfile.TemporaryDirectory() as folder:
        shutil.copyfile(llama3_tokenizer_file(), Path(folder) / "tokenizer.model")
        return load_tokenizer(folder)


def write_tokenizer(folder: Path, layout: VocabLayout = TINY, image_size: int = IMAGE_SIZE) -> Path:
    """`being-tokenizer-config`, with the image processor's settings."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = _base_tokenizer(layout)
    tokens = {
        "bos_token": tokenizer.bos_token,
        "eos_token": tokenizer.eos_token,
        "pad_token": SPECIAL_TOKENS[0],
    }
    ids = {"bos_token_id": layout.bos_id, "eos_token_id": layout.eos_id}
    (folder / "tokenizer.json").write_text(tokenizer_text(layout), encoding="utf-8")
    _write(folder / "special_tokens_map.json", tokens)
    _write(
        folder / "tokenizer_config.json",
        {
            **tokens,
            "clean_up_tokenization_spaces": False,
            "model_max_length": 131072,
            "processor_class": "ChameleonProcessor",
            "tokenizer_class": "PreTrainedTokenizerFast",
        },
    )
    _write(folder / "config.json", {"model_type": "chameleon", "vocab_size": layout.size, **ids})
    _write(folder / "generation_config.json", {**ids, "transformers_version": "4.45.0.dev0"})
    _write(folder / "preprocessor_config.json", preprocessor_fields(image_size))
    _write(
        folder / "processor_config.json",
        {
            "image_seq_length": GRID[0] * GRID[1],
            "image_token": "<image>",
            "processor_class": "ChameleonProcessor",
        },
    )
    return folder


def preprocessor_fields(image_size: int = IMAGE_SIZE) -> dict[str, Any]:
    """Chameleon's image processor."""
    return {
        "crop_size": {"height": image_size, "width": image_size},
        "do_center_crop": True,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [1.0, 1.0, 1.0],
        "image_processor_type": "ChameleonImageProcessor",
        "image_std": [1.0, 1.0, 1.0],
        "processor_class": "ChameleonProcessor",
        "resample": 1,
        "rescale_factor": 0.0078,
        "size": {"shortest_edge": image_size},
    }


# ---- VQ-GAN ----


def vq_fields(layout: VocabLayout = TINY) -> dict[str, Any]:
    """`vq_config` of a VQ-GAN whose grid is a quarter of its picture."""
    return {
        "model_type": "chameleon_vqgan",
        "attn_resolutions": None,
        "attn_type": "vanilla",
        "base_channels": 32,
        "channel_multiplier": [1, 1, 2],
        "double_latent": False,
        "dropout": 0.0,
        "embed_dim": 8,
        "in_channels": 3,
        "initializer_range": 0.02,
        "latent_channels": 32,
        "num_embeddings": layout.num_vq,
        "num_res_blocks": 1,
        "resolution": IMAGE_SIZE,
    }


def vq_tensors(layout: VocabLayout = TINY, seed: int = 0) -> dict[str, torch.Tensor]:
    """Encoder, code book and both convolutions as transformers has them, and a decoder."""
    torch.manual_seed(seed)
    model = ChameleonVQVAE(ChameleonVQVAEConfig.from_dict(vq_fields(layout)))
    shapes = _decoder_shapes()
    assert len(shapes) == DECODER_TENSORS, len(shapes)
    decoder = {f"decoder.{name}": torch.randn(shape) * 0.02 for name, shape in shapes.items()}
    return model.state_dict() | decoder


def _decoder_shapes() -> dict[str, tuple[int, ...]]:
    """Weights and biases of the decoder that mirrors the encoder: 32 -> 64 … 64 -> 32 -> 3."""
    layers: dict[str, tuple[int, ...]] = {"conv_in": (64, 32, 3, 3)}
    for name in ("mid.block_1", "mid.block_2"):
        layers |= _block(name, 64, 64)
    layers["mid.attn_1.norm"] = (64,)
    layers |= {f"mid.attn_1.{name}": (64, 64, 1, 1) for name in ("q", "k", "v", "proj_out")}
    for level, (before, after) in enumerate(((32, 32), (64, 32), (64, 64))):
        layers |= _block(f"up.{level}.block.0", before, after)
        layers |= _block(f"up.{level}.block.1", after, after)
        if level:
            layers[f"up.{level}.upsample.conv"] = (after, after, 3, 3)
    layers |= {"norm_out": (32,), "conv_out": (3, 32, 3, 3)}
    weights = {f"{name}.weight": shape for name, shape in layers.items()}
    return weights | {f"{name}.bias": shape[:1] for name, shape in layers.items()}


def _block(name: str, before: int, after: int) -> dict[str, tuple[int, ...]]:
    """A residual block; where the number of channels changes it has a shortcut."""
    layers: dict[str, tuple[int, ...]] = {
        f"{name}.norm1": (before,),
        f"{name}.conv1": (after, before, 3, 3),
        f"{name}.norm2": (after,),
        f"{name}.conv2": (after, after, 3, 3),
    }
    if before != after:
        layers[f"{name}.nin_shortcut"] = (after, before, 1, 1)
    return layers


def write_vqgan(folder: Path, layout: VocabLayout = TINY, seed: int = 0) -> Path:
    """`being-vq-8k`; its preprocessing is in the tokenizer folder."""
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / "config.json", vq_fields(layout))
    save_file(vq_tensors(layout, seed), folder / "model.safetensors", {"format": "pt"})
    return folder


# ---- vBPE ----


def write_pickle(
    path: Path,
    layout: VocabLayout = TINY,
    merges: Sequence[tuple[int, int]] = MERGES,
    vocab_pad: int = 0,
) -> Path:
    """`vbpe.pkl` of merges of image ids; its tokens are image ids + `vocab_pad`."""
    first = layout.num_vq + vocab_pad
    entries = [
        ((one + vocab_pad, two + vocab_pad), first + rank) for rank, (one, two) in enumerate(merges)
    ]
    path.write_bytes(pickle.dumps(entries))
    return path


# ---- rows ----


def write_rows(
    folder: Path,
    name: str,
    rows: Sequence[Mapping[str, Any]],
    grids: Sequence[np.ndarray],
    layout: VocabLayout = TINY,
    merges: Sequence[tuple[int, int]] | None = MERGES,
) -> tuple[Path, Path]:
    """`NAME_base.jsonl` and, with `merges`, `NAME_vbpe.jsonl` of LLaVA rows and their codes
    `[h, w]`; rows without an image are dropped.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer.from_str(tokenizer_text(layout))
    base, merged = [], []
    pictured = [row for row in rows if row.get("image")]
    for row, grid in zip(pictured, grids, strict=True):
        text = published_text(turns_of(row))
        image = [layout.first_image_id + int(code) for code in grid.ravel()]
        fields = {
            "image": row["image"],
            "original": dict(row),
            "token_0": [layout.bos_id, layout.boi_id],
            "token_1": tokenizer.encode(text, add_special_tokens=False).ids,
            "token_image": image,
        }
        base.append(fields)
        if merges is not None:
            ids = encode_legacy_reference(grid, layout.num_vq, merges)
            merged.append(fields | {"token_image_new": [layout.first_image_id + i for i in ids]})
    paths = folder / f"{name}_base.jsonl", folder / f"{name}_vbpe.jsonl"
    for path, content in zip(paths, (base, merged), strict=True):
        if content:
            path.write_text("".join(json.dumps(one, ensure_ascii=False) + "\n" for one in content))
    return paths


def turns_of(row: Mapping[str, Any]) -> list[tuple[str, str]]:
    values = [entry["value"] for entry in row["conversations"]]
    return list(zip(values[::2], values[1::2], strict=True))


def published_text(turns: Turns) -> str:
    """What stands behind the image. Only the first question is cleaned; `</s>` is plain text."""
    (first, answer), *others = turns
    text = f"<eoss>{first.replace('<image>', '').strip()} {answer}</s>"
    return text + "".join(f"<reserved08706>{question} {said}</s>" for question, said in others)


def published_prompt(question: str) -> str:
    """What a model trained so expects behind the image: no `sep`, and it stops at `</s>`."""
    return f"<eoss>{question.replace('<image>', '').strip()} "


# ---- model folder ----


def model_fields(layout: VocabLayout, config: LlamaConfig) -> dict[str, Any]:
    """config.json of a model folder; its rope is plain."""
    same = (
        *("attention_bias", "attention_dropout", "hidden_act", "hidden_size", "initializer_range"),
        *("intermediate_size", "max_position_embeddings", "mlp_bias", "num_attention_heads"),
        *("num_hidden_layers", "num_key_value_heads", "rms_norm_eps", "use_cache", "vocab_size"),
    )
    return {
        "architectures": ["ChameleonForConditionalGeneration"],
        "model_type": "chameleon",
        **{name: getattr(config, name) for name in same},
        "bos_token_id": layout.bos_id,
        "eos_token_id": layout.eos_id,
        "pad_token_id": layout.pad_id,
        "boi_token_id": layout.boi_id,
        "eoi_token_id": layout.eoi_id,
        "image_token_id": layout.image_placeholder_id,
        "rope_scaling": None,
        "rope_theta": 500000.0,
        "swin_norm": False,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "transformers_version": "4.45.0.dev0",
        "vocabulary_map": Tokenizer.from_str(tokenizer_text(layout)).get_vocab(),
        "vq_config": vq_fields(layout),
    }


def write_model(
    folder: Path,
    layout: VocabLayout = TINY,
    hidden_size: int = 32,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Path:
    """A random published model; its language model's weights are a LLaMA's, name by name."""
    write_tokenizer(folder, layout)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=layout.size,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        tie_word_embeddings=False,
    )
    tensors = LlamaForCausalLM(config).state_dict()
    tensors |= {PREFIX + name: tensor for name, tensor in vq_tensors(layout, seed).items()}
    tensors = {name: tensor.to(dtype).contiguous() for name, tensor in tensors.items()}
    fields = model_fields(layout, config) | {"torch_dtype": str(dtype).removeprefix("torch.")}
    _write(folder / "config.json", fields)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def _write(path: Path, fields: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(fields, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
