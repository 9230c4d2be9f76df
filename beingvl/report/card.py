"""The model card with scores: rewrites a model folder's README.md from its manifest."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from beingvl.artefact.card import CARD_FILE, write_card
from beingvl.artefact.manifest import read_manifest
from beingvl.errors import InputError
from beingvl.evaluation.results import KIND, read_summary
from beingvl.model.card import model_card
from beingvl.model.start_model import find_start_model


def report_card(model_path: Path | str, *, scores: Sequence[Path | str] = ()) -> Path:
    """Write the card of a model folder, or of a stage folder's `final/`, with the `scores` of
    evaluations; returns its path.

    Raises InputError for an evaluation of a different model, and for a card that was edited.
    """
    folder = find_start_model(Path(model_path))
    manifest = read_manifest(folder, "model")
    for evaluation in scores:
        if read_manifest(evaluation, KIND).details["request"]["model"] != manifest.content_hash:
            raise InputError(f"{evaluation} holds scores of a different model than {folder}")
    text = model_card(folder, manifest, [read_summary(Path(one)) for one in scores])
    card = folder / CARD_FILE
    if not write_card(folder, text):
        raise InputError(f"{card} was changed; move it away to have a new one written")
    print(f"{card}: scores of {len(scores)} evaluations")
    return card
