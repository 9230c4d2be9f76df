"""The trainer's Python side: it places images on one board and owns the kernels' arrays."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from beingvl.errors import InputError
from beingvl.vbpe.kernels import BORDER, SPAN, Tables, encode_images, paint_streams, place_images
from beingvl.vbpe.training_kernels import (
    LEARNT,
    NUM_CELLS,
    NUM_COUNTERS,
    NUM_RECORDS,
    NUM_TOKENS,
    ROUND,
    SHAPES_FULL,
    TOP,
    State,
    index_board,
    learn,
)


def plan_board(sizes: np.ndarray) -> tuple[int, int, np.ndarray]:
    """Place images of `sizes` [N, 2]: (stride, board cells, upper left cells int64 [N]).

    Images of one size are stacked below each other; mixed sizes fill shelves, tallest first.
    """
    heights, widths = sizes[:, 0].astype(np.int64), sizes[:, 1].astype(np.int64)
    if (sizes == sizes[0]).all():
        stride = int(widths[0]) + 1
        tops = 1 + np.arange(len(sizes)) * (heights[0] + 1)
        return stride, int(tops[-1] + heights[0] + 1) * stride + 1, tops * stride
    stride = 8 * (int(widths.max()) + 1)
    origins = np.empty(len(sizes), np.int64)
    top, left, shelf = 1, 0, 0
    for image in np.lexsort((widths, -heights)):
        if left + widths[image] + 1 > stride:
            top, left, shelf = top + shelf + 1, 0, 0
        origins[image] = top * stride + left
        left += int(widths[image]) + 1
        shelf = max(shelf, int(heights[image]))
    return stride, (top + shelf + 1) * stride + 1, origins


class Trainer:
    """Learns merges from `corpora`, code arrays [N, H, W] whose sizes may differ.

    `learnt` are merges to start from, learnt earlier from the same images.
    """

    def __init__(
        self,
        corpora: Sequence[np.ndarray],
        num_codes: int,
        alpha: float,
        sigma: float,
        min_count: int,
        learnt: Tables | None = None,
    ) -> None:
        sizes = [np.tile(corpus.shape[1:], (len(corpus), 1)) for corpus in corpora]
        self.sizes = np.concatenate(sizes)
        self.num_cells = int(self.sizes.prod(axis=1).sum())
        stride, num_board_cells, self.origins = plan_board(self.sizes)
        if num_board_cells >= 1 << 31:
            raise InputError(
                f"{len(self.sizes)} images need a board of {num_board_cells} cells, expected below "
                "2**31: use fewer images"
            )
        board = np.full(num_board_cells, BORDER, np.int32)
        first = 0
        for corpus in corpora:
            for start in range(0, len(corpus), 1024):
                chunk = np.ascontiguousarray(corpus[start : start + 1024], np.int32)
                origins = self.origins[first : first + len(chunk)]
                place_images(board, stride, chunk, origins)
                if learnt is not None:
                    ids, lengths = np.empty(chunk.size, np.int32), np.empty(len(chunk), np.int64)
                    encode_images(learnt, chunk, ids, lengths)
                    paint_streams(board, stride, origins, chunk.shape[1:], ids, learnt)
                first += len(chunk)
        codes = np.arange(num_codes, dtype=np.int32)
        num_learnt = len(learnt.merges) if learnt else 0
        room = 5 * self.num_cells // 2 + 1024  # untouched pages cost no memory
        self._state = State(
            stride=stride,
            num_codes=num_codes,
            alpha=float(alpha),
            sigma=float(sigma),
            min_count=min_count,
            board=board,
            places=np.empty(room, np.int32),
            keys=np.empty(room, np.int64),
            starts=np.empty(room, np.int64),
            counts=np.empty(room, np.int32),
            exact_at=np.empty(room, np.int32),
            links=np.empty(room, np.int32),
            heads=np.zeros(self.num_cells + 1, np.int32),
            changed=np.zeros(num_codes + num_learnt, np.int32),
            cell_start=learnt.cell_start.copy() if learnt else np.arange(num_codes + 1),
            cells=learnt.cells.copy() if learnt else np.zeros(num_codes, np.int32),
            codes=learnt.codes.copy() if learnt else codes,
            merges=learnt.merges.copy() if learnt else np.zeros((0, 3), np.int32),
            counters=np.zeros(NUM_COUNTERS, np.int64),
        )
        self._state.keys[0] = -1  # record 0 does not exist
        self._state.counters[NUM_RECORDS] = 1
        self._state.counters[NUM_CELLS] = len(self._state.cells)
        self._state.counters[ROUND] = num_learnt
        index_board(self._state)

    def learn(self, until: int) -> bool:
        """Learn until there are `until` merges; False if no pair occurs `min_count` times."""
        state = self._state
        more = until - len(state.merges)
        if more > 0:
            more = max(more, len(state.cell_start) // 2)
            state = state._replace(
                cell_start=_longer(state.cell_start, more),
                changed=_longer(state.changed, more),
                merges=_longer(state.merges, more),
            )
        while (status := learn(state, until)) == SHAPES_FULL:
            more = 3 * len(state.cells)
            cells, codes = _longer(state.cells, more), _longer(state.codes, more)
            state = state._replace(cells=cells, codes=codes)
        self._state = state
        return status == LEARNT

    @property
    def num_merges(self) -> int:
        return int(self._state.counters[ROUND])

    @property
    def num_tokens(self) -> int:
        """Number of tokens that all images have now."""
        return int(self._state.counters[NUM_TOKENS])

    @property
    def best_count(self) -> int:
        """Largest count in the last round."""
        return int(self._state.counters[TOP])

    @property
    def merges(self) -> np.ndarray:
        """int32 [R, 4]: a, b, dy, dx."""
        a, b, step = self._state.merges[: self.num_merges].T
        dy = (step + SPAN // 2) // SPAN
        return np.column_stack([a, b, dy, step - dy * SPAN])

    def stream(self, image: int) -> np.ndarray:
        """One image's ids after the merges learnt so far, int32 [n]."""
        stride, (height, width) = self._state.stride, self.sizes[image]
        rows = self.origins[image] + stride * np.arange(height)[:, None]
        cells = self._state.board[(rows + np.arange(width)).ravel()]
        return cells[cells >= 0]


def _longer(array: np.ndarray, more: int) -> np.ndarray:
    """A copy with `more` entries of zeros appended."""
    return np.concatenate([array, np.zeros((more, *array.shape[1:]), array.dtype)])
