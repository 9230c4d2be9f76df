"""DeepSpeed-native training of Being-VL: one language model that reads images as tokens.

Every step is a function of this package (docs/reference/python-api.md). `import beingvl` loads
nothing heavy: names are imported on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from beingvl.errors import InputError
from beingvl.inference.auto_processor import register_now_or_later
from beingvl.version import __version__

if TYPE_CHECKING:
    from beingvl.data.build_shards import build_shards
    from beingvl.data.tokenize_dataset import tokenize
    from beingvl.evaluation.evaluate import evaluate
    from beingvl.images.encode_images import encode_images
    from beingvl.inference.model import BeingVL
    from beingvl.inference.processor import BeingVLProcessor
    from beingvl.model.convert_llama import convert
    from beingvl.train.export_hf import export
    from beingvl.train.train_stage import train
    from beingvl.vbpe.train_vbpe import train_vbpe
    from beingvl.vbpe.visual_bpe import VisualBPE

__all__ = [
    "BeingVL",
    "BeingVLProcessor",
    "InputError",
    "VisualBPE",
    "__version__",
    "build_shards",
    "convert",
    "encode_images",
    "evaluate",
    "export",
    "tokenize",
    "train",
    "train_vbpe",
]
_HOMES = {
    "BeingVL": "beingvl.inference.model",
    "BeingVLProcessor": "beingvl.inference.processor",
    "VisualBPE": "beingvl.vbpe.visual_bpe",
    "build_shards": "beingvl.data.build_shards",
    "convert": "beingvl.model.convert_llama",
    "encode_images": "beingvl.images.encode_images",
    "evaluate": "beingvl.evaluation.evaluate",
    "export": "beingvl.train.export_hf",
    "tokenize": "beingvl.data.tokenize_dataset",
    "train_vbpe": "beingvl.vbpe.train_vbpe",
}
_PUBLISHED = {"vBPE": "VisualBPE"}  # Being-VL-0.5's name for it
register_now_or_later()


def __getattr__(name: str) -> Any:
    if name == "train":  # the package, which is callable and named like its function
        return importlib.import_module("beingvl.train")
    name = _PUBLISHED.get(name, name)
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
