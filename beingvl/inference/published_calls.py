"""Being-VL-0.5's Python calls that `BeingVL` handles differently."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

from beingvl.errors import InputError

TOKENIZE = "`beingvl.tokenize(json_path, model_path, output_path, …)` tokenizes a data set to files"
REPLACED = {
    "processor": "`tokenize(prompt, image)` makes token ids, `decode_answer(token_ids)` a text",
    "load_data": TOKENIZE,
    "batch_tokenize_": TOKENIZE,
    "tokenize_result": TOKENIZE,
    "save_tokenize_result": TOKENIZE,
}


def missing(name: str) -> AttributeError:
    """The error for an attribute that `BeingVL` does not have."""
    said = f"BeingVL has no attribute {name!r}"
    for published, instead in REPLACED.items():
        if name == published or (published.endswith("_") and name.startswith(published)):
            return AttributeError(f"{said}: {instead}")
    return AttributeError(said)


class SaysWhatReplaces(type):
    """Metaclass: a missing published method raises the same error on the class as on objects."""

    def __getattr__(cls, name: str) -> NoReturn:
        raise missing(name)


def positional(first: Any) -> InputError:
    """The error for `load_model`'s arguments in their published order."""
    return InputError(
        f"load_model({first!r}, …): expected a dtype and a device; give Being-VL-0.5's arguments "
        "by name: load_model(model_path=…, vbpe_path=…, torch_dtype=…)"
    )


def device_of(device_map: Any) -> Any:
    """transformers' `device_map` as one device; None for None and "auto".

    Raises InputError for a map that spreads a model over several devices.
    """
    places = list(device_map.values()) if isinstance(device_map, Mapping) else [device_map]
    if len(set(map(str, places))) != 1 or places[0] in ("balanced", "balanced_low_0", "sequential"):
        raise InputError(
            f"device_map is {device_map!r}, but a BeingVL runs on one device; leave it out, or "
            "name one"
        )
    place = places[0]
    if place in (None, "auto"):
        return None
    return f"cuda:{place}" if isinstance(place, int) else place
