"""Models with a template of their own that say what a test wants to hear, and what they are
asked.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from beingvl.artefact.manifest import read_manifest, write_manifest
from beingvl.inference.model import BeingVL
from tests.tiny import LAYOUT

PUBLISHED = "being-vl-0.5"
MERGED = {"p<": 200, "/s>x": 201}  # token text -> the byte whose place it takes
SAYS_YEP = ["Ġ", "y", "e", "p", "<", "/", "s", ">", "x"]  # and the published stop text


def taught(run: Path, folder: Path, template: str | None = None) -> Path:
    """The run's last model with a template in its manifest, as training leaves it."""
    shutil.copytree(run / "stage-3" / "final", folder)
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    letters = {place: letter for letter, place in tokenizer["model"]["vocab"].items()}
    for text, place in MERGED.items():
        del tokenizer["model"]["vocab"][letters[place]]
        tokenizer["model"]["vocab"][text] = place
    path.write_text(json.dumps(tokenizer))
    manifest = read_manifest(folder)
    details = {"template": template} if template else {}
    (folder / "manifest.json").unlink()
    write_manifest(folder, "model", {}, manifest.lineage, details)
    return folder


def says(folder: Path, tokens: list[str], **options: str) -> BeingVL:
    """A model that always says these tokens in turn and stays with the last: its layers add
    nothing, and its head's row of each is the embedding of the one before.
    """
    model = BeingVL(folder, **options).load_model(device="cpu")
    weights = dict(model.model.named_parameters())
    for name, parameter in weights.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            parameter.data.zero_()
    embedding, head = weights["model.embed_tokens.weight"], weights["lm_head.weight"]
    head.data.zero_()
    vocabulary = model._tokenizer.get_vocab()
    ids = [vocabulary.get(token, LAYOUT.sep_id) for token in tokens]
    for before, after in zip(ids, [*ids[1:], ids[-1]], strict=True):
        head.data[after] += embedding.data[before] / embedding.data[before].norm()
    return model


def taught_to_say(run: Path, folder: Path, tokens: list[str]) -> Path:
    """The folder of a model of the published template that always says these tokens."""
    says(taught(run, folder, PUBLISHED), tokens).model.save_pretrained(folder)
    manifest = read_manifest(folder)
    write_manifest(folder, "model", {}, manifest.lineage, manifest.details)
    return folder


def batches_of(model: BeingVL, monkeypatch: pytest.MonkeyPatch) -> list[Sequence[Sequence[int]]]:
    """The prompts of every batch that the model will continue."""
    batches: list[Sequence[Sequence[int]]] = []
    inputs_of = model.inputs_of

    def noted(prompts: Sequence[Sequence[int]], *more: Any) -> dict[str, Any]:
        batches.append(prompts)
        return inputs_of(prompts, *more)

    monkeypatch.setattr(model, "inputs_of", noted)
    return batches
