"""The fast twin of `vbpe.py`, compiled with numba. Same rules, same results bit for bit; only the data structures differ.

**Displacements** are one integer: `step = dy * SPAN + dx`. Sorting steps sorts (dy, dx) in raster order, and a pair of tokens is one
int64 key `a << 44 | b << 24 | step` whose order is that of (a, b, dy, dx).

**The board** is one int32 per cell. A cell >= 0 is the anchor of a token and holds its id. A cell < 0 belongs to a token whose anchor
lies that many cells earlier. BORDER cells surround every image, so no kernel ever compares coordinates with a width:

    codes        board (stride 3)            after merging (7, 8, 0, 1) -> 9
                 #  #  #                     #  #  #
    7 8          7  8  #                     9 -1  #
    7 5          7  5  #                     7  5  #
                 #  #  #                     #  #  #

**Shapes.** `cells` of a token are the steps from its anchor, sorted; `edges` are the steps of all cells that touch it, sorted.
"""

from __future__ import annotations

from typing import NamedTuple

import numba
import numpy as np

SPAN = 8192  # steps per row; |dx| <= MAX_SIDE + 1 stays below half of it
BORDER = -(1 << 30)

SHAPES_FINE, SHAPES_OVERLAP, SHAPES_APART = 0, 1, 2

_kernel = numba.njit(cache=True, nogil=True)


class Tables(NamedTuple):
    """What the encoder and decoder need to know of a vocabulary with V ids.

    Token i covers `cells[cell_start[i]:cell_start[i + 1]]` with `codes[…]` of the same range and touches
    `edges[edge_start[i]:edge_end[i]]`. `slot_keys`/`slot_ranks` is an open hash table from a pair's key to the merge's rank.
    """

    num_codes: int
    merges: np.ndarray  # int32 [R, 3]: a, b, step
    cell_start: np.ndarray  # int64 [V + 1]
    cells: np.ndarray  # int32 steps
    codes: np.ndarray  # int32
    edge_start: np.ndarray  # int64 [V]
    edge_end: np.ndarray  # int64 [V]
    edges: np.ndarray  # int32 steps
    slot_keys: np.ndarray  # int64 [power of two], -1 = free
    slot_ranks: np.ndarray  # int32


# ---- steps, keys, hashing ----


@_kernel
def step_offset(step, stride):
    """Distance in board cells of a step."""
    dy = (step + SPAN // 2) >> 13
    return dy * stride + step - dy * SPAN


@_kernel
def pair_key(a, b, step):
    return (np.int64(a) << 44) | (np.int64(b) << 24) | np.int64(step)


@_kernel
def hash_slot(key, mask):
    mixed = key * np.int64(-7046029254386353131)  # 2**64 / golden ratio
    return (mixed ^ (mixed >> 29)) & mask


# ---- shapes ----


@_kernel
def unite_cells(cells, codes, a_start, a_end, b_start, b_end, step, out):
    """Write the sorted union of token a's cells and token b's cells moved by `step` at `out`; False when they overlap."""
    i, j = a_start, b_start
    while i < a_end or j < b_end:
        if i < a_end and j < b_end and cells[i] == cells[j] + step:
            return False
        if j == b_end or (i < a_end and cells[i] < cells[j] + step):
            cells[out] = cells[i]
            codes[out] = codes[i]
            i += 1
        else:
            cells[out] = cells[j] + step
            codes[out] = codes[j]
            j += 1
        out += 1
    return True


@_kernel
def list_edges(cells, start, end, edges, out):
    """Write the sorted steps of all cells that touch a token at `out`; returns the end. At most 2 x cells + 2.

    The cells above, left, right and below are four sorted lists; this merges them and leaves out the token's own cells.
    """
    above, left, right, below, own = start, start, start, start, start
    beyond = np.int64(1) << 40
    while below < end:
        up = cells[above] - SPAN if above < end else beyond
        west = cells[left] - 1 if left < end else beyond
        east = cells[right] + 1 if right < end else beyond
        down = cells[below] + SPAN
        step = min(min(up, west), min(east, down))
        above += up == step
        left += west == step
        right += east == step
        below += down == step
        while own < end and cells[own] < step:
            own += 1
        if own == end or cells[own] != step:
            edges[out] = step
            out += 1
    return out


@_kernel
def touches(edges, edge_start, edge_end, cells, start, end, step):
    """Whether a token's cells, moved by `step`, meet the (sorted) edges of another."""
    i = edge_start
    for j in range(start, end):
        while i < edge_end and edges[i] < cells[j] + step:
            i += 1
        if i < edge_end and edges[i] == cells[j] + step:
            return True
    return False


@_kernel
def build_shapes(num_codes, merges, cell_start, edge_start, edge_end, cells, codes, edges):
    """Fill the shapes of all ids. Returns (status, rank): SHAPES_OVERLAP or SHAPES_APART with the rank of the first bad merge."""
    for code in range(num_codes):
        cells[code] = 0
        codes[code] = code
        edge_end[code] = list_edges(cells, code, code + 1, edges, edge_start[code])
    for rank in range(len(merges)):
        a, b, step = merges[rank]
        new = num_codes + rank
        b_start, b_end = cell_start[b], cell_start[b + 1]
        if not unite_cells(cells, codes, cell_start[a], cell_start[a + 1], b_start, b_end, step, cell_start[new]):
            return SHAPES_OVERLAP, rank
        if not touches(edges, edge_start[a], edge_end[a], cells, b_start, b_end, step):
            return SHAPES_APART, rank
        edge_end[new] = list_edges(cells, cell_start[new], cell_start[new + 1], edges, edge_start[new])
    return SHAPES_FINE, -1


@_kernel
def fill_slots(merges, slot_keys, slot_ranks):
    """Insert every merge into the hash table. Returns the rank of a merge that is there twice, or -1."""
    mask = len(slot_keys) - 1
    for rank in range(len(merges)):
        key = pair_key(merges[rank, 0], merges[rank, 1], merges[rank, 2])
        slot = hash_slot(key, mask)
        while slot_keys[slot] >= 0:
            if slot_keys[slot] == key:
                return rank
            slot = (slot + 1) & mask
        slot_keys[slot] = key
        slot_ranks[slot] = rank
    return -1


@_kernel
def find_rank(slot_keys, slot_ranks, key):
    """Rank of the merge with this key, or -1."""
    mask = len(slot_keys) - 1
    slot = hash_slot(key, mask)
    while slot_keys[slot] >= 0:
        if slot_keys[slot] == key:
            return slot_ranks[slot]
        slot = (slot + 1) & mask
    return -1


# ---- the encoder ----


@_kernel
def sift_up(heap, at):
    item = heap[at]
    while at > 0:
        parent = (at - 1) >> 1
        if heap[parent] <= item:
            break
        heap[at] = heap[parent]
        at = parent
    heap[at] = item


@_kernel
def sift_down(heap, at, size):
    item = heap[at]
    child = 2 * at + 1
    while child < size:
        if child + 1 < size and heap[child + 1] < heap[child]:
            child += 1
        if heap[child] >= item:
            break
        heap[at] = heap[child]
        at = child
        child = 2 * at + 1
    heap[at] = item


@_kernel
def join_tokens(board, anchor, other, cells, start, end, stride):
    """Hand the cells `cells[start:end]` of the token at `other` to the token at the earlier `anchor`."""
    for i in range(start, end):
        cell = other + step_offset(cells[i], stride)
        board[cell] = anchor - cell


@_kernel
def step_between(anchor, column, later, stride):
    """The step from `anchor`, which stands in board column `column`, to a later anchor."""
    distance = later - anchor
    dy = (column + distance) // stride
    return distance - dy * stride + dy * SPAN


@_kernel
def encode_images(grids, tables, ids, lengths):
    """Encode `grids` [N, H, W] int32 into `ids` (flat, at least N x H x W long) and `lengths` [N]; returns the number of ids.

    One heap per image holds (rank, anchor of a) of every pair that is a merge; taking the smallest first applies the merges in
    rank order and each of them in raster order. A new token only makes pairs of higher rank, so nothing is ever too late.
    """
    num_images, height, width = grids.shape
    stride = width + 1
    board = np.empty((height + 2) * stride + 1, np.int32)
    heap = np.empty(2 * height * width + 64, np.int64)
    written = 0
    for image in range(num_images):
        board[:] = BORDER
        for y in range(height):
            for x in range(width):
                board[(y + 1) * stride + x] = grids[image, y, x]
        size = 0
        for cell in range(stride, (height + 1) * stride):
            if board[cell] < 0:
                continue
            for step, other in ((1, board[cell + 1]), (SPAN, board[cell + stride])):
                if other >= 0:
                    rank = find_rank(tables.slot_keys, tables.slot_ranks, pair_key(board[cell], other, step))
                    if rank >= 0:
                        heap[size] = (np.int64(rank) << 32) | cell
                        size += 1
        for at in range(size // 2 - 1, -1, -1):
            sift_down(heap, at, size)
        while size:
            item = heap[0]
            size -= 1
            heap[0] = heap[size]
            sift_down(heap, 0, size)
            heap, size = apply_merge(board, tables, stride, item >> 32, item & 0xFFFFFFFF, heap, size)
        first = written
        for cell in range(stride, (height + 1) * stride):
            if board[cell] >= 0:
                ids[written] = board[cell]
                written += 1
        lengths[image] = written - first
    return written


@_kernel
def apply_merge(board, tables, stride, rank, anchor, heap, size):
    """Merge at `anchor` if both tokens are still there, and push the new token's own pairs. Returns the heap and its size."""
    a, b, step = tables.merges[rank]
    other = anchor + step_offset(step, stride)
    if board[anchor] != a or board[other] != b:
        return heap, size
    new = tables.num_codes + rank
    board[anchor] = new
    join_tokens(board, anchor, other, tables.cells, tables.cell_start[b], tables.cell_start[b + 1], stride)
    first, last = tables.edge_start[new], tables.edge_end[new]
    if size + last - first > len(heap):
        larger = np.empty(2 * (size + last - first), np.int64)
        larger[:size] = heap[:size]
        heap = larger
    column = anchor % stride
    for i in range(first, last):
        neighbour = anchor + step_offset(tables.edges[i], stride)
        if board[neighbour] == BORDER:
            continue
        if board[neighbour] < 0:
            neighbour += board[neighbour]
        if neighbour > anchor:
            earlier = anchor
            key = pair_key(new, board[neighbour], step_between(anchor, column, neighbour, stride))
        else:
            earlier = neighbour
            key = pair_key(board[neighbour], new, step_between(neighbour, neighbour % stride, anchor, stride))
        found = find_rank(tables.slot_keys, tables.slot_ranks, key)
        if found >= 0:  # a neighbour that touches twice is pushed twice; the second one finds the tokens gone
            heap[size] = (np.int64(found) << 32) | earlier
            sift_up(heap, size)
            size += 1
    return heap, size


# ---- the decoder ----

STREAM_FINE, STREAM_UNKNOWN_ID, STREAM_OUTSIDE, STREAM_OVERLAP, STREAM_TOO_LONG, STREAM_TOO_SHORT = 0, 1, 2, 3, 4, 5


@_kernel
def decode_stream(ids, tables, grid):
    """Fill `grid` [H, W] int32, which comes in as all -1. Returns (status, position in `ids`)."""
    height, width = grid.shape
    flat = grid.ravel()
    cell = 0
    num_ids = len(tables.cell_start) - 1
    for position in range(len(ids)):
        while cell < len(flat) and flat[cell] >= 0:
            cell += 1
        if cell == len(flat):
            return STREAM_TOO_LONG, position
        token = ids[position]
        if token < 0 or token >= num_ids:
            return STREAM_UNKNOWN_ID, position
        y, x = cell // width, cell % width
        for i in range(tables.cell_start[token], tables.cell_start[token + 1]):
            dy = (tables.cells[i] + SPAN // 2) >> 13
            row, column = y + dy, x + tables.cells[i] - dy * SPAN
            if row >= height or column < 0 or column >= width:
                return STREAM_OUTSIDE, position
            if grid[row, column] >= 0:
                return STREAM_OVERLAP, position
            grid[row, column] = tables.codes[i]
    for left in range(cell, len(flat)):
        if flat[left] < 0:
            return STREAM_TOO_SHORT, len(ids)
    return STREAM_FINE, -1
