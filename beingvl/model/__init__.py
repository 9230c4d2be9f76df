from typing import Any


def __getattr__(name: str) -> Any:
    if name in ("BeingVL", "vBPE"):
        # Being-VL-0.5 has them here; ours are in packages that this one must not import.
        import beingvl

        return getattr(beingvl, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
