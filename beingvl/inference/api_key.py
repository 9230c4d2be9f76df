"""The key of `beingvl serve --api`. Does not import torch: a wrong file is reported at once."""

from __future__ import annotations

import os
from pathlib import Path

from beingvl.errors import InputError

KEY = "BEINGVL_API_KEY"


def read_key(path: Path | None) -> str | None:
    """The key that requests must send, from a file or the variable BEINGVL_API_KEY; never shown.
    Raises InputError for one that cannot be a key.
    """
    try:
        key = os.environ.get(KEY) if path is None else path.read_text(encoding="ascii").strip()
    except (OSError, ValueError) as error:  # the argument may be the key itself: do not print it
        raise InputError("--api_key is not a readable file of ASCII; put the key in one") from error
    if path is None and not key:
        return None
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        raise InputError("the API key is empty, or not printable ASCII without spaces")
    return key
