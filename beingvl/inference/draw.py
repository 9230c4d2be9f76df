"""Drawing: sample image tokens that always form a valid picture. Experimental.

A stream of image tokens decodes to a grid because each token's anchor is the first cell that is not
yet covered (`beingvl.vbpe.visual_bpe`). So a token may come next exactly if its polyomino, placed
there, stays inside the grid and overlaps no covered cell; every other token gets probability 0. A
plain code is one cell and always fits, so there are no dead ends:

    covered    next free cell    fits: . (a code)   .. (side by side)      does not: ...
        (outside)   . above . (outside)
    # # #      (1, 1)
    #

When the grid is full, only `<eoss>`, the end of the image, may follow. The stream can differ from
`encode`'s for the same grid: two codes may be drawn where a merge of them exists.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from beingvl.data.made_with import ANCHOR
from beingvl.inference.asked import Prompt
from beingvl.inference.sampling import sampling_options
from beingvl.vbpe.visual_bpe import VisualBPE
from beingvl.vocab import VocabLayout

if TYPE_CHECKING:
    from beingvl.inference.model import BeingVL


class FittingTokens:
    """Which image ids fit a partly covered grid, and what they cover; computed once per shape."""

    def __init__(self, vbpe: VisualBPE, grid: tuple[int, int]) -> None:
        """`grid` is (height, width) in cells."""
        self.grid = grid
        shapes: dict[tuple[tuple[int, int], ...], int] = {}
        self._shape_of = np.empty(vbpe.num_ids, np.int64)
        for image_id in range(vbpe.num_ids):
            dy, dx, _ = vbpe.cells(image_id)
            cells = tuple(zip(dy.tolist(), dx.tolist(), strict=True))
            self._shape_of[image_id] = shapes.setdefault(cells, len(shapes))
        longest = max(map(len, shapes))
        # [shapes, longest, 2]; short shapes repeat their anchor, which is free by definition.
        self._cells = np.array([[*cells, *[(0, 0)] * (longest - len(cells))] for cells in shapes])

    def empty(self) -> np.ndarray:
        """An uncovered grid: bool `[height, width]`, True where a token covers the cell."""
        return np.zeros(self.grid, bool)

    def fitting(self, covered: np.ndarray) -> np.ndarray:
        """bool `[num_ids]`: whether each id may come next. All False when the grid is full."""
        if covered.all():
            return np.zeros(len(self._shape_of), bool)
        y, x = self._anchored(covered, self._cells)
        inside = (y < self.grid[0]) & (x >= 0) & (x < self.grid[1])
        free = inside & ~covered[np.where(inside, y, 0), np.where(inside, x, 0)]
        return free.all(axis=1)[self._shape_of]

    def place(self, covered: np.ndarray, image_id: int) -> None:
        """Cover the cells of an id that fits."""
        y, x = self._anchored(covered, self._cells[self._shape_of[image_id]])
        covered[y, x] = True

    def _anchored(self, covered: np.ndarray, cells: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        top, left = divmod(int(np.argmin(covered.ravel())), self.grid[1])
        return cells[..., 0] + top, cells[..., 1] + left


class OnlyWholeImages:
    """transformers' `prefix_allowed_tokens_fn`, called with (row, ids so far) before each token:
    after its prompt, every row of the batch draws one image, then ends it.
    """

    def __init__(self, tokens: FittingTokens, layout: VocabLayout, num_rows: int) -> None:
        self._tokens, self._layout = tokens, layout
        self._covered = [tokens.empty() for _ in range(num_rows)]
        self._has_begun = [False] * num_rows
        self._first_position = torch.zeros(num_rows, 1)

    def __call__(self, row: int, ids: torch.Tensor) -> list[int]:
        covered, first_id = self._covered[row], self._layout.first_image_id
        if self._has_begun[row] and not covered.all():  # a finished row only gets padding
            self._tokens.place(covered, int(ids[-1]) - first_id)
        self._has_begun[row] = True
        fitting = np.flatnonzero(self._tokens.fitting(covered)) + first_id
        return fitting.tolist() or [self._layout.eoi_id]

    def put_at_anchors(
        self, model: torch.nn.Module, args: Any, kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]]:
        """A forward pre-hook: the token being read gets the position of its anchor, the first cell
        not yet covered, instead of the next position.
        """
        position_ids = kwargs["position_ids"]
        if position_ids.shape[1] > 1:  # the prompt
            self._first_position = position_ids[:, -1:] + 1
        else:
            cells = [int(np.argmin(np.append(grid, False))) for grid in self._covered]
            kwargs["position_ids"] = self._first_position + position_ids.new_tensor(cells)[:, None]
        return args, kwargs


def before_drawing(being: BeingVL, prompt: Prompt, images: list[Any], with_vbpe: bool) -> list[int]:
    """Token ids that a picture continues."""
    if isinstance(prompt, str) and not prompt.strip() and not images:
        return [being.layout.bos_id, being.layout.boi_id]
    ids = being.tokenize(prompt, images, with_vbpe)
    if ids[-1] == being.layout.sep_id:  # begin-of-image replaces it
        ids.pop()
    return [*ids, being.layout.boi_id]


def draw_pictures(
    being: BeingVL,
    sequences: Sequence[Sequence[int]],
    vbpe: VisualBPE,
    max_new_tokens: int,
    temperature: float,
) -> list[np.ndarray]:
    """A sampled picture's token ids `[n]` int32 for each."""
    rule = OnlyWholeImages(FittingTokens(vbpe, being.vqgan.grid), being.layout, len(sequences))
    options = {"prefix_allowed_tokens_fn": rule, **sampling_options(temperature)}
    placed: Any = nullcontext()
    if being.image_positions == ANCHOR:
        placed = being.model.register_forward_pre_hook(rule.put_at_anchors, with_kwargs=True)
    eoi_id = being.layout.eoi_id
    with placed:
        rows = being.continue_batch(sequences, max_new_tokens, [eoi_id], options)
    pictures = (itertools.takewhile(lambda token: token != eoi_id, row) for row in rows)
    return [np.array(list(picture), np.int32) for picture in pictures]
