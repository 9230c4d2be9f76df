"""Grids of codes: limits, checks, and encoding many grids in threads."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from beingvl.errors import InputError

MAX_CODES = 65_536
MAX_SIDE = 2047  # of a grid, in cells: dy and dx of a pair then fit 24 bits of its key
MAX_IDS = 1 << 19  # codes and merges: two ids then fit 39 bits
MAX_SHAPE_CELLS = 1 << 26  # of all tokens together: each merge may double a token's size
CHUNK_IMAGES = 256


# (grids int32 [n, H, W], ids, lengths) -> number of ids
EncodeChunk = Callable[[np.ndarray, np.ndarray, np.ndarray], int]


def encode_in_chunks(
    encode_chunk: EncodeChunk, grids: np.ndarray, num_threads: int
) -> tuple[np.ndarray, np.ndarray]:
    """Encode all grids in `num_threads` threads: (image ids flat int32, offsets int64 [N + 1])."""

    def encode(start: int) -> tuple[np.ndarray, np.ndarray]:
        chunk = np.ascontiguousarray(grids[start : start + size], np.int32)
        ids, lengths = np.empty(chunk.size, np.int32), np.empty(len(chunk), np.int64)
        return ids[: encode_chunk(chunk, ids, lengths)].copy(), lengths

    size = max(1, min(CHUNK_IMAGES, -(-len(grids) // max(1, num_threads))))
    starts = range(0, len(grids), size)
    if num_threads > 1 and len(starts) > 1:
        with ThreadPoolExecutor(num_threads) as pool:
            parts = list(pool.map(encode, starts))
    else:
        parts = [encode(start) for start in starts]
    no_ids, first = np.zeros(0, np.int32), np.zeros(1, np.int64)
    ids = np.concatenate([no_ids, *(ids for ids, _ in parts)])
    return ids, np.cumsum(np.concatenate([first, *(lengths for _, lengths in parts)]))


def checked_grids(grids: np.ndarray, num_codes: int, source: str) -> np.ndarray:
    """`grids` if it is `[N, H, W]` of integers 0 … num_codes-1, else InputError."""
    grids = np.asarray(grids)
    if grids.ndim != 3:
        raise InputError(
            f"{source}: codes of shape {list(grids.shape[1:])}, expected grids [height, width]"
        )
    if not np.issubdtype(grids.dtype, np.integer):
        raise InputError(f"{source}: codes of type {grids.dtype}, expected integers")
    check_side(grids.shape[1], grids.shape[2], source)
    if grids.size and not (grids.min() >= 0 and grids.max() < num_codes):
        raise InputError(
            f"{source}: codes {grids.min()} … {grids.max()}, expected 0 … {num_codes - 1}"
        )
    return grids


def check_side(height: int, width: int, source: str) -> None:
    if not (1 <= height <= MAX_SIDE and 1 <= width <= MAX_SIDE):
        raise InputError(
            f"{source}: a grid of {height} x {width} cells, expected 1 to {MAX_SIDE} on each side"
        )
