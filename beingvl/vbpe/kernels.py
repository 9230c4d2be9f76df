"""The fast twin of `vbpe.py`, compiled with numba. Same rules, same results bit for bit; only
the data structures differ.

One file, because numba notices on its own only when the file of a cached kernel changes, not those
it calls into.

**Displacements** are one integer: `step = dy * SPAN + dx`. Sorting steps sorts (dy, dx) in raster
order, and a pair of tokens is one int64 key `a << 44 | b << 24 | step` whose order is that of (a,
b, dy, dx).

**The board** is one int32 per cell. A cell >= 0 is the anchor of a token and holds its id. A cell <
0 belongs to a token whose anchor lies that many cells earlier. BORDER cells surround every image,
so no kernel ever compares coordinates with a width:

    codes        board (stride 3)            after merging (7, 8, 0, 1) -> 9
                 #  #  #                     #  #  #
    7 8          7  8  #                     9 -1  #
    7 5          7  5  #                     7  5  #
                 #  #  #                     #  #  #

**Shapes.** `cells` of a token are the steps from its anchor, sorted; `edges` are the steps of all
cells that touch it, sorted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numba
import numpy as np

from beingvl.errors import InputError

SPAN = 8192  # steps per row; |dx| <= MAX_SIDE + 1 stays below half of it
BORDER = -(1 << 30)

SHAPES_FINE, SHAPES_OVERLAP, SHAPES_APART = 0, 1, 2

_kernel = numba.njit(cache=True, nogil=True)


class Tables(NamedTuple):
    """What the encoder and decoder need to know of a vocabulary with V ids.

    Token i covers `cells[cell_start[i]:cell_start[i + 1]]` with `codes[…]` of the same range and
    touches `edges[edge_start[i]:edge_end[i]]`. `slot_keys`/`slot_ranks` is an open hash table from
    a pair's key to the merge's rank.
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
def step_offset(step: int, stride: int) -> int:
    """Distance in board cells of a step."""
    dy = (step + SPAN // 2) >> 13
    return dy * stride + step - dy * SPAN


@_kernel
def pair_key(a: int, b: int, step: int) -> int:
    return (a << 44) | (b << 24) | step


@_kernel
def hash_slot(key: int, mask: int) -> int:
    mixed = key * -7046029254386353131  # 2**64 / golden ratio
    return (mixed ^ (mixed >> 29)) & mask


# ---- shapes ----


@_kernel
def unite_cells(
    cells: np.ndarray,
    codes: np.ndarray,
    a_start: int,
    a_end: int,
    b_start: int,
    b_end: int,
    step: int,
    out: int,
) -> bool:
    """Write the sorted union of token a's cells and token b's cells moved by `step` at `out`;
    False when they overlap.
    """
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
def list_edges(cells: np.ndarray, start: int, end: int, edges: np.ndarray, out: int) -> int:
    """Write the sorted steps of all cells that touch a token at `out`; returns the end. At most
    2 x cells + 2.

    The cells above, left, right and below are four sorted lists; this merges them and leaves out
    the token's own cells.
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


@_kernel
def touches(
    edges: np.ndarray,
    edge_start: int,
    edge_end: int,
    cells: np.ndarray,
    start: int,
    end: int,
    step: int,
) -> bool:
    """Whether a token's cells, moved by `step`, meet the (sorted) edges of another."""
    i = edge_start
    for j in range(start, end):
        while i < edge_end and edges[i] < cells[j] + step:
            i += 1
        if i < edge_end and edges[i] == cells[j] + step:
            return True
    return False


@_kernel
def build_shapes(
    num_codes: int,
    merges: np.ndarray,
    cell_start: np.ndarray,
    edge_start: np.ndarray,
    edge_end: np.ndarray,
    cells: np.ndarray,
    codes: np.ndarray,
    edges: np.ndarray,
) -> tuple[int, int]:
    """Fill the shapes of all ids. Returns (status, rank): SHAPES_OVERLAP or SHAPES_APART with
    the rank of the first bad merge.
    """
    for code in range(num_codes):
        cells[code] = 0
        codes[code] = code
        edge_end[code] = list_edges(cells, code, code + 1, edges, edge_start[code])
    for rank in range(len(merges)):
        a, b, step = merges[rank]
        new = num_codes + rank
        b_start, b_end = cell_start[b], cell_start[b + 1]
        if not unite_cells(
            cells, codes, cell_start[a], cell_start[a + 1], b_start, b_end, step, cell_start[new]
        ):
            return SHAPES_OVERLAP, rank
        if not touches(edges, edge_start[a], edge_end[a], cells, b_start, b_end, step):
            return SHAPES_APART, rank
        edge_end[new] = list_edges(
            cells, cell_start[new], cell_start[new + 1], edges, edge_start[new]
        )
    return SHAPES_FINE, -1


@_kernel
def fill_slots(merges: np.ndarray, slot_keys: np.ndarray, slot_ranks: np.ndarray) -> int:
    """Insert every merge into the hash table. Returns the rank of a merge that is there twice,
    or -1.
    """
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
def find_rank(slot_keys: np.ndarray, slot_ranks: np.ndarray, key: int) -> int:
    """Rank of the merge with this key, or -1."""
    mask = len(slot_keys) - 1
    slot = hash_slot(key, mask)
    while slot_keys[slot] >= 0:
        if slot_keys[slot] == key:
            return slot_ranks[slot]
        slot = (slot + 1) & mask
    return -1


# ---- the board ----


@_kernel
def place_images(board: np.ndarray, stride: int, grids: np.ndarray, origins: np.ndarray) -> None:
    """Write code grids [N, H, W] int32 with their upper left cells at `origins` [N]."""
    for image in range(len(grids)):
        for y in range(grids.shape[1]):
            row = origins[image] + y * stride
            for x in range(grids.shape[2]):
                board[row + x] = grids[image, y, x]


@_kernel
def join_tokens(
    board: np.ndarray, anchor: int, other: int, cells: np.ndarray, start: int, end: int, stride: int
) -> None:
    """Hand the cells `cells[start:end]` of the token at `other` to the token at the earlier
    `anchor`.
    """
    for i in range(start, end):
        cell = other + step_offset(cells[i], stride)
        board[cell] = anchor - cell


@_kernel
def step_after(column: int, distance: int, stride: int) -> int:
    """The step from an anchor in board column `column` to the anchor `distance` cells later."""
    reach = column + distance
    if reach < stride:
        return distance
    dy = 1 if reach < 2 * stride else reach // stride
    return distance + dy * (SPAN - stride)


@_kernel
def step_before(column: int, distance: int, stride: int) -> int:
    """The step to an anchor in board column `column` from the anchor `distance` cells earlier."""
    reach = stride - 1 - column + distance
    if reach < stride:
        return distance
    dy = 1 if reach < 2 * stride else reach // stride
    return distance + dy * (SPAN - stride)


# ---- the encoder ----


@_kernel
def encode_images(grids: np.ndarray, tables: Tables, ids: np.ndarray, lengths: np.ndarray) -> int:
    """Encode `grids` [N, H, W] int32 into `ids` (flat, at least N x H x W long) and `lengths`
    [N]; returns the number of ids.
    """
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


@_kernel
def encode_board(
    board: np.ndarray,
    stride: int,
    height: int,
    tables: Tables,
    heads: np.ndarray,
    links: np.ndarray,
    places: np.ndarray,
) -> bool:
    """Apply all merges to a board of one image; False, with `heads` empty again, when `links`
    and `places` are too short.

    Places where a merge may apply wait in one linked list per rank: `heads[rank]` is its last entry
    (-1: none), `links` leads from an entry to the one before it, `places` holds its anchor. A new
    token only makes pairs of higher rank, so one walk over the ranks applies every merge to all its
    places; only a merge of equal tokens, which can overlap itself, needs raster order.
    """
    # Arrays are unpacked once: a field of a tuple costs an atomic reference count wherever it is
    # read.
    merges, cell_start, cells = tables.merges, tables.cell_start, tables.cells
    edge_start, edge_end, edges = tables.edge_start, tables.edge_end, tables.edges
    slot_keys, slot_ranks = tables.slot_keys, tables.slot_ranks
    size = 0
    for cell in range(stride, (height + 1) * stride):
        token = board[cell]
        if token >= 0:
            for down in range(2):
                other = board[cell + stride] if down else board[cell + 1]
                if other >= 0:
                    found = find_rank(
                        slot_keys, slot_ranks, pair_key(token, other, SPAN if down else 1)
                    )
                    if found >= 0:
                        links[size], places[size], heads[found] = heads[found], cell, size
                        size += 1
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
        while entry >= 0:
            anchor, entry = places[entry], links[entry]
            if board[anchor] != a or board[anchor + offset] != b:
                continue
            if size + last - first > len(links):
                heads[:] = -1
                return False
            board[anchor] = new
            join_tokens(
                board, anchor, anchor + offset, cells, cell_start[b], cell_start[b + 1], stride
            )
            column = anchor % stride
            for i in range(first, last):
                neighbour = anchor + step_offset(edges[i], stride)
                other = board[neighbour]
                if other < 0:
                    if other == BORDER:
                        continue
                    neighbour += other
                    other = board[neighbour]
                if neighbour > anchor:
                    key = pair_key(new, other, step_after(column, neighbour - anchor, stride))
                else:
                    key = pair_key(other, new, step_before(column, anchor - neighbour, stride))
                found = find_rank(slot_keys, slot_ranks, key)
                if (
                    found >= 0
                    # a neighbour that touches twice is added twice; the second one finds the tokens
                    # gone
                ):
                    links[size], places[size], heads[found] = (
                        heads[found],
                        min(anchor, neighbour),
                        size,
                    )
                    size += 1
    return True


@_kernel
def sort_places(entry: int, links: np.ndarray, places: np.ndarray) -> int:
    """Relink a list so that its places ascend; returns its first entry. Insertion: a list is
    nearly sorted, the largest first.
    """
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


@_kernel
def paint_streams(
    board: np.ndarray,
    stride: int,
    origins: np.ndarray,
    size: tuple[int, int],
    ids: np.ndarray,
    tables: Tables,
) -> None:
    """Turn images of codes on a board, all of `size` (height, width), into the tokens of their
    streams.
    """
    cells, cell_start = tables.cells, tables.cell_start
    at = 0
    for image in range(len(origins)):
        for y in range(size[0]):
            for cell in range(origins[image] + y * stride, origins[image] + y * stride + size[1]):
                if board[cell] >= 0:  # not yet part of an earlier token
                    token = ids[at]
                    at += 1
                    board[cell] = token
                    join_tokens(
                        board,
                        cell,
                        cell,
                        cells,
                        cell_start[token] + 1,
                        cell_start[token + 1],
                        stride,
                    )


# ---- the decoder ----

(
    STREAM_FINE,
    STREAM_UNKNOWN_ID,
    STREAM_OUTSIDE,
    STREAM_OVERLAP,
    STREAM_TOO_LONG,
    STREAM_TOO_SHORT,
) = 0, 1, 2, 3, 4, 5


@_kernel
def decode_stream(ids: np.ndarray, tables: Tables, grid: np.ndarray) -> tuple[int, int]:
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
        if token < tables.num_codes:  # as most are
            flat[cell] = token
            cell += 1
            continue
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


@_kernel
def decode_streams(
    ids: np.ndarray, offsets: np.ndarray, sides: np.ndarray, tables: Tables, codes: np.ndarray
) -> np.ndarray:
    """Decode stream n, `ids[offsets[n]:offsets[n + 1]]`, to a grid of `sides[n]` x `sides[n]`.
    The grids lie end to end in `codes` int32, all -1 on entry. Returns bool [N]: fills its grid.
    """
    fills = np.empty(len(sides), np.bool_)
    at = 0
    for n in range(len(sides)):
        side = sides[n]
        grid = codes[at : at + side * side].reshape(side, side)
        status, _ = decode_stream(ids[offsets[n] : offsets[n + 1]], tables, grid)
        fills[n] = status == STREAM_FINE
        at += side * side
    return fills


# ---- published vocabularies ----


@_kernel
def encode_legacy_images(
    grids: np.ndarray, num_codes: int, merges: np.ndarray, ids: np.ndarray, lengths: np.ndarray
) -> int:
    """The fast twin of `vbpe_legacy.encode_legacy_reference` for `grids` [N, H, W] int32;
    returns the number of ids.

    `present` counts the ids of an image: a merge whose tokens are not there is passed over without
    reading the stream.
    """
    num_images, height, width = grids.shape
    present = np.zeros(num_codes + len(merges), np.int64)
    written = 0
    for image in range(num_images):
        stream = ids[written : written + height * width]
        size = flatten_first(grids[image], num_codes, merges, stream)
        present[:] = 0
        for i in range(size):
            present[stream[i]] += 1
        for rank in range(1, len(merges)):
            first, second = merges[rank]
            if present[first] and present[second]:
                merged = replace_pairs(stream, size, first, second, num_codes + rank)
                present[first] -= size - merged
                present[second] -= size - merged
                present[num_codes + rank] += size - merged
                size = merged
        lengths[image] = size
        written += size
    return written


@_kernel
def flatten_first(grid: np.ndarray, num_codes: int, merges: np.ndarray, stream: np.ndarray) -> int:
    """The first merge, on the grid: right neighbour, else lower one. Writes the flat stream and
    returns its length.
    """
    height, width = grid.shape
    gone = np.zeros((height, width), np.bool_)
    first, second = (merges[0, 0], merges[0, 1]) if len(merges) else (-1, -1)
    size = 0
    for y in range(height):
        for x in range(width):
            if gone[y, x]:
                continue
            stream[size] = grid[y, x]
            if grid[y, x] == first:
                if x + 1 < width and not gone[y, x + 1] and grid[y, x + 1] == second:
                    gone[y, x + 1] = True
                    stream[size] = num_codes
                elif y + 1 < height and not gone[y + 1, x] and grid[y + 1, x] == second:
                    gone[y + 1, x] = True
                    stream[size] = num_codes
            size += 1
    return size


@_kernel
def replace_pairs(stream: np.ndarray, size: int, first: int, second: int, new: int) -> int:
    """Replace (first, second) by `new` from left to right, in place; returns the new length."""
    read, write = 0, 0
    while read < size:
        if stream[read] == first and read + 1 < size and stream[read + 1] == second:
            stream[write] = new
            read += 2
        else:
            stream[write] = stream[read]
            read += 1
        write += 1
    return write


# ---- the trainer ----
#
# After the round that makes token y, the count of a pair that contains y only falls: every new pair
# contains the newest token. So
#
# - a round writes the occurrences of its pairs once, grouped by pair, at the end of `places`: a
# *record* is one pair and its
#     slice of `places`; nothing is ever inserted later;
# - no count is kept up to date. A record's count is an upper bound, exact while neither of its
# tokens has been merged away
# since (`changed`), and made exact by re-reading its own slice (`recount`), which happens only to
# records that might win;
#   - a pair below `min_count` when it is written can never win and is not kept.
#
# One round, on the board above (`7 8 / 7 5`, pairs (7,8,0,1) (7,7,1,0) (7,5,0,1) (8,5,1,0), all
# with count 1):
#   choose     the record with the highest priority, here (7,8,0,1)
# merge      each of its places in raster order: the board becomes `9 -1 / 7 5`, changed[7] =
# changed[8] = this round
#   collect    the pairs of every new 9, each neighbour once: (9,7,1,0) (9,5,1,1)
# write      their records; (7,7,1,0) and (8,5,1,0) are stale now, which is found out when and if
# they come up

(
    NUM_RECORDS,
    NUM_PLACES,
    HEAP_SIZE,
    FLOOR,
    ROUND,
    POOL_SIZE,
    LARGEST,
    NUM_CELLS,
    NUM_TOKENS,
    NUM_COUNTERS,
) = range(10)
LEARNT, NOTHING_LEFT, SHAPES_FULL, POOL_FULL = 0, 1, 2, 3
SEEN = 1 << 29  # marks an anchor whose pair with the current token is already collected
RECORD, FIRST, SECOND, COUNT, EXACT_AT = range(5)  # columns of the pool
GROUP_BITS = 24  # key >> 24 is the pair of tokens without their offset


class State(NamedTuple):
    """Everything the trainer holds, as arrays that the kernels change in place. B board cells,
    at most 2 B live pairs.
    """

    stride: int
    num_codes: int
    alpha: float
    sigma: float
    min_count: int
    board: np.ndarray  # int32 [B]
    places: np.ndarray  # int32: anchors of a, grouped by record
    keys: np.ndarray  # int64, a record's pair
    starts: np.ndarray  # int64, where its places start
    counts: np.ndarray  # int32, how many there are
    exact_at: np.ndarray  # int32, the round whose board `counts` is exact for
    heap: np.ndarray  # int32 record numbers, largest count first
    pool: np.ndarray  # int32 [P, 5]: copies of the candidates' fields, side by side for fast scans
    consistencies: np.ndarray  # float64 [P]: S of a pool entry; -1 = not computed yet
    changed: np.ndarray  # int32 [V]: last round that merged the token away
    cell_start: np.ndarray  # int64 [V + 1]
    cells: np.ndarray  # int32 steps
    codes: np.ndarray  # int32
    merges: np.ndarray  # int32 [R, 4]: a, b, step, number of replacements
    counters: np.ndarray  # int64 [NUM_COUNTERS]


# ---- records ----


@_kernel
def recount(state: State, record: int) -> int:
    """Drop the places of a record whose tokens are gone; its count is exact afterwards and
    returned.
    """
    board, places = state.board, state.places
    a, b = state.keys[record] >> 44, (state.keys[record] >> GROUP_BITS) & 0xFFFFF
    offset = step_offset(state.keys[record] & 0xFFFFFF, state.stride)
    start = state.starts[record]
    kept = start
    for i in range(start, start + state.counts[record]):
        place = places[i]
        if board[place] == a and board[place + offset] == b:
            places[kept] = place
            kept += 1
    state.counts[record] = kept - start
    state.exact_at[record] = state.counters[ROUND]
    return kept - start


@_kernel
def is_exact(state: State, record: int) -> bool:
    a, b = state.keys[record] >> 44, (state.keys[record] >> GROUP_BITS) & 0xFFFFF
    return max(state.changed[a], state.changed[b]) <= state.exact_at[record]


@_kernel
def is_before(counts: np.ndarray, keys: np.ndarray, record: int, other: int) -> bool:
    """Heap order: higher count, then smaller (a, b, dy, dx)."""
    return counts[record] > counts[other] or (
        counts[record] == counts[other] and keys[record] < keys[other]
    )


@_kernel
def push_record(state: State, record: int) -> None:
    heap, counts, keys = state.heap, state.counts, state.keys
    at = state.counters[HEAP_SIZE]
    state.counters[HEAP_SIZE] = at + 1
    while at > 0:
        parent = (at - 1) >> 1
        if not is_before(counts, keys, record, heap[parent]):
            break
        heap[at] = heap[parent]
        at = parent
    heap[at] = record


@_kernel
def sink_record(state: State) -> None:
    """Restore the heap after its top record's count fell."""
    heap, counts, keys, size = state.heap, state.counts, state.keys, state.counters[HEAP_SIZE]
    record = heap[0]
    at, child = 0, 1
    while child < size:
        if child + 1 < size and is_before(counts, keys, heap[child + 1], heap[child]):
            child += 1
        if not is_before(counts, keys, heap[child], record):
            break
        heap[at] = heap[child]
        at = child
        child = 2 * at + 1
    heap[at] = record


@_kernel
def pop_record(state: State) -> None:
    state.counters[HEAP_SIZE] -= 1
    state.heap[0] = state.heap[state.counters[HEAP_SIZE]]
    if state.counters[HEAP_SIZE] > 1:
        sink_record(state)


@_kernel
def lower_floor(state: State) -> None:
    """Let the next records into the heap. It holds those with `counts >= floor` that are not in
    the pool; most never come up.
    """
    counters, counts = state.counters, state.counts
    old = counters[FLOOR]
    new = max(state.min_count, old * 3 // 4)
    for record in range(counters[NUM_RECORDS]):
        if new <= counts[record] < old:
            push_record(state, record)
    counters[FLOOR] = new


@_kernel
def compact(state: State) -> None:
    """Recount every record and close the gaps. A record goes when no offset of its pair can win
    any more.
    """
    counters = state.counters
    num_records = counters[NUM_RECORDS]
    kept_records, kept_places = 0, 0
    first = 0
    while first < num_records:
        last, alive = first, False
        while (
            last < num_records and state.keys[last] >> GROUP_BITS == state.keys[first] >> GROUP_BITS
        ):
            alive |= recount(state, last) >= state.min_count
            last += 1
        for record in range(first, last if alive else first):
            start, count = state.starts[record], state.counts[record]
            for i in range(count):
                state.places[kept_places + i] = state.places[start + i]
            state.keys[kept_records] = state.keys[record]
            state.starts[kept_records] = kept_places
            state.counts[kept_records] = count
            state.exact_at[kept_records] = counters[ROUND]
            kept_places += count
            kept_records += 1
        first = last
    counters[NUM_RECORDS], counters[NUM_PLACES] = kept_records, kept_places
    counters[HEAP_SIZE] = counters[POOL_SIZE] = 0
    for record in range(kept_records):
        if state.counts[record] >= counters[FLOOR]:
            push_record(state, record)


# ---- choose ----


@_kernel
def choose_by_count(state: State) -> int:
    """The record with the highest count (ties: smallest pair), out of the heap; -1 when none
    reaches min_count.
    """
    counters = state.counters
    while True:
        if counters[HEAP_SIZE] == 0:
            if counters[FLOOR] <= state.min_count:
                return -1
            lower_floor(state)
            continue
        top = state.heap[0]
        if is_exact(state, top):
            counters[LARGEST] = state.counts[top]
            pop_record(state)
            return top
        if recount(state, top) >= counters[FLOOR]:
            sink_record(state)
        else:
            pop_record(state)


@_kernel
def is_fresh(pool: np.ndarray, changed: np.ndarray, at: int) -> bool:
    """Whether the count of a pool entry is exact."""
    return max(changed[pool[at, FIRST]], changed[pool[at, SECOND]]) <= pool[at, EXACT_AT]


@_kernel
def refresh(state: State, at: int) -> int:
    """Make the count of a pool entry exact and return it; its S is forgotten when it was not."""
    pool = state.pool
    if not is_fresh(pool, state.changed, at):
        pool[at, COUNT] = recount(state, pool[at, RECORD])
        pool[at, EXACT_AT] = state.counters[ROUND]
        state.consistencies[at] = -1.0
    return pool[at, COUNT]


@_kernel
def find_largest(state: State) -> int:
    """The largest count of all records, which is then in the pool; 0 when none reaches
    min_count, -1 when the pool is full.
    """
    counters, pool = state.counters, state.pool
    largest = 0
    at = 0
    while at < counters[POOL_SIZE]:
        if pool[at, COUNT] > largest and refresh(state, at) < counters[FLOOR]:
            leave_pool(
                state, at
            )  # at once: `lower_floor` takes what is below the floor for outside
        else:
            largest = max(largest, pool[at, COUNT])
            at += 1
    while True:
        while counters[HEAP_SIZE] and state.counts[state.heap[0]] > largest:
            at = counters[POOL_SIZE]
            if at == len(pool):
                return -1
            enter_pool(state)
            if refresh(state, at) < counters[FLOOR]:
                leave_pool(state, at)
            else:
                largest = max(largest, pool[at, COUNT])
        if counters[FLOOR] <= max(state.min_count, largest + 1):
            return largest
        lower_floor(state)


@_kernel
def enter_pool(state: State) -> None:
    """Move the top of the heap into the pool."""
    pool, at, record = state.pool, state.counters[POOL_SIZE], state.heap[0]
    pool[at, RECORD] = record
    pool[at, FIRST], pool[at, SECOND] = (
        state.keys[record] >> 44,
        (state.keys[record] >> GROUP_BITS) & 0xFFFFF,
    )
    pool[at, COUNT], pool[at, EXACT_AT] = state.counts[record], state.exact_at[record]
    state.consistencies[at] = -1.0
    state.counters[POOL_SIZE] = at + 1
    pop_record(state)


@_kernel
def measure_consistency(state: State, record: int) -> float:
    """S of a record's pair of tokens, from the exact counts of all its offsets, which are its
    neighbours among the records.

    The arithmetic is that of `vbpe.spatial_consistency`, operation by operation. Counts of records
    in the heap must not change there, so only those below the floor are kept.
    """
    group = state.keys[record] >> GROUP_BITS
    first, last = record, record + 1
    while first > 0 and state.keys[first - 1] >> GROUP_BITS == group:
        first -= 1
    while last < state.counters[NUM_RECORDS] and state.keys[last] >> GROUP_BITS == group:
        last += 1
    if last - first == 1:
        return 1.0
    exact = np.empty(last - first, np.int64)
    total, sum_y, sum_x = 0, 0, 0
    for i in range(first, last):
        count = count_places(state, i)
        exact[i - first] = count
        step = state.keys[i] & 0xFFFFFF
        dy = (step + SPAN // 2) >> 13
        total += count
        sum_y += dy * count
        sum_x += (step - dy * SPAN) * count
    mean_y, mean_x = sum_y / total, sum_x / total
    consistency = 0.0
    for i in range(first, last):
        if exact[i - first]:
            step = state.keys[i] & 0xFFFFFF
            dy = (step + SPAN // 2) >> 13
            dx = step - dy * SPAN
            squared_distance = (dy - mean_y) * (dy - mean_y) + (dx - mean_x) * (dx - mean_x)
            consistency += exact[i - first] * math.exp(
                -squared_distance / (2.0 * state.sigma * state.sigma)
            )
    return math.floor(consistency / total * 2.0**30 + 0.5) / 2.0**30


@_kernel
def count_places(state: State, record: int) -> int:
    if is_exact(state, record):
        return state.counts[record]
    if state.counts[record] < state.counters[FLOOR]:
        return recount(state, record)
    a, b = state.keys[record] >> 44, (state.keys[record] >> GROUP_BITS) & 0xFFFFF
    offset = step_offset(state.keys[record] & 0xFFFFFF, state.stride)
    start, count = state.starts[record], 0
    for i in range(start, start + state.counts[record]):
        place = state.places[i]
        count += state.board[place] == a and state.board[place + offset] == b
    return count


@_kernel
def choose_by_priority(state: State) -> int:
    """The record with the highest P = count / largest + alpha S, out of the pool; -1: nothing
    left, -2: the pool is full.

    No P is above its bound, count / largest + alpha. So the pool holds what the bound of the best
    does not rule out; an unknown S is measured only while its bound may still win; the rest stays
    in the heap, which is sorted by count, thus by bound.
    """
    largest = find_largest(state)
    if largest <= 0:
        return -1 if largest == 0 else -2
    pool, consistencies, counters, alpha = (
        state.pool,
        state.consistencies,
        state.counters,
        state.alpha,
    )
    changed, counts, keys = state.changed, state.counts, state.keys
    counters[LARGEST] = largest
    best, best_priority = -1, -1.0
    for at in range(counters[POOL_SIZE]):
        if consistencies[at] >= 0.0 and is_fresh(pool, changed, at):
            priority = pool[at, COUNT] / largest + alpha * consistencies[at]
            if priority > best_priority or (
                priority == best_priority and is_before(counts, keys, pool[at, RECORD], best)
            ):
                best, best_priority = pool[at, RECORD], priority
    at = 0
    while True:
        if at == counters[POOL_SIZE]:
            if (
                counters[HEAP_SIZE]
                and state.counts[state.heap[0]] / largest + alpha >= best_priority
            ):
                if at == len(pool):
                    return -2
                enter_pool(state)
            elif (
                counters[FLOOR] > state.min_count
                and (counters[FLOOR] - 1) / largest + alpha >= best_priority
            ):
                lower_floor(state)
                continue
            else:
                break
        may_win = pool[at, COUNT] / largest + alpha >= best_priority
        if may_win and (consistencies[at] < 0.0 or not is_fresh(pool, changed, at)):
            may_win = refresh(state, at) >= counters[FLOOR]
            if may_win:
                consistencies[at] = measure_consistency(state, pool[at, RECORD])
                priority = pool[at, COUNT] / largest + alpha * consistencies[at]
                if priority > best_priority or (
                    priority == best_priority and is_before(counts, keys, pool[at, RECORD], best)
                ):
                    best, best_priority = pool[at, RECORD], priority
        if may_win:
            at += 1
        else:
            leave_pool(state, at)
    at = 0
    while pool[at, RECORD] != best:
        at += 1
    counters[POOL_SIZE] -= 1
    pool[at] = pool[counters[POOL_SIZE]]
    consistencies[at] = consistencies[counters[POOL_SIZE]]
    return best


@_kernel
def leave_pool(state: State, at: int) -> None:
    """Put a pool entry back into the heap, or below its floor; the last entry takes its place."""
    record = state.pool[at, RECORD]
    last = state.counters[POOL_SIZE] - 1
    state.counters[POOL_SIZE] = last
    state.pool[at] = state.pool[last]
    state.consistencies[at] = state.consistencies[last]
    if state.counts[record] >= state.counters[FLOOR]:
        push_record(state, record)


# ---- collect and write ----


class Found(NamedTuple):
    """Scratch for the pairs of one token: a small hash table that numbers and counts them."""

    slots: np.ndarray  # int32 [power of two]: number of a pair; -1 = free
    keys: np.ndarray  # int64 [pairs]
    slot_of: np.ndarray  # int32 [pairs]
    # int64 [pairs]: occurrences; while writing: 1 + where the next one goes in `places`, or
    # negative
    tallies: np.ndarray


@_kernel
def make_found(num_pairs: int) -> Found:
    return Found(
        np.full(4 * num_pairs, -1, np.int32),
        np.empty(num_pairs, np.int64),
        np.empty(num_pairs, np.int32),
        np.empty(num_pairs, np.int64),
    )


@_kernel
def find_slot(slots: np.ndarray, keys: np.ndarray, key: int) -> int:
    """Slot of a pair, or the free slot where it belongs."""
    mask = len(slots) - 1
    slot = hash_slot(key, mask)
    while slots[slot] >= 0 and keys[slots[slot]] != key:
        slot = (slot + 1) & mask
    return slot


@_kernel
def list_neighbours(
    board: np.ndarray,
    anchor: int,
    offsets: np.ndarray,
    start: int,
    end: int,
    neighbours: np.ndarray,
) -> int:
    """Write the anchors of the tokens that cover the cells at `offsets[start:end]`, each once;
    returns how many.
    """
    size = 0
    for i in range(start, end):
        neighbour = anchor + offsets[i]
        token = board[neighbour]
        if token < 0:
            if token == BORDER:
                continue
            neighbour += token
            token = board[neighbour]
        if not token & SEEN:
            board[neighbour] = token | SEEN
            neighbours[size] = neighbour
            size += 1
    for i in range(size):
        board[neighbours[i]] &= ~SEEN
    return size


@_kernel
def collect(
    board: np.ndarray,
    stride: int,
    anchors: np.ndarray,
    token: int,
    offsets: np.ndarray,
    keys: np.ndarray,
    places: np.ndarray,
) -> int:
    """Write the pair and the place of every pair of `token`, whose instances stand at `anchors`;
    returns how many.

    A pair of two such tokens is taken from the earlier one.
    """
    neighbours = np.empty(len(offsets), np.int64)
    size = 0
    for anchor in anchors:
        column = anchor % stride
        for i in range(list_neighbours(board, anchor, offsets, 0, len(offsets), neighbours)):
            neighbour = neighbours[i]
            other = board[neighbour]
            if neighbour > anchor:
                keys[size] = pair_key(token, other, step_after(column, neighbour - anchor, stride))
                places[size] = anchor
                size += 1
            elif other != token:
                keys[size] = pair_key(other, token, step_before(column, anchor - neighbour, stride))
                places[size] = neighbour
                size += 1
    return size


@_kernel
def tally(
    keys: np.ndarray,
    slots: np.ndarray,
    found_keys: np.ndarray,
    slot_of: np.ndarray,
    tallies: np.ndarray,
    pair_of: np.ndarray,
) -> int:
    """Number the different keys in order of appearance and count them; `pair_of` [len(keys)]
    gets their numbers.

    Returns how many there are, or -1, with empty slots, when there is no room for them.
    """
    num_pairs = 0
    for i in range(len(keys)):
        key = keys[i]
        slot = find_slot(slots, found_keys, key)
        pair = slots[slot]
        if pair < 0:
            if num_pairs == len(found_keys):
                slots[:] = -1
                return -1
            pair = num_pairs
            num_pairs += 1
            slots[slot] = pair
            found_keys[pair] = key
            slot_of[pair] = slot
            tallies[pair] = 0
        tallies[pair] += 1
        pair_of[i] = pair
    return num_pairs


@_kernel
def write_records(
    state: State, keys: np.ndarray, places: np.ndarray, found: Found, pair_of: np.ndarray
) -> Found:
    """Make records of the pairs that may win one day, in the order of their keys. `found` comes
    and leaves empty.

    With alpha, rarer offsets of the same two tokens are kept too: S counts them.
    """
    counters, state_places = state.counters, state.places
    num_pairs = tally(keys, found.slots, found.keys, found.slot_of, found.tallies, pair_of)
    while num_pairs < 0:
        found = make_found(2 * len(found.keys))
        num_pairs = tally(keys, found.slots, found.keys, found.slot_of, found.tallies, pair_of)
    tallies, found_keys, slots = found.tallies, found.keys, found.slots
    order = np.empty(num_pairs, np.int64)
    size = 0
    for pair in range(num_pairs):
        if tallies[pair] >= state.min_count:
            order[size] = found_keys[pair]
            size += 1
    if state.alpha > 0.0 and size:
        frequent = np.sort(order[:size])
        for pair in range(num_pairs):
            if tallies[pair] < state.min_count:
                group = found_keys[pair] >> GROUP_BITS
                at = np.searchsorted(frequent, group << GROUP_BITS)
                if at < len(frequent) and frequent[at] >> GROUP_BITS == group:
                    order[size] = found_keys[pair]
                    size += 1
    for pair in range(num_pairs):
        tallies[pair] = -tallies[pair]
    for key in np.sort(order[:size]):
        pair = slots[find_slot(slots, found_keys, key)]
        record, start = counters[NUM_RECORDS], counters[NUM_PLACES]
        count = -tallies[pair]
        state.keys[record] = key
        state.starts[record] = start
        state.counts[record] = count
        state.exact_at[record] = counters[ROUND]
        tallies[pair] = start + 1
        counters[NUM_RECORDS] = record + 1
        counters[NUM_PLACES] = start + count
        if count >= counters[FLOOR]:
            push_record(state, record)
    for i in range(len(keys)):
        pair = pair_of[i]
        if tallies[pair] > 0:
            state_places[tallies[pair] - 1] = places[i]
            tallies[pair] += 1
    slots_used = found.slot_of
    for pair in range(num_pairs):
        slots[slots_used[pair]] = -1
    return found


# ---- the rounds ----


@_kernel
def edge_offsets(state: State, token: int) -> np.ndarray:
    """Board distances from a token's anchor to all cells that touch it, ascending."""
    start, end = state.cell_start[token], state.cell_start[token + 1]
    edges = np.empty(2 * (end - start) + 2, np.int64)
    edges = edges[: list_edges(state.cells, start, end, edges, 0)]
    for i in range(len(edges)):
        edges[i] = step_offset(edges[i], state.stride)
    return edges


@_kernel
def index_board(state: State) -> None:
    """Write the records of all pairs on the board and open the heap.

    The pairs are dealt out to their first tokens in one walk over the board, so that only this walk
    reads it; then each token's share is counted by itself, in cache.
    """
    board, counters, stride = state.board, state.counters, state.stride
    num_ids = state.num_codes + counters[ROUND]
    offset_start = np.zeros(num_ids + 1, np.int64)
    offsets = np.empty(2 * counters[NUM_CELLS] + 2 * num_ids, np.int64)
    for token in range(num_ids):
        end = offset_start[token]
        for offset in edge_offsets(state, token):
            if offset > 0:  # what touches from before the anchor belongs to an earlier anchor
                offsets[end] = offset
                end += 1
        offset_start[token + 1] = end
    neighbours = np.empty(len(offsets), np.int64)
    starts = np.zeros(num_ids + 1, np.int64)
    for token in board:
        if token >= 0:
            counters[NUM_TOKENS] += 1
            starts[token + 1] += offset_start[token + 1] - offset_start[token]
    starts = np.cumsum(starts)
    ends = starts[:-1].copy()
    keys = np.empty(starts[-1], np.int64)
    places = np.empty(starts[-1], np.int32)
    for anchor in range(len(board)):
        token = board[anchor]
        if token >= 0:
            column, at = anchor % stride, ends[token]
            for i in range(
                list_neighbours(
                    board, anchor, offsets, offset_start[token], offset_start[token + 1], neighbours
                )
            ):
                if neighbours[i] > anchor:
                    keys[at] = pair_key(
                        token,
                        board[neighbours[i]],
                        step_after(column, neighbours[i] - anchor, stride),
                    )
                    places[at] = anchor
                    at += 1
            ends[token] = at
    found = make_found(1 << 12)
    pair_of = np.empty(np.max(ends - starts[:-1]), np.int32)
    counters[FLOOR] = 1 << 40  # nothing goes into the heap yet
    for token in range(num_ids):
        start, end = starts[token], ends[token]
        found = write_records(state, keys[start:end], places[start:end], found, pair_of)
    largest = 0
    for record in range(counters[NUM_RECORDS]):
        largest = max(largest, state.counts[record])
    counters[FLOOR] = max(largest + 1, state.min_count)


@_kernel
def merge_places(state: State, record: int, new: int) -> np.ndarray:
    """Merge every occurrence of a record, in raster order, and return the anchors of the new
    tokens.

    Only a pair of equal tokens can overlap itself (`a a a`): then the later occurrence finds its
    token gone.
    """
    board, stride, counters = state.board, state.stride, state.counters
    key = state.keys[record]
    a, b, step = key >> 44, (key >> GROUP_BITS) & 0xFFFFF, key & 0xFFFFFF
    offset = step_offset(step, stride)
    start, count = state.starts[record], state.counts[record]
    merged = 0
    for i in range(start, start + count):
        anchor = state.places[i]
        if a == b and (board[anchor] != a or board[anchor + offset] != b):
            continue
        board[anchor] = new
        join_tokens(
            board,
            anchor,
            anchor + offset,
            state.cells,
            state.cell_start[b],
            state.cell_start[b + 1],
            stride,
        )
        state.places[start + merged] = anchor
        merged += 1
    state.counts[record] = 0
    state.changed[a] = state.changed[b] = counters[ROUND] + 1
    merge = state.merges[counters[ROUND]]
    merge[0], merge[1], merge[2], merge[3] = a, b, step, merged
    counters[NUM_TOKENS] -= merged
    return state.places[start : start + merged].copy()


@_kernel
def learn(state: State, until: int) -> int:
    """Learn merges until there are `until`. Returns LEARNT, NOTHING_LEFT, or what has to grow
    before the next call.
    """
    counters = state.counters
    found = make_found(1 << 12)
    keys, places, pair_of = np.empty(0, np.int64), np.empty(0, np.int32), np.empty(0, np.int32)
    while counters[ROUND] < until:
        if counters[NUM_CELLS] * 3 > len(
            state.cells
        ):  # the new token has at most twice the cells of all others
            return SHAPES_FULL
        record = choose_by_count(state) if state.alpha == 0.0 else choose_by_priority(state)
        if record < 0:
            return NOTHING_LEFT if record == -1 else POOL_FULL
        new = state.num_codes + counters[ROUND]
        anchors = merge_places(state, record, new)
        counters[ROUND] += 1
        a, b, step = state.merges[counters[ROUND] - 1, :3]
        starts = state.cell_start
        starts[new + 1] = starts[new] + starts[a + 1] - starts[a] + starts[b + 1] - starts[b]
        unite_cells(
            state.cells,
            state.codes,
            starts[a],
            starts[a + 1],
            starts[b],
            starts[b + 1],
            step,
            starts[new],
        )
        counters[NUM_CELLS] = starts[new + 1]
        offsets = edge_offsets(state, new)
        if len(keys) < len(anchors) * len(offsets):
            room = 2 * len(anchors) * len(offsets)
            keys, places, pair_of = (
                np.empty(room, np.int64),
                np.empty(room, np.int32),
                np.empty(room, np.int32),
            )
        size = collect(state.board, state.stride, anchors, new, offsets, keys, places)
        if max(counters[NUM_PLACES], counters[NUM_RECORDS]) + size > len(state.places):
            compact(state)
        found = write_records(state, keys[:size], places[:size], found, pair_of)
    return LEARNT


# ---- the trainer as Python sees it ----


def plan_board(sizes: np.ndarray) -> tuple[int, int, np.ndarray]:
    """Where images of `sizes` [N, 2] (height, width) stand: (stride, board cells, origins int64
    [N] of their upper left cells).

    Images of one size stand below each other. A mixture fills shelves from the highest to the
    lowest image.
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
    """Learns merges from `corpora`, a list of code arrays [N, H, W] (int types, memory maps
    welcome, sizes may differ).

    `learnt` are merges to begin with (their shapes and hash table), from an earlier run on the same
    images.
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
        self.sizes = np.concatenate(
            [np.tile(corpus.shape[1:], (len(corpus), 1)) for corpus in corpora]
        )
        stride, num_cells, self.origins = plan_board(self.sizes)
        if num_cells >= 1 << 31:
            raise InputError(
                f"{len(self.sizes)} images need a board of {num_cells} cells, expected below "
                "2**31: use fewer images"
            )
        board = np.full(num_cells, BORDER, np.int32)
        first = 0
        for corpus in corpora:
            for start in range(0, len(corpus), 1024):
                chunk = np.ascontiguousarray(corpus[start : start + 1024], np.int32)
                origins = self.origins[first : first + len(chunk)]
                place_images(board, stride, chunk, origins)
                if learnt is not None:
                    ids, lengths = np.empty(chunk.size, np.int32), np.empty(len(chunk), np.int64)
                    encode_images(chunk, learnt, ids, lengths)
                    paint_streams(board, stride, origins, chunk.shape[1:], ids, learnt)
                first += len(chunk)
        self.num_cells = int(self.sizes.prod(axis=1).sum())
        self._state = _new_state(
            board, stride, self.num_cells, num_codes, alpha, sigma, min_count, learnt
        )
        index_board(self._state)

    def learn(self, until: int) -> bool:
        """Learn until there are `until` merges; False when no pair was left that occurs
        `min_count` times.
        """
        state = self._state
        more = until + 1 + state.num_codes - len(state.cell_start) + 1
        if more > 0:
            more = max(more, len(state.cell_start) // 2)
            self._state = state = state._replace(
                cell_start=_longer(state.cell_start, more),
                changed=_longer(state.changed, more),
                merges=_longer(state.merges, more),
            )
        while (status := learn(state, until)) in (SHAPES_FULL, POOL_FULL):
            if status == SHAPES_FULL:
                more = 3 * len(state.cells)
                state = state._replace(
                    cells=_longer(state.cells, more), codes=_longer(state.codes, more)
                )
            else:
                more = len(state.pool)
                state = state._replace(
                    pool=_longer(state.pool, more), consistencies=_longer(state.consistencies, more)
                )
            self._state = state
        return status == LEARNT

    @property
    def num_merges(self) -> int:
        return int(self._state.counters[ROUND])

    @property
    def num_tokens(self) -> int:
        """Tokens that the images have now, all together."""
        return int(self._state.counters[NUM_TOKENS])

    @property
    def best_count(self) -> int:
        """Largest count of the last round."""
        return int(self._state.counters[LARGEST])

    @property
    def merges(self) -> np.ndarray:
        """int32 [R, 4]: a, b, dy, dx."""
        a, b, step, _ = self._state.merges[: self.num_merges].T
        dy = (step + SPAN // 2) // SPAN
        return np.column_stack([a, b, dy, step - dy * SPAN])

    def stream(self, image: int) -> np.ndarray:
        """Image ids of one image as the trainer has it now, int32 [n]."""
        stride, (height, width) = self._state.stride, self.sizes[image]
        rows = self.origins[image] + stride * np.arange(height)[:, None]
        cells = self._state.board[(rows + np.arange(width)).ravel()]
        return cells[cells >= 0]


def _new_state(
    board: np.ndarray,
    stride: int,
    num_cells: int,
    num_codes: int,
    alpha: float,
    sigma: float,
    min_count: int,
    learnt: Tables | None,
) -> State:
    """Room for all records there can ever be: pages that are never touched cost nothing."""
    room = 5 * num_cells // 2 + 1024
    num_learnt = len(learnt.merges) if learnt is not None else 0
    counters = np.zeros(NUM_COUNTERS, np.int64)
    counters[ROUND] = num_learnt
    state = State(
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
        heap=np.empty(room, np.int32),
        pool=np.empty((1024, 5), np.int32),
        consistencies=np.empty(1024, np.float64),
        changed=np.zeros(num_codes + num_learnt, np.int32),
        cell_start=np.arange(num_codes + 1) if learnt is None else learnt.cell_start.copy(),
        cells=np.zeros(num_codes, np.int32) if learnt is None else learnt.cells.copy(),
        codes=np.arange(num_codes, dtype=np.int32) if learnt is None else learnt.codes.copy(),
        merges=np.zeros((num_learnt, 4), np.int32),
        counters=counters,
    )
    if learnt is not None:
        state.merges[:, :3] = learnt.merges
    counters[NUM_CELLS] = len(state.cells)
    return state


def _longer(array: np.ndarray, more: int) -> np.ndarray:
    """A copy with room for `more` entries, filled with zeros."""
    return np.concatenate([array, np.zeros((more, *array.shape[1:]), array.dtype)])
