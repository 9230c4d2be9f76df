"""What a training run consists of, and when two runs are the same run. No torch, so that wrong
input is reported within a second.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from beingvl.artefact.manifest import Manifest, join_lineages, read_manifest, verify_small_files
from beingvl.artefact.request import Request
from beingvl.data.arrow_shards import ShardReader
from beingvl.data.loader import PLAN_VERSION
from beingvl.data.made_with import FACTS
from beingvl.errors import InputError
from beingvl.model.start_model import check_context, context_of, find_start_model
from beingvl.stage.mixture import fit_mixture
from beingvl.stage.stage_config import StageConfig, as_written, load_stage_config
from beingvl.train.checkpoint_folders import complete_checkpoints

# DeepSpeed keys that are part of a run's identity
IDENTITY_KEYS = ("train_batch_size", "optimizer", "gradient_clipping", "bf16")


@dataclass(frozen=True)
class Stage:
    """`model`: the start model. `validation`: held-out shards. `moments`: the checkpoint whose
    optimizer moments the stage starts with. Only a run with the same `identity` resumes its
    checkpoints. `note`: what the user should know before the start.
    """

    output: Path
    log_folder: Path
    config: StageConfig
    model: Path
    shards: ShardReader
    validation: ShardReader | None
    moments: Path | None
    identity: Request
    note: str

    @property
    def inputs(self) -> Request:
        """What must be the same on all ranks, including settings that do not change the result."""
        everything = asdict(self.config.beingvl) | self.config.deepspeed | self.identity
        held_out = self.validation and self.validation.manifest.content_hash
        return _as_read(Request(everything | {"validation set": held_out}))


def open_stage(
    model: Path,
    data: Path,
    output: Path,
    deepspeed_config: Path,
    overrides: Sequence[str],
    log_dir: Path | None,
    validation_data: Path | None,
    carry_moments: bool,
) -> Stage:
    """Raises InputError for inputs that are missing or contradict each other."""
    config = load_stage_config(deepspeed_config, overrides)
    if bool(validation_data) != bool(config.beingvl.validation_every_steps):
        raise InputError(
            "--validation_data and beingvl.validation_every_steps belong together: give both or "
            "none"
        )
    moments = find_moments(model) if carry_moments else None
    model = find_start_model(model)
    start, shards = read_manifest(model, "model"), ShardReader(data, model)
    verify_small_files(model)
    config, note = fit_mixture(config, shards.manifest)
    note = "\n".join(
        filter(None, [note, check_context(context_of(model), config, shards.manifest)])
    )
    inputs = {str(model): start, str(data): shards.manifest}
    validation = ShardReader(validation_data, model) if validation_data else None
    if validation:
        inputs[str(validation_data)] = validation.manifest
    lineage = join_lineages({name: manifest.lineage for name, manifest in inputs.items()})
    identity = run_identity(config, start, shards.manifest, lineage)
    for fact in FACTS:
        value = fact.join({name: fact.of(manifest) for name, manifest in inputs.items()})
        identity |= fact.in_request(value)
    if variant := shards.manifest.details.get("variant"):
        identity["variant"] = variant
    if moments:
        identity["moments"] = read_manifest(moments, "checkpoint").content_hash
    log_folder = log_dir or output / "tensorboard"
    return Stage(output, log_folder, config, model, shards, validation, moments, identity, note)


def find_moments(path: Path) -> Path:
    """The last checkpoint of a stage folder, given the folder or its `final/`."""
    checkpoints = complete_checkpoints(path) or complete_checkpoints(path.resolve().parent)
    if not checkpoints:
        raise InputError(
            f"--carry_moments: {path} is not a stage folder with checkpoints; give the previous "
            "stage's folder as --model"
        )
    return checkpoints[-1]


def run_identity(
    config: StageConfig, model: Manifest, shards: Manifest, lineage: dict[str, str]
) -> Request:
    """Everything that determines the result of a run."""
    written = as_written(config.beingvl)
    block = {
        field.name: written[field.name]
        for field in fields(config.beingvl)
        if field.metadata["changes_result"]
    }
    block["mixture"] = list(config.beingvl.mixture.items())  # its order decides the samples' order
    hashes = {"start_model": model.content_hash, "shards": shards.content_hash}
    decides = {"plan_version": PLAN_VERSION, "lineage": lineage}
    kept = {key: config.deepspeed.get(key) for key in IDENTITY_KEYS}
    return _as_read(Request(hashes | decides | block | kept))


def _as_read(request: Request) -> Request:
    """The request as it is read back from a file: tuples become lists."""
    return Request(json.loads(json.dumps(request)))
