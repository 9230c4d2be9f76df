"""The fast twin, compiled with numba: shapes of ids, encoding, decoding. Results are bit-identical
to `reference.py`; only the data structures differ. `training_kernels.py` builds on this.

**Displacements** are single integers: `step = dy * SPAN + dx`. Sorting steps sorts (dy, dx) in
raster order. A pair of tokens is one int64 key `a << 44 | b << 24 | step`, which sorts like (a, b,
dy, dx).

**The board** has one int32 per cell. A cell >= 0 is the anchor of a token and holds its id. A cell
< 0 belongs to a token whose anchor is that many cells earlier. BORDER cells surround every image,
so no kernel ever compares coordinates with a width:

    codes        board (stride 3)            after merging (7, 8, 0, 1) -> 9
                 #  #  #                     #  #  #
    7 8          7  8  #                     9 -1  #
    7 5          7  5  #                     7  5  #
                 #  #  #                     #  #  #

**Shapes.** A token's `cells` are the steps from its anchor to its cells, sorted; its `edges` are
the steps to all cells that touch it, sorted.
"""

from __future__ import annotations

import contextlib
import os
import stat
import tempfile
from pathlib import Path
from typing import NamedTuple

import numba
import numpy as np

from beingvl.version import __version__

Ints = np.ndarray
SPAN = 8192  # steps per row; |dx| <= MAX_SIDE + 1 stays below half of it
BORDER = -(1 << 30)

SHAPES_FINE, SHAPES_OVERLAP, SHAPES_APART = 0, 1, 2


def _drop_stale_kernels() -> None:
    """Delete cached kernels that are older than any source. numba recompiles a kernel when its own
    file changes, but not when a file that it calls into changes, so after an update the cache could
    hold old code.
    """
    room = Path(__file__).parent
    newest = max(path.stat().st_mtime for path in room.glob("*.py"))
    for index in room.glob("__pycache__/*.nbi"):
        # Another process may delete it first, or the disk is read-only.
        with contextlib.suppress(OSError):
            if index.stat().st_mtime < newest:
                index.unlink()


def _cache_somewhere() -> None:
    """numba caches compiled kernels beside their source or in the user's home. If neither is
    writable (a read-only installation, a container's user), use a temporary folder that belongs to
    this user alone, because cached kernels are pickles.
    """
    try:
        numba.njit(cache=True)(_cache_somewhere)
    except RuntimeError:
        folder = Path(tempfile.gettempdir()) / f"beingvl-{__version__}-kernels-{os.getuid()}"
        with contextlib.suppress(FileExistsError):
            folder.mkdir(0o700)
        found = folder.lstat()
        is_ours = found.st_uid == os.getuid() and found.st_mode == stat.S_IFDIR | 0o700
        # Worker processes inherit it.
        os.environ["NUMBA_CACHE_DIR"] = str(folder) if is_ours else tempfile.mkdtemp()
        numba.config.reload_config()


_drop_stale_kernels()
_cache_somewhere()
kernel = numba.njit(cache=True, nogil=True)
# For inner loops: passing an array to a function would count references atomically.
inlined = numba.njit(cache=True, nogil=True, inline="always")


class Tables(NamedTuple):
    """What the encoder and decoder need to know about a vocabulary with V ids.

    Token i covers `cells[cell_start[i]:cell_start[i + 1]]` with `codes[…]` of the same range, and
    touches `edges[edge_start[i]:edge_end[i]]`. `slot_keys` and `slot_ranks` are a hash table with
    open addressing, from a pair's key to the merge's rank.
    """

    num_codes: int
    merges: Ints  # int32 [R, 3]: a, b, step
    cell_start: Ints  # int64 [V + 1]
    cells: Ints  # int32 steps
    codes: Ints  # int32
    edge_start: Ints  # int64 [V]
    edge_end: Ints  # int64 [V]
    edges: Ints  # int32 steps
    slot_keys: Ints  # int64 [power of two], -1 = free
    slot_ranks: Ints  # int32


# ---- steps, keys, hashing ----


@kernel
def step_parts(step: int) -> tuple[int, int]:
    dy = (step + SPAN // 2) >> 13
    return dy, step - dy * SPAN


@kernel
def step_offset(step: int, stride: int) -> int:
    """Distance in board cells of a step."""
    dy, dx = step_parts(step)
    return dy * stride + dx


@kernel
def pair_key(a: int, b: int, step: int) -> int:
    return (a << 44) | (b << 24) | step


@kernel
def hash_slot(key: int, mask: int) -> int:
    mixed = key * -7046029254386353131  # 2**64 / golden ratio
    return (mixed ^ (mixed >> 29)) & mask


# ---- shapes ----


@kernel
def unite_cells(
    cells: Ints, codes: Ints, starts: Ints, a: int, b: int, step: int, new: int
) -> bool:
    """Write the cells of `new`: the sorted union of a's cells and b's cells moved by `step`. False
    if they overlap.
    """
    i, a_end, j, b_end, out = starts[a], starts[a + 1], starts[b], starts[b + 1], starts[new]
    while i < a_end or j < b_end:
        if i < a_end and j < b_end and cells[i] == cells[j] + step:
            return False
        if j == b_end or (i < a_end and cells[i] < cells[j] + step):
            cells[out], codes[out] = cells[i], codes[i]
            i += 1
        else:
            cells[out], codes[out] = cells[j] + step, codes[j]
            j += 1
        out += 1
    return True


@kernel
def list_edges(cells: Ints, start: int, end: int, edges: Ints, out: int) -> int:
    """Write the sorted steps of all cells that touch a token, at most 2 x cells + 2, to
    `edges[out:]`; returns their end.

    The cells above, left, right and below form four sorted lists, which are merged here.
    """
    above, left, right, below, own = start, start, start, start, start
    beyond = 1 << 40
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


@kernel
def touches(edges: Ints, cells: Ints, step: int) -> bool:
    """Whether a token's cells, moved by `step`, meet another token's (sorted) edges."""
    i = 0
    for cell in cells:
        while i < len(edges) and edges[i] < cell + step:
            i += 1
        if i < len(edges) and edges[i] == cell + step:
            return True
    return False


@kernel
def build_shapes(tables: Tables) -> tuple[int, int]:
    """Compute the shapes of all ids; returns (status, rank of the first bad merge)."""
    num_codes, starts, cells, edges = (
        tables.num_codes,
        tables.cell_start,
        tables.cells,
        tables.edges,
    )
    edge_start, edge_end = tables.edge_start, tables.edge_end
    for code in range(num_codes):
        cells[code], tables.codes[code] = 0, code
        edge_end[code] = list_edges(cells, code, code + 1, edges, edge_start[code])
    for rank in range(len(tables.merges)):
        a, b, step = tables.merges[rank]
        new = num_codes + rank
        if not unite_cells(cells, tables.codes, starts, a, b, step, new):
            return SHAPES_OVERLAP, rank
        if not touches(edges[edge_start[a] : edge_end[a]], cells[starts[b] : starts[b + 1]], step):
            return SHAPES_APART, rank
        edge_end[new] = list_edges(cells, starts[new], starts[new + 1], edges, edge_start[new])
    return SHAPES_FINE, -1


@kernel
def fill_slots(tables: Tables) -> int:
    """Insert all merges into the hash table. Returns the rank of a repeated merge, or -1."""
    keys, mask = tables.slot_keys, len(tables.slot_keys) - 1
    for rank in range(len(tables.merges)):
        a, b, step = tables.merges[rank]
        key = pair_key(a, b, step)
        slot = hash_slot(key, mask)
        while keys[slot] >= 0:
            if keys[slot] == key:
                return rank
            slot = (slot + 1) & mask
        keys[slot], tables.slot_ranks[slot] = key, rank
    return -1


@kernel
def find_rank(slot_keys: Ints, slot_ranks: Ints, key: int) -> int:
    """Rank of the merge with this key, or -1."""
    mask = len(slot_keys) - 1
    slot = hash_slot(key, mask)
    while slot_keys[slot] >= 0:
        if slot_keys[slot] == key:
            return slot_ranks[slot]
        slot = (slot + 1) & mask
    return -1


# ---- the board ----


@kernel
def place_images(board: Ints, stride: int, grids: Ints, origins: Ints) -> None:
    """Write code grids [N, H, W] int32 with their upper left cells at `origins` [N]."""
    for image in range(len(grids)):
        for y in range(grids.shape[1]):
            row = origins[image] + y * stride
            for x in range(grids.shape[2]):
                board[row + x] = grids[image, y, x]


@kernel
def join_tokens(
    board: Ints, anchor: int, other: int, cells: Ints, start: int, end: int, stride: int
) -> None:
    """Move the cells `cells[start:end]` of the token at `other` to the token at `anchor`."""
    for i in range(start, end):
        cell = other + step_offset(cells[i], stride)
        board[cell] = anchor - cell


@kernel
def step_after(column: int, distance: int, stride: int) -> int:
    """The step from an anchor in board column `column` to the anchor `distance` cells later."""
    reach = column + distance
    if reach < stride:
        return distance
    dy = 1 if reach < 2 * stride else reach // stride
    return distance + dy * (SPAN - stride)


@inlined
def key_of_neighbours(board: Ints, column: int, anchor: int, neighbour: int, stride: int) -> int:
    """Key of the pair of two touching anchors; `anchor` is in board column `column`."""
    if neighbour > anchor:
        step = step_after(column, neighbour - anchor, stride)
        return pair_key(board[anchor], board[neighbour], step)
    step = step_after(stride - 1 - column, anchor - neighbour, stride)  # mirrored
    return pair_key(board[neighbour], board[anchor], step)


# ---- the encoder ----


@kernel
def encode_images(tables: Tables, grids: Ints, ids: Ints, lengths: Ints) -> int:
    """Encode `grids` [N, H, W] int32 into `ids` and `lengths` [N]; returns the number of ids."""
    num_images, height, width = grids.shape
    stride = width + 1
    board = np.full((height + 2) * stride + 1, BORDER, np.int32)
    origins = np.full(1, stride, np.int64)
    heads = np.full(len(tables.merges), -1, np.int32)
    room = 2 * height * width + 64
    links, places = np.empty(room, np.int32), np.empty(room, np.int32)
    written = 0
    for image in range(num_images):
        place_images(board, stride, grids[image : image + 1], origins)
        while not encode_board(board, stride, height, tables, heads, links, places):
            room *= 2
            links, places = np.empty(room, np.int32), np.empty(room, np.int32)
            place_images(board, stride, grids[image : image + 1], origins)
        first = written
        for cell in range(stride, (height + 1) * stride):
            if board[cell] >= 0:
                ids[written] = board[cell]
                written += 1
        lengths[image] = written - first
    return written


@kernel
def encode_board(
    board: Ints, stride: int, height: int, tables: Tables, heads: Ints, links: Ints, places: Ints
) -> bool:
    """Apply all merges to a board of one image; False, with `heads` empty again, if `links` and
    `places` are too short.

    Places where a merge may apply wait in one linked list per rank: `heads[rank]` is its last entry
    (-1: none), `links` points from an entry to the one before it, `places` holds its anchor. A new
    token only makes pairs of higher rank, so one pass over the ranks applies every merge to all its
    places. Only a merge of equal tokens, which can overlap itself, needs raster order.
    """
    # Arrays are unpacked once, because reading a tuple's field counts a reference atomically.
    merges, cell_start, cells = tables.merges, tables.cell_start, tables.cells
    edge_start, edge_end, edges = tables.edge_start, tables.edge_end, tables.edges
    keys, ranks = tables.slot_keys, tables.slot_ranks
    size = list_code_pairs(board, stride, height, tables, heads, links, places)
    for rank in range(len(merges)):
        entry = heads[rank]
        if entry < 0:
            continue
        heads[rank] = -1
        a, b, new = merges[rank, 0], merges[rank, 1], tables.num_codes + rank
        offset = step_offset(merges[rank, 2], stride)
        if a == b:
            entry = sort_places(entry, links, places)
        first, last = edge_start[new], edge_end[new]
        start, end = cell_start[b], cell_start[b + 1]
        while entry >= 0:
            anchor, entry = places[entry], links[entry]
            if board[anchor] != a or board[anchor + offset] != b:
                continue
            if size + last - first > len(links):
                heads[:] = -1
                return False
            board[anchor] = new
            join_tokens(board, anchor, anchor + offset, cells, start, end, stride)
            column = anchor % stride
            for i in range(first, last):
                neighbour = anchor + step_offset(edges[i], stride)
                if board[neighbour] == BORDER:
                    continue
                if board[neighbour] < 0:
                    neighbour += board[neighbour]
                # A neighbour that touches twice is added twice; the second entry finds it gone.
                key = key_of_neighbours(board, column, anchor, neighbour, stride)
                found = find_rank(keys, ranks, key)
                if found >= 0:
                    links[size], places[size] = heads[found], min(anchor, neighbour)
                    heads[found] = size
                    size += 1
    return True


@kernel
def list_code_pairs(
    board: Ints, stride: int, height: int, tables: Tables, heads: Ints, links: Ints, places: Ints
) -> int:
    """Start the lists of `encode_board` with the pairs of codes; returns the number of entries."""
    keys, ranks = tables.slot_keys, tables.slot_ranks
    size = 0
    for cell in range(stride, (height + 1) * stride):
        for down in range(2):
            other = board[cell + stride] if down else board[cell + 1]
            if board[cell] >= 0 and other >= 0:
                found = find_rank(keys, ranks, pair_key(board[cell], other, SPAN if down else 1))
                if found >= 0:
                    links[size], places[size], heads[found] = heads[found], cell, size
                    size += 1
    return size


@kernel
def sort_places(entry: int, links: Ints, places: Ints) -> int:
    """Insertion sort of a linked list, so that its places ascend; returns its first entry."""
    first = -1
    while entry >= 0:
        before = links[entry]
        if first < 0 or places[entry] <= places[first]:
            links[entry], first = first, entry
        else:
            at = first
            while links[at] >= 0 and places[links[at]] < places[entry]:
                at = links[at]
            links[entry], links[at] = links[at], entry
        entry = before
    return first


@kernel
def paint_streams(
    board: Ints, stride: int, origins: Ints, size: tuple[int, int], ids: Ints, tables: Tables
) -> None:
    """Replace code images, all of `size` (height, width), by the tokens of their streams."""
    cells, cell_start = tables.cells, tables.cell_start
    at = 0
    for origin in origins:
        for row in range(origin, origin + size[0] * stride, stride):
            for cell in range(row, row + size[1]):
                if board[cell] >= 0:  # not yet part of an earlier token
                    token = ids[at]
                    at += 1
                    board[cell] = token
                    start, end = cell_start[token], cell_start[token + 1]
                    join_tokens(board, cell, cell, cells, start + 1, end, stride)


# ---- the decoder ----

STREAM_FINE, STREAM_UNKNOWN_ID, STREAM_OUTSIDE = 0, 1, 2
STREAM_OVERLAP, STREAM_TOO_LONG, STREAM_TOO_SHORT = 3, 4, 5


@kernel
def decode_stream(ids: Ints, tables: Tables, grid: Ints, anchors: Ints) -> tuple[int, int]:
    """Fill `grid` [H, W] int32, initially all -1, and `anchors` int64, the cell of each id's anchor
    (at most one per cell). Returns (status, position in `ids`).
    """
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
        anchors[position] = cell
        if token < tables.num_codes:  # the most frequent case
            flat[cell] = token
            cell += 1
            continue
        y, x = cell // width, cell % width
        for i in range(tables.cell_start[token], tables.cell_start[token + 1]):
            dy, dx = step_parts(tables.cells[i])
            row, column = y + dy, x + dx
            if row >= height or column < 0 or column >= width:
                return STREAM_OUTSIDE, position
            if grid[row, column] >= 0:
                return STREAM_OVERLAP, position
            grid[row, column] = tables.codes[i]
    for left in range(cell, len(flat)):
        if flat[left] < 0:
            return STREAM_TOO_SHORT, len(ids)
    return STREAM_FINE, -1


@kernel
def streams_decode_to(ids: Ints, offsets: Ints, sides: Ints, codes: Ints, tables: Tables) -> bool:
    """Whether each stream n, `ids[offsets[n]:offsets[n + 1]]`, fills a grid of `sides[n]` x
    `sides[n]` cells, and the first grids, end to end, equal `codes`.
    """
    largest = 0
    for side in sides:
        largest = max(largest, side)
    room = np.empty(largest * largest, np.int32)
    anchors = np.empty(largest * largest, np.int64)
    at = 0
    for n in range(len(sides)):
        grid = room[: sides[n] * sides[n]]
        grid[:] = -1
        stream = ids[offsets[n] : offsets[n + 1]]
        square = grid.reshape(sides[n], sides[n])
        if decode_stream(stream, tables, square, anchors)[0] != STREAM_FINE:
            return False
        if at < len(codes):
            if at + len(grid) > len(codes):
                return False
            for cell in range(len(grid)):
                if grid[cell] != codes[at + cell]:
                    return False
            at += len(grid)
    return at == len(codes)


@kernel
def anchor_positions(image_ids: Ints, tables: Tables, positions: Ints) -> int:
    """Fill `positions` int64 [n] of a token row: an image token has the position of its anchor's
    cell, and tokens after an image continue after its last cell. `image_ids` int32 [n] is -1 for
    other tokens. Returns the start of an image that does not fill a square grid, or -1. The width
    of an image that is truncated by the end of the row is unknown: its tokens count one by one.
    """
    at, next_position = 0, 0
    while at < len(image_ids):
        end, num_cells = at, 0
        while end < len(image_ids) and image_ids[end] >= 0:
            if image_ids[end] >= len(tables.cell_start) - 1:
                return at
            num_cells += tables.cell_start[image_ids[end] + 1] - tables.cell_start[image_ids[end]]
            end += 1
        if end == at:  # not an image
            end, num_cells = at + 1, 1
        is_placed = False
        if num_cells > end - at:  # without merged tokens, the grid may have any shape
            side = int(np.sqrt(num_cells))
            grid = np.full((side, side), -1, np.int32)
            status, _ = decode_stream(image_ids[at:end], tables, grid, positions[at:end])
            is_placed = status == STREAM_FINE
            if not is_placed and end < len(image_ids):
                return at
        if not is_placed:
            for i in range(at, end):
                positions[i] = i - at
        positions[at:end] += next_position
        next_position += num_cells
        at = end
    return -1
