"""Training: one stage from a start model and shards to checkpoints and `final/`.

The package shares the name of its main function: `from beingvl import train` gives the package, and
calling it calls `beingvl.train.train_stage.train`; see there for the arguments.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any


class _Train(ModuleType):
    def __call__(self, *args: Any, **options: Any) -> Any:
        return importlib.import_module("beingvl.train.train_stage").train(*args, **options)


sys.modules[__name__].__class__ = _Train
