"""What tells a model folder in the published form of Being-VL-0.5 from ours, and what to do with
it. model/published_names.py translates the two.
"""

from __future__ import annotations

from pathlib import Path

from beingvl.errors import InputError
from beingvl.json_file import read_object

PUBLISHED_MODEL_TYPE = "chameleon"
VQ_CONFIG_KEY = "vq_config"


def is_published(folder: Path | str) -> bool:
    """Whether the folder's config.json holds a VQ-GAN's: its weights are those of both."""
    path = Path(folder) / "config.json"
    return path.is_file() and VQ_CONFIG_KEY in read_object(path, "download it again")


def refuse_published(folder: Path | str) -> None:
    """Raises InputError that names the command which imports a published folder."""
    if is_published(folder):
        raise InputError(
            f"{folder} is in the published form of Being-VL-0.5; import it with "
            f"`beingvl export --model {folder} --output NEW_FOLDER` and give that"
        )
