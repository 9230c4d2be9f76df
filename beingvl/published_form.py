"""What tells a model folder in the published form of Being-VL-0.5 from ours and from Chameleon's,
and what to do with it. model/published_names.py translates the two.
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
    """Whether the folder's weights are those of a Being-VL and of its VQ-GAN: config.json is a
    Chameleon's, or, as we wrote it once, a LLaMA's with a VQ-GAN beside our layout.

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
    """Whether all tokens behind the first image token are image tokens: Chameleon's stand in front
    of its text. True of what is no vocabulary, which the import refuses.
    """
    if not isinstance(vocabulary, Mapping):
        return True
    ids = {token: number for token, number in vocabulary.items() if type(number) is int}
    images = [number for token, number in ids.items() if token.startswith("IMGIMG")]
    return not images or len(images) == max(ids.values()) - min(images) + 1


def chameleon_error(folder: Path | str) -> InputError:
    """What to say of Chameleon itself, and of what was trained from it."""
    return InputError(
        f"{folder} is a Chameleon model: it normalises queries and keys, and its image codes are "
        "ids inside the text vocabulary (4 … 8195), which no stock LLaMA with its image ids "
        "behind the text can hold; start from a LLaMA"
    )


def refuse_published(folder: Path | str, part: str = "") -> None:
    """Raises InputError that names the command which imports a published folder, and the `part` of
    the result that is wanted.
    """
    if is_published(folder):
        raise InputError(
            f"{folder} is in the published form of Being-VL-0.5; import it with "
            f"`beingvl export --model {folder} --output NEW_FOLDER` and give NEW_FOLDER{part}"
        )
