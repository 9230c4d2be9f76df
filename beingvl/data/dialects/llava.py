"""LLaVA, our own format: `id, image, category, conversations` with turns from human and gpt."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def from_llava(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record unchanged; tokenizing it reports what is wrong with it."""
    return dict(record)
