"""Which model folder a path means, and what its config.json says about sample lengths. Does not
import torch, so that wrong input is reported within a second.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from beingvl.artefact.manifest import Manifest, is_complete
from beingvl.data.made_with import ANCHOR, IMAGE_POSITIONS, UNMERGED
from beingvl.errors import InputError
from beingvl.json_file import read_object
from beingvl.stage.stage_config import StageConfig

ADAPTER_CONFIG = "adapter_config.json"  # PEFT's


def find_start_model(path: Path) -> Path:
    """A model folder, or the `final/` inside a stage folder. Raises InputError for adapters."""
    if not is_complete(path) and (path / "final").is_dir():
        path = path / "final"
    if (path / ADAPTER_CONFIG).is_file():
        base = read_object(path / ADAPTER_CONFIG).get("base_model_name_or_path")
        raise InputError(
            f"{path} holds PEFT adapters on {base}, not a whole model; give a merged one, for "
            "example by `beingvl export --model START_MODEL --checkpoint STAGE`"
        )
    return path


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a model folder. Raises InputError if it is damaged."""
    return read_object(folder / "config.json", "copy the model folder again")


def context_of(folder: Path) -> int | None:
    """Number of tokens that the model has positions for; None if config.json does not say."""
    config = read_config(folder)
    return config.get("max_position_embeddings", config.get("n_positions"))


def check_context(context: int | None, config: StageConfig, shards: Manifest | None) -> str:
    """A note for a stage whose sequences exceed the model's context; "" if they do not.

    Positions restart with each sample, so a long sequence of short samples is fine. Raises
    InputError if the shards' longest sample, in tokens, exceeds the context; with anchors, a merged
    image takes the positions of all its codes.
    """
    sequence_length = config.beingvl.sequence_length
    longest_sample = int(shards.counts["longest_sample_tokens"]) if shards else 0
    if shards and IMAGE_POSITIONS.of(shards) == ANCHOR:
        longest_sample = max(longest_sample, shards.details.get(UNMERGED, 0))
    if context is None or max(sequence_length, longest_sample) <= context:
        return ""
    found = f"the model has positions for {context} tokens (max_position_embeddings)"
    if longest_sample > context:
        raise InputError(
            f"the longest sample of the shards takes {longest_sample} positions, {found}; leave "
            f"such samples out with `beingvl tokenize --max_length {context}`, or use another base"
        )
    return (
        f"note: beingvl.sequence_length is {sequence_length}, but {found}; sequences may be packed "
        f"to {sequence_length} tokens, a single sample may have {context}"
    )
