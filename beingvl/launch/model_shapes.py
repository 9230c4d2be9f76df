"""A model's shape without its weights: from its folder, from a config.json, or from a name."""

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
from beingvl.launch.known_shapes import COLUMNS, SHAPES, folder_of
from beingvl.model.base_model import open_config
from beingvl.model.extended_vocab import build_packed_model
from beingvl.vocab import LAYOUT_FILE, VocabLayout

NEW_ROWS = VocabLayout(1, 8192, 8192, bos_id=0, eos_id=0).num_visual
"""New vocabulary rows of a base that is not converted yet: specials, codes, merges as published."""


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
    """The shape of what `--model` means (known_shapes.py); an unconverted model gets `NEW_ROWS`.
    Raises InputError for anything else.
    """
    path = folder_of(model)
    if path is None:
        return named_shape(str(model))
    if (path / LAYOUT_FILE).exists():
        read_manifest(path, "model")
        return ModelShape(
            open_config(path),
            VocabLayout.load(path).num_text,
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
