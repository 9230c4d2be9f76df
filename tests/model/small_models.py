"""Small real base models and VQ-GANs for the converter's tests: every layout and family, made in
milliseconds.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    JanusVQVAE,
    JanusVQVAEConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    PhiConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from beingvl.images.vqgan import VQGAN, make_processor
from beingvl.vbpe.visual_bpe import VisualBPE

NUM_CODES = 16
TEXTS = [
    "Which digit is this? It is seven.",
    "What is two times three?",
    "Überprüfung: 3 × 4 = 12",
] * 4
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def make_tokenizer(vocab_size: int = 300) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with `vocab_size` ids; begin and end token are the last two."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(
        TEXTS,
        trainers.BpeTrainer(
            vocab_size=vocab_size - 2, initial_alphabet=alphabet, show_progress=False
        ),
    )
    tokenizer.add_special_tokens(["<|begin|>", "<|end|>"])
    bos = ("<|begin|>", tokenizer.token_to_id("<|begin|>"))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin|> $A", special_tokens=[bos]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|begin|>", eos_token="<|end|>"
    )


def family_config(family: str, vocab_size: int, bos_id: int, eos_id: int) -> Any:
    ids = {"vocab_size": vocab_size, "bos_token_id": bos_id, "eos_token_id": eos_id}
    if family == "llama":
        return LlamaConfig(**SIZES, **ids, tie_word_embeddings=False)
    if family == "llama3":
        return LlamaConfig(**SIZES, **ids, tie_word_embeddings=False, rope_parameters=LLAMA3_ROPE)
    if family == "tied":
        return LlamaConfig(**SIZES, **ids, tie_word_embeddings=True)
    if family == "mistral":
        return MistralConfig(**SIZES, **ids, tie_word_embeddings=False, sliding_window=16)
    if family == "qwen2":  # its embedding has more rows than its tokenizer has tokens
        return Qwen2Config(
            **SIZES, **ids | {"vocab_size": vocab_size + 20}, tie_word_embeddings=True
        )
    if family == "gemma2":
        return Gemma2Config(**SIZES, **ids, head_dim=8, tie_word_embeddings=True)
    if family == "phi":  # a head with a bias
        return PhiConfig(**SIZES | {"num_key_value_heads": 4}, **ids, tie_word_embeddings=False)
    assert family == "gpt2", family
    return GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=256, **ids)


def write_base_model(
    folder: Path, family: str = "llama", layout: str = "single", dtype: torch.dtype = torch.float32
) -> Path:
    """A random stock model folder with a tokenizer; `layout`: single | sharded | bin |
    sharded_bin.
    """
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    config = family_config(family, len(tokenizer), tokenizer.bos_token_id, tokenizer.eos_token_id)
    model = AutoModelForCausalLM.from_config(config).to(dtype)
    if getattr(model.get_output_embeddings(), "bias", None) is not None:
        torch.nn.init.normal_(model.get_output_embeddings().bias)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder, max_shard_size="30KB" if "sharded" in layout else "1GB")
    tokenizer.save_pretrained(folder)
    if layout.endswith("bin"):
        _to_bin(folder)
    return folder


def _to_bin(folder: Path) -> None:
    from safetensors.torch import load_file

    for path in sorted(folder.glob("*.safetensors")):
        name = path.stem.replace("model", "pytorch_model") + ".bin"
        torch.save(load_file(path), folder / name)
        path.unlink()
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        text = index.read_text().replace("model-", "pytorch_model-").replace(".safetensors", ".bin")
        assert json.loads(text)["weight_map"]
        (folder / "pytorch_model.bin.index.json").write_text(text)
        index.unlink()


def write_vqgan(folder: Path, seed: int = 0, num_codes: int = NUM_CODES) -> Path:
    """A random VQ-GAN with decoder: 16 x 16 px, 4 x 4 grid."""
    torch.manual_seed(seed)
    config = JanusVQVAEConfig(
        embed_dim=8,
        num_embeddings=num_codes,
        latent_channels=32,
        num_patches=4,
        base_channels=32,
        channel_multiplier=[1, 1, 1],
        num_res_blocks=1,
    )
    VQGAN(JanusVQVAE(config), make_processor(16)).save(folder)
    return folder


def write_vbpe(path: Path, vqgan_folder: Path) -> VisualBPE:
    """Three merges: two horizontal neighbours, two vertical ones, and an L of three cells."""
    merges = np.array([[1, 2, 0, 1], [3, 3, 1, 0], [16, 5, 1, 0]], np.int32)
    vbpe = VisualBPE(
        NUM_CODES, merges, lineage={"vqgan": VQGAN.load(vqgan_folder).fingerprint()}, grid=(4, 4)
    )
    vbpe.save(path)
    return vbpe


def write_sentencepiece_base(folder: Path) -> Path:
    """A random model with a `tokenizer.model` alone, as Llama-2 comes; begin is 1, end 2."""
    import sentencepiece

    write_base_model(folder, "llama")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS * 20),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=300,
        model_type="bpe",
        byte_fallback=True,
        minloglevel=2,
    )
    path = folder / "config.json"
    ids = {"bos_token_id": 1, "eos_token_id": 2}
    path.write_text(json.dumps(json.loads(path.read_text()) | ids))
    return folder


def llama3_tokenizer_file() -> Path:
    """The real Llama-3 `tokenizer.model`, from the package llama-models."""
    spec = importlib.util.find_spec("llama_models")
    assert spec is not None and spec.origin is not None, (
        "pip install llama-models (a test dependency)"
    )
    return Path(spec.origin).parent / "llama3" / "tokenizer.model"


def write_llama3_base(
    folder: Path, hidden_size: int, dtype: torch.dtype = torch.float32, num_layers: int = 2
) -> Path:
    """Tiny layers with the real Llama-3 tokenizer and its 128256 ids."""
    eos_ids = [128001, 128008, 128009]
    sizes = {"hidden_size": hidden_size, "intermediate_size": 2 * hidden_size}
    sizes |= {"num_hidden_layers": num_layers, "num_attention_heads": 2, "vocab_size": 128256}
    config = LlamaConfig(**sizes, bos_token_id=128000, eos_token_id=eos_ids)
    LlamaForCausalLM(config).to(dtype).save_pretrained(folder)
    shutil.copyfile(llama3_tokenizer_file(), folder / "tokenizer.model")
    return folder
