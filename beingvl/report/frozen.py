"""What a stage changed: a hash of every parameter group before and after it, computed from the
weight files.

Groups are the freezer's rules, stored in `stage-N/final/manifest.json`. A frozen group must have
the same hash before and after, a trained one a different one. Each model folder is read once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from blake3 import blake3

from beingvl.artefact.manifest import read_manifest
from beingvl.artefact.progress import progress
from beingvl.model.extended_vocab import TEXT_ROWS, VISUAL_ROWS, stored_slice
from beingvl.model.param_groups import plan_parameters
from beingvl.model.weight_files import WeightFolder
from beingvl.stage.stage_config import rules_of
from beingvl.vocab import VocabLayout


@dataclass(frozen=True)
class GroupHashes:
    """One group of one stage. `before` is None if the stage's start model is missing, `base` if
    there is no base model.
    """

    stage: str
    group: str
    is_trained: bool
    num_tensors: int
    num_parameters: int
    base: str | None
    before: str | None
    after: str

    @property
    def is_as_promised(self) -> bool:
        """A frozen group is bit-identical, a trained one is not."""
        return self.before is None or (self.before == self.after) != self.is_trained


def hash_groups(stages: Mapping[str, Path], base: Path | None) -> list[GroupHashes]:
    """The groups of all stages (name -> final/ folder, in training order). `base` is the model
    that the first stage started from.
    """
    folders = [*([base] if base else []), *stages.values()]
    hashes = {folder: hash_parameters(folder) for folder in folders}
    folder_of_content = {read_manifest(folder).content_hash: folder for folder in folders}
    groups = []
    for stage, final in stages.items():
        identity = read_manifest(final).details.get("identity", {})
        rules = rules_of(identity.get("trainable", []))
        if not rules:  # the model was not made by a stage
            continue
        start = folder_of_content.get(identity.get("start_model", ""))
        plan = plan_parameters({name: shape for name, (shape, _) in hashes[final].items()}, rules)
        for rule in rules:
            # adapters were merged into the weights beside them
            members = [
                planned
                for planned in plan
                if planned.rule is rule and planned.name in hashes[final]
            ]
            names = sorted(planned.name for planned in members)
            groups.append(
                GroupHashes(
                    stage,
                    rule.match,
                    rule.train,
                    num_tensors=len(names),
                    num_parameters=sum(planned.num_elements for planned in members),
                    base=_joined(hashes[base], names) if base else None,
                    before=_joined(hashes[start], names) if start else None,
                    after=_joined(hashes[final], names),
                )
            )
    return groups


def hash_parameters(folder: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """Freezer's parameter name -> (shape, hash); embedding and head are split into two each."""
    weights, layout = WeightFolder(folder), VocabLayout.load(folder)
    found = {}
    for stored in progress(list(weights), name=f"hash {folder}", unit="tensor", leave=False):
        names, shape = [stored], weights.shape(stored)
        if len(shape) == 2 and shape[0] == layout.size:
            stem = stored.removesuffix(".weight")
            names = [f"{stem}.{TEXT_ROWS}", f"{stem}.{VISUAL_ROWS}"]
        for name in names:
            part = weights[stored][stored_slice(name, layout.num_text)[1]].contiguous()
            content = memoryview(part.view(-1).view(torch.uint8).numpy())
            found[name] = (tuple(part.shape), blake3(content).hexdigest())
        weights.release()
    return found


def _joined(hashes: Mapping[str, tuple[tuple[int, ...], str]], names: Sequence[str]) -> str:
    digest = blake3()
    for name in names:
        digest.update(f"{name} {hashes[name][1] if name in hashes else None}\n".encode())
    return digest.hexdigest()
