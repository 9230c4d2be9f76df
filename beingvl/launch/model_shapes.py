"""A model's shape without its weights: from its folder, from a config.json, or from a name.

find_shape      resolves `beingvl plan --model`
SHAPES          known names, with the numbers from their published config.json
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, LlamaConfig

from beingvl.artefact.manifest import read_manifest
from beingvl.errors import InputError
from beingvl.model.base_model import open_config
from beingvl.model.extended_vocab import build_packed_model
from beingvl.model.start_model import find_start_model
from beingvl.published_form import refuse_published
from beingvl.vocab import LAYOUT_FILE, VocabLayout

NEW_ROWS = VocabLayout(1, 8192, 8192, bos_id=0, eos_id=0).num_visual
"""New vocabulary rows of a base that is not converted yet: specials, codes, merges as published."""
COLUMNS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "max_position_embeddings",
)
SHAPES = {
    "llama3.1-8b": (4096, 14336, 32, 32, 8, 128256, 131072),
    "llama3.1-70b": (8192, 28672, 80, 64, 8, 128256, 131072),
    "llama3.2-1b": (2048, 8192, 16, 32, 8, 128256, 131072),
    "llama3.2-3b": (3072, 8192, 28, 24, 8, 128256, 131072),
    "llama2-7b": (4096, 11008, 32, 32, 32, 32000, 4096),
    "smollm2-135m": (576, 1536, 30, 9, 3, 49152, 8192),
    "smollm2-360m": (960, 2560, 32, 15, 5, 49152, 8192),
    "smollm2-1.7b": (2048, 8192, 24, 32, 32, 49152, 8192),
}


@dataclass(frozen=True)
class ModelShape:
    """`config` is the converted model's: its vocabulary includes the new rows."""

    config: Any
    num_text: int

    @property
    def model_class(self) -> Any:
        return MODEL_FOR_CAUSAL_LM_MAPPING[type(self.config)]

    @cached_property
    def parameters(self) -> Mapping[str, tuple[int, ...]]:
        """Shapes by name, with text and visual rows split as in training."""
        num_visual = self.config.vocab_size - self.num_text
        with torch.device("meta"):
            built = build_packed_model(
                self.model_class, self.config, self.num_text, num_visual, 1, False
            )
        named = built.causal_lm.named_parameters()
        return {name: tuple(parameter.shape) for name, parameter in named}


def find_shape(model: Path | str) -> ModelShape:
    """The shape of a model folder, a stage folder, an unconverted model's folder or config.json, or
    a name in `SHAPES`; an unconverted model gets `NEW_ROWS`. Raises InputError for anything else.
    """
    if str(model) in SHAPES and not Path(model).exists():
        return named_shape(str(model))
    path = find_start_model(Path(model))
    refuse_published(path)
    if (path / LAYOUT_FILE).exists():
        read_manifest(path, "model")
        return ModelShape(
            open_config(path),
            VocabLayout.load(path).num_text,
        )
    if not (path.is_file() or (path / "config.json").is_file()):
        raise InputError(
            f"--model {model} is neither a model folder nor a config.json, and no known shape: "
            f"{', '.join(SHAPES)}"
        )
    config = open_config(path)
    try:
        return _with_new_rows(config, config.vocab_size)
    except AttributeError as error:
        raise InputError(f"{path} is not the config.json of a language model: {error}") from error


def named_shape(name: str) -> ModelShape:
    config = LlamaConfig(**dict(zip(COLUMNS, SHAPES[name], strict=True)))
    return _with_new_rows(config, config.vocab_size)


def _with_new_rows(config: Any, num_text: int) -> ModelShape:
    config.vocab_size = num_text + NEW_ROWS
    return ModelShape(config, num_text)
