"""Where the tokens of a row stand, as `made_with.IMAGE_POSITIONS` says of rows and models.

running   0, 1, 2, …
anchor    an image token stands at the place of its anchor's cell, and text goes on behind the last
          cell: merged or not, a cell and a word stand where they stood among raw codes

The tokens alone decide, because a vBPE stream gives its grid back (`vbpe/visual_bpe.py`).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from beingvl.data.made_with import ANCHOR, PUBLISHED, RUNNING
from beingvl.errors import InputError
from beingvl.vbpe.vbpe_file import VBPE_FILE
from beingvl.vbpe.visual_bpe import AnyVBPE, VisualBPE
from beingvl.vocab import VocabLayout


class PositionIds:
    """Token ids `[n]` of a row -> its position ids `[n]` int64.

    Raises InputError for `anchor` with a published vBPE, whose tokens have no fixed shape.
    """

    def __init__(self, kind: str, layout: VocabLayout, vbpe: AnyVBPE | None) -> None:
        self._layout = layout
        self._vbpe: VisualBPE | None = None
        if kind == ANCHOR:
            vbpe = vbpe or VisualBPE(layout.num_vq, np.zeros((0, 4), np.int32))
            if not isinstance(vbpe, VisualBPE):
                raise InputError(
                    f"{vbpe.source} is a published vBPE, whose tokens have no anchor; tokenize "
                    f"with --image_positions {RUNNING}"
                )
            self._vbpe = vbpe

    def __call__(self, token_ids: np.ndarray) -> np.ndarray:
        if self._vbpe is None:
            return running(token_ids)
        return self._vbpe.positions(self._layout.image_ids_in_row(token_ids))


def running(token_ids: np.ndarray) -> np.ndarray:
    return np.arange(len(token_ids))


def vbpe_inside(model_path: Path | None) -> AnyVBPE | None:
    """The vocabulary in a model folder, where there is one."""
    path = model_path and model_path / VBPE_FILE
    return VisualBPE.load(path) if path and path.is_file() else None


def usual_positions(template: str, model_path: Path | None) -> str:
    """Of new rows: anchors wherever the model that is to be trained on them knows its shapes."""
    is_known = template != PUBLISHED and isinstance(vbpe_inside(model_path), VisualBPE)
    return ANCHOR if is_known else RUNNING
