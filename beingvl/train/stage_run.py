"""What one training run consists of, and what makes two runs the same run."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from beingvl.artefact.manifest import Manifest
from beingvl.data.arrow_shards import ShardReader
from beingvl.data.loader import PLAN_VERSION
from beingvl.errors import InputError
from beingvl.stage.stage_config import StageConfig
from beingvl.train.checkpoint import complete_checkpoints
from beingvl.train.phases import Phases
from beingvl.train.ranks import Ranks

# Keys of the block "beingvl" that change neither a sample nor an update, so that a resumed run may
# change them.
SAME_RESULT = {
    "activation_checkpointing",
    "loss_chunk_tokens",
    "checkpoint_every_steps",
    "checkpoint_every_minutes",
    "background_save",
    "keep_last",
    "keep_every",
    "validation_every_steps",
    "log_every_steps",
    "tensorboard",
    "max_skipped_steps",
    "stall_timeout_seconds",
    "deterministic",
}


@dataclass(frozen=True)
class Stage:
    """What one training run consists of. `moments`: the checkpoint whose optimizer moments it
    starts with.
    """

    output: Path
    log_folder: Path | None
    config: StageConfig
    model: Path
    shards: ShardReader
    validation: ShardReader | None
    moments: Path | None
    identity: dict[str, Any]
    ranks: Ranks
    phases: Phases


def find_moments(path: Path) -> Path:
    """The last checkpoint of a stage folder, or of the stage folder around a `final/`."""
    checkpoints = complete_checkpoints(path) or complete_checkpoints(path.resolve().parent)
    if not checkpoints:
        raise InputError(
            f"--carry_moments: {path} is no stage folder with checkpoints; give the "
            "previous stage's folder as --model"
        )
    return checkpoints[-1]


def run_identity(
    config: StageConfig, model: Manifest, shards: Manifest, lineage: dict[str, str]
) -> dict[str, Any]:
    """What makes two runs the same run: a checkpoint is only resumed by a run of equal identity."""
    block = {key: value for key, value in asdict(config.beingvl).items() if key not in SAME_RESULT}
    block["trainable"] = list(block["trainable"])
    block["mixture"] = [
        list(item) for item in block["mixture"].items()
    ]  # its order decides the order of samples
    kept = ("train_batch_size", "optimizer", "gradient_clipping", "bf16")
    return {
        "start_model": model.content_hash,
        "shards": shards.content_hash,
        "plan_version": PLAN_VERSION,
        "lineage": lineage,
        **block,
        **{key: config.deepspeed.get(key) for key in kept},
    }
