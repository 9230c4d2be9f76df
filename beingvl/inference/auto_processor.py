"""`import beingvl` makes BeingVLProcessor known to transformers' AutoProcessor, and stays light.

AutoProcessor finds a processor by its class name, which the model folder's tokenizer_config.json
holds. What is registered is a stand-in of that name, which imports the processor on first use, as
soon as transformers' module of AutoProcessor is imported: now, or by the import hook below.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

AUTO = "transformers.models.auto.processing_auto"


class BeingVLProcessor:
    @classmethod
    def from_pretrained(cls, *args: Any, **options: Any) -> Any:
        home = importlib.import_module("beingvl.inference.processor")
        return home.BeingVLProcessor.from_pretrained(*args, **options)


def register(auto: ModuleType) -> None:
    # The key is the class of a config, which no model of ours has.
    auto.AutoProcessor.register(BeingVLProcessor, BeingVLProcessor, exist_ok=True)


class RegistersAfterImport:
    """The import hook. It looks at AUTO alone and leaves finding it to Python."""

    @staticmethod
    def find_spec(
        name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path, target) if name == AUTO else None
        if spec and spec.loader:
            load = spec.loader.exec_module

            def load_and_register(module: ModuleType) -> None:
                load(module)
                register(module)

            spec.loader.exec_module = load_and_register  # type: ignore[method-assign]
        return spec


def register_now_or_later() -> None:
    if AUTO in sys.modules:
        register(sys.modules[AUTO])
    else:
        sys.meta_path.insert(0, RegistersAfterImport)
