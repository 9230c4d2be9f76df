"""LLaVA: `id, image, category, conversations` with turns from human and gpt. Our own rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def from_llava(record: Mapping[str, Any]) -> dict[str, Any]:
    """As it is; what is wrong with it is said where it is tokenized."""
    return dict(record)
