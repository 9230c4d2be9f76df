"""DeepSpeed-native training of Being-VL: one language model that reads VQ-GAN codes merged by a
2-D byte-pair encoding.

`from beingvl import BeingVL` answers questions with a trained model; `import beingvl` alone loads
no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from beingvl.version import __version__

if TYPE_CHECKING:
    from beingvl.inference.model import BeingVL

__all__ = ["BeingVL", "__version__"]


def __getattr__(name: str) -> Any:
    if name == "BeingVL":
        from beingvl.inference.model import BeingVL

        return BeingVL
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
