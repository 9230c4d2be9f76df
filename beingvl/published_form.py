"""Distinguish model folders in the published form of Being-VL-0.5 from ours and Chameleon's.
model/published_names.py translates between the forms.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from beingvl.errors import InputError
from beingvl.json_file import read_object

PUBLISHED_MODEL_TYPE = "chameleon"
VQ_CONFIG_KEY = "vq_config"
LAYOUT_FILE = "vocab_layout.json"


def is_published(folder: Path | str) -> bool:
    """Whether the folder's weights hold a Being-VL model and its VQ-GAN: config.json is
    Chameleon's or, as an earlier version of ours wrote it, a LLaMA's with a VQ-GAN, beside our
    layout file.

    Raises InputError for Chameleon itself.
    """
    path = Path(folder) / "config.json"
    config = read_object(path, "download it again") if path.is_file() else {}
    if VQ_CONFIG_KEY not in config:
        return False
    if config.get("model_type") != PUBLISHED_MODEL_TYPE:
        return (path.parent / LAYOUT_FILE).is_file()
    if not _images_stand_last(config.get("vocabulary_map")):
        raise chameleon_error(folder)
    return True


def _images_stand_last(vocabulary: Any) -> bool:
    """Whether all ids after the first image token are image tokens; Chameleon's come before its
    text. Also True if this is not a vocabulary; the import refuses that.
    """
    if not isinstance(vocabulary, Mapping):
        return True
    ids = {token: number for token, number in vocabulary.items() if type(number) is int}
    images = [number for token, number in ids.items() if token.startswith("IMGIMG")]
    return not images or len(images) == max(ids.values()) - min(images) + 1


def chameleon_error(folder: Path | str) -> InputError:
    """The error for Chameleon itself and for models trained from it."""
    return InputError(
        f"{folder} is a Chameleon model: it normalises queries and keys, and its image codes are "
        "ids inside the text vocabulary (4 … 8195), which no stock LLaMA with its image ids "
        "behind the text can hold; start from a LLaMA"
    )


def refuse_published(folder: Path | str, part: str = "") -> None:
    """Raises InputError naming the command that imports a published folder, and the `part` of its
    result to use instead.
    """
    if is_published(folder):
        raise InputError(
            f"{folder} is in the published form of Being-VL-0.5; import it with "
            f"`beingvl export --model {folder} --output NEW_FOLDER` and give NEW_FOLDER{part}"
        )
