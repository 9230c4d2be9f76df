"""Position ids of a token row. `made_with.IMAGE_POSITIONS` records their kind for rows and models.

running   0, 1, 2, …
anchor    an image token has the position of its anchor's cell, and text continues after the last
          cell: merging does not move any cell or word from its position among raw codes

Positions follow from the tokens alone, because a vBPE stream determines its grid
(`vbpe/visual_bpe.py`).
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
    """Token ids `[n]` of a token row -> its position ids `[n]` int64.

    Raises InputError for `anchor` with a published vBPE: its tokens have no fixed shape.
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
    """The vBPE in a model folder, if there is one."""
    path = model_path and model_path / VBPE_FILE
    return VisualBPE.load(path) if path and path.is_file() else None


def usual_positions(template: str, model_path: Path | None) -> str:
    """For new rows: anchors if the model to train on them has a vBPE with known shapes."""
    is_known = template != PUBLISHED and isinstance(vbpe_inside(model_path), VisualBPE)
    return ANCHOR if is_known else RUNNING
