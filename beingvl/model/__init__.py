from typing import Any


def __getattr__(name: str) -> Any:
    if name in ("BeingVL", "vBPE"):
        # Being-VL-0.5 has them here; they stand above this room, which must not load them.
        import beingvl

        return getattr(beingvl, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
