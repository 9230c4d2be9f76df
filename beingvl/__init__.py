"""DeepSpeed-native training of Being-VL: one language model that reads VQ-GAN codes merged by a
2-D byte-pair encoding.

The steps are functions of this package, `BeingVL` answers questions with a trained model. Each is
imported when it is first used: `import beingvl` alone loads no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from beingvl.version import __version__

if TYPE_CHECKING:
    from beingvl.evaluation.evaluate import evaluate
    from beingvl.inference.model import BeingVL

__all__ = ["BeingVL", "__version__", "evaluate"]
_HOMES = {
    "BeingVL": "beingvl.inference.model",
    "evaluate": "beingvl.evaluation.evaluate",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
