"""What `beingvl plan --model` means. Does not import torch: a wrong one is reported at once.

folder_of       a model folder, a stage folder, or a config.json
SHAPES          known names, with the numbers from their published config.json
"""

from __future__ import annotations

from pathlib import Path

from beingvl.errors import InputError
from beingvl.model.start_model import find_start_model
from beingvl.published_form import refuse_published

COLUMNS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "max_position_embeddings",
)
SHAPES = {
    "llama3.1-8b": (4096, 14336, 32, 32, 8, 128256, 131072),
    "llama3.1-70b": (8192, 28672, 80, 64, 8, 128256, 131072),
    "llama3.2-1b": (2048, 8192, 16, 32, 8, 128256, 131072),
    "llama3.2-3b": (3072, 8192, 28, 24, 8, 128256, 131072),
    "llama2-7b": (4096, 11008, 32, 32, 32, 32000, 4096),
    "smollm2-135m": (576, 1536, 30, 9, 3, 49152, 8192),
    "smollm2-360m": (960, 2560, 32, 15, 5, 49152, 8192),
    "smollm2-1.7b": (2048, 8192, 24, 32, 32, 49152, 8192),
}


def folder_of(model: Path | str) -> Path | None:
    """A model's folder or config.json; None for a name in SHAPES. Raises InputError for anything
    else.
    """
    if str(model) in SHAPES and not Path(model).exists():
        return None
    path = find_start_model(Path(model))
    refuse_published(path)
    if not (path.is_file() or (path / "config.json").is_file()):
        raise InputError(
            f"--model {model} is neither a model folder nor a config.json, and no known shape: "
            f"{', '.join(SHAPES)}"
        )
    return path
