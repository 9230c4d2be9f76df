"""Learning, compiled with numba; `trainer.py` owns the arrays. The merges are bit-identical to
those of `reference.train_reference`.

Every new pair contains the newest token, so after a round the counts of its pairs only fall:

- A round writes the occurrences of its pairs once, grouped by pair, at the end of `places`. A
  *record* is one pair and its slice of `places`; nothing is ever inserted later.
- No count is kept up to date. A record's count is an upper bound. It is exact until one of its
  tokens is merged away (`changed`). Reading the record's slice again makes it exact (`settle`),
  which happens only to records that might win.
- Records wait in one linked list per count (`heads`, `links`). A settled record moves down.
- A pair that occurs fewer than `min_count` times when it is written can never win and is dropped.

One round, on the board of kernels.py (`7 8 / 7 5`, all four pairs with count 1):

    choose     the record with the highest priority, here (7,8,0,1)
    merge      at each of its places in raster order: the board becomes `9 -1 / 7 5`, and
               changed[7] = changed[8] = this round
    collect    the pairs of every new 9, each neighbour once: (9,7,1,0) (9,5,1,1)
    write      their records; (7,7,1,0) and (8,5,1,0) are stale now, which is noticed when their
               turn comes
"""

from __future__ import annotations

import math
from heapq import heappop, heappush
from typing import NamedTuple

import numpy as np

from beingvl.vbpe.kernels import (
    BORDER,
    Ints,
    hash_slot,
    join_tokens,
    kernel,
    key_of_neighbours,
    list_edges,
    step_offset,
    step_parts,
    unite_cells,
)

NUM_RECORDS, NUM_PLACES, TOP, ROUND, NUM_CELLS, NUM_TOKENS, NUM_COUNTERS = range(7)
LEARNT, NOTHING_LEFT, SHAPES_FULL = range(3)
NONE = 0  # record 0 does not exist
SEEN = 1 << 29  # marks an anchor whose pair with the current token is already collected
GROUP_BITS = 24  # key >> 24 is the pair of tokens without its offset


class State(NamedTuple):
    """All of the trainer's state; the kernels modify the arrays. B board cells, V ids."""

    stride: int
    num_codes: int
    alpha: float
    sigma: float
    min_count: int
    board: Ints  # int32 [B]
    places: Ints  # int32: anchors of a, grouped by record
    keys: Ints  # int64: a record's pair
    starts: Ints  # int64: start of its places
    counts: Ints  # int32: number of its places
    exact_at: Ints  # int32: the round for whose board `counts` is exact
    links: Ints  # int32: the next record in the same list
    heads: Ints  # int32 [B]: per count, the first record whose count is or was that
    changed: Ints  # int32 [V]: last round that merged the token away
    cell_start: Ints  # int64 [V + 1]
    cells: Ints  # int32 steps
    codes: Ints  # int32
    merges: Ints  # int32 [R, 3]: a, b, step
    counters: Ints  # int64 [NUM_COUNTERS]


# ---- records ----


@kernel
def link_record(state: State, record: int) -> None:
    """Put a record into the list of its count, if it can ever win."""
    count = state.counts[record]
    if count >= state.min_count:
        state.links[record] = state.heads[count]
        state.heads[count] = record


@kernel
def settle(state: State, record: int) -> int:
    """Make a record's count exact and return it: drop the places whose tokens are gone."""
    key, counts = state.keys[record], state.counts
    a, b = key >> 44, (key >> GROUP_BITS) & 0xFFFFF
    if max(state.changed[a], state.changed[b]) <= state.exact_at[record]:
        return counts[record]
    board, places, start = state.board, state.places, state.starts[record]
    offset = step_offset(key & 0xFFFFFF, state.stride)
    kept = start
    for i in range(start, start + counts[record]):
        place = places[i]
        if board[place] == a and board[place + offset] == b:
            places[kept] = place
            kept += 1
    counts[record] = kept - start
    state.exact_at[record] = state.counters[ROUND]
    return kept - start


@kernel
def compact(state: State) -> None:
    """Settle all records and close the gaps. Drop records if no offset of their pair can win."""
    counters, keys = state.counters, state.keys
    num_records = counters[NUM_RECORDS]
    state.heads[: counters[TOP] + 1] = NONE
    kept, kept_places, first = 1, 0, 1
    while first < num_records:
        last, alive = first, False
        while last < num_records and keys[last] >> GROUP_BITS == keys[first] >> GROUP_BITS:
            alive |= settle(state, last) >= state.min_count
            last += 1
        for record in range(first, last if alive else first):
            start, count = state.starts[record], state.counts[record]
            for i in range(count):
                state.places[kept_places + i] = state.places[start + i]
            keys[kept], state.starts[kept], state.counts[kept] = keys[record], kept_places, count
            state.exact_at[kept] = state.exact_at[record]
            link_record(state, kept)
            kept_places += count
            kept += 1
        first = last
    counters[NUM_RECORDS], counters[NUM_PLACES] = kept, kept_places


# ---- choose ----


@kernel
def choose_by_count(state: State, heap: list) -> int:
    """The record with the highest count (ties: smallest pair), or NONE.

    `heap` holds the records of the highest list as (key, record), ordered by key.
    """
    counters, heads, links = state.counters, state.heads, state.links
    while True:
        top = counters[TOP]
        record = heads[top]
        while record != NONE:
            heappush(heap, (state.keys[record], np.int64(record)))
            record = links[record]
        heads[top] = NONE
        if len(heap):
            _, record = heappop(heap)
            if settle(state, record) == top:
                return record
            link_record(state, record)
        elif top > state.min_count:
            counters[TOP] = top - 1
        else:
            return NONE


@kernel
def choose_by_priority(state: State, pool: list) -> int:
    """The record with the highest P = count / largest + alpha S, or NONE.

    `pool` holds (key, record, count, S), all exact, for every record that might win. S is at most
    1, so the lists are moved into the pool from the highest count down, until count / largest +
    alpha is less than the best P so far.
    """
    largest = leave_pool(state, pool)
    level = state.counters[TOP]
    while level >= max(largest, state.min_count):
        if enter_pool(state, pool, level):
            largest = level
        level -= 1
    if largest == 0:
        return NONE
    state.counters[TOP] = largest
    at, best, best_priority = 0, 0, -1.0
    while True:
        while at < len(pool):
            key, _, count, consistency = pool[at]
            priority = count / largest + state.alpha * consistency
            if priority > best_priority or (
                priority == best_priority and (-count, key) < (-pool[best][2], pool[best][0])
            ):
                best, best_priority = at, priority
            at += 1
        if level < state.min_count or level / largest + state.alpha < best_priority:
            break
        enter_pool(state, pool, level)
        level -= 1
    record = pool[best][1]
    pool[best] = pool[-1]
    pool.pop()
    return record


@kernel
def leave_pool(state: State, pool: list) -> int:
    """Move records with a token of the last merge back into the lists; returns the largest count
    that stays in the pool.
    """
    a, b, _ = state.merges[state.counters[ROUND] - 1]
    largest, at = 0, 0
    while at < len(pool):
        key, record, count, _ = pool[at]
        first, second = key >> 44, (key >> GROUP_BITS) & 0xFFFFF
        if first in (a, b) or second in (a, b):
            link_record(state, record)
            pool[at] = pool[-1]
            pool.pop()
        else:
            largest = max(largest, count)
            at += 1
    return largest


@kernel
def enter_pool(state: State, pool: list, level: int) -> bool:
    """Move a list into the pool, except records whose count fell; returns whether any moved."""
    size = len(pool)
    record = state.heads[level]
    state.heads[level] = NONE
    while record != NONE:
        after = state.links[record]
        if settle(state, record) < level:
            link_record(state, record)
        else:
            consistency = measure_consistency(state, record)
            pool.append((state.keys[record], np.int64(record), np.int64(level), consistency))
        record = after
    return len(pool) > size


@kernel
def measure_consistency(state: State, record: int) -> float:
    """S of a record's pair of tokens. The records of the pair's other offsets are adjacent.

    The arithmetic matches `reference.spatial_consistency` operation by operation.
    """
    keys, counts = state.keys, state.counts
    group = keys[record] >> GROUP_BITS
    first, last = record, record + 1
    while keys[first - 1] >> GROUP_BITS == group:
        first -= 1
    while last < state.counters[NUM_RECORDS] and keys[last] >> GROUP_BITS == group:
        last += 1
    if last - first == 1:
        return 1.0
    total, sum_y, sum_x = 0, 0, 0
    for i in range(first, last):
        count = settle(state, i)
        dy, dx = step_parts(keys[i] & 0xFFFFFF)
        total += count
        sum_y += dy * count
        sum_x += dx * count
    mean_y, mean_x = sum_y / total, sum_x / total
    consistency = 0.0
    for i in range(first, last):
        if counts[i]:
            dy, dx = step_parts(keys[i] & 0xFFFFFF)
            squared_distance = (dy - mean_y) * (dy - mean_y) + (dx - mean_x) * (dx - mean_x)
            consistency += counts[i] * math.exp(
                -squared_distance / (2.0 * state.sigma * state.sigma)
            )
    return math.floor(consistency / total * 2.0**30 + 0.5) / 2.0**30


# ---- collect and write ----


class Found(NamedTuple):
    """Scratch space for one token's pairs: a small hash table that numbers and counts them."""

    slots: Ints  # int32 [power of two]: number of a pair; -1 = free
    keys: Ints  # int64 [pairs]
    slot_of: Ints  # int32 [pairs]
    tallies: Ints  # int64 [pairs]: occurrences; see write_records


@kernel
def make_found(num_pairs: int) -> Found:
    return Found(
        np.full(4 * num_pairs, -1, np.int32),
        np.empty(num_pairs, np.int64),
        np.empty(num_pairs, np.int32),
        np.empty(num_pairs, np.int64),
    )


@kernel
def find_slot(slots: Ints, keys: Ints, key: int) -> int:
    """A pair's slot, or the free slot where it belongs."""
    mask = len(slots) - 1
    slot = hash_slot(key, mask)
    while slots[slot] >= 0 and keys[slots[slot]] != key:
        slot = (slot + 1) & mask
    return slot


@kernel
def list_neighbours(
    board: Ints, anchor: int, offsets: Ints, start: int, end: int, neighbours: Ints
) -> int:
    """Write the anchors of the tokens at `offsets[start:end]`, each once; returns their number."""
    size = 0
    for i in range(start, end):
        neighbour = anchor + offsets[i]
        token = board[neighbour]
        if token == BORDER:
            continue
        if token < 0:
            neighbour += token
            token = board[neighbour]
        if not token & SEEN:
            board[neighbour] = token | SEEN
            neighbours[size] = neighbour
            size += 1
    for i in range(size):
        board[neighbours[i]] &= ~SEEN
    return size


@kernel
def collect(
    board: Ints, stride: int, anchors: Ints, token: int, offsets: Ints, keys: Ints, places: Ints
) -> int:
    """Write key and place of every pair that contains `token`, which is at `anchors`; returns their
    number. A pair of two such tokens is written for the earlier one only.
    """
    neighbours = np.empty(len(offsets), np.int64)
    size = 0
    for anchor in anchors:
        column = anchor % stride
        for i in range(list_neighbours(board, anchor, offsets, 0, len(offsets), neighbours)):
            neighbour = neighbours[i]
            if neighbour > anchor or board[neighbour] != token:
                keys[size] = key_of_neighbours(board, column, anchor, neighbour, stride)
                places[size] = min(anchor, neighbour)
                size += 1
    return size


@kernel
def tally(
    keys: Ints, slots: Ints, found_keys: Ints, slot_of: Ints, tallies: Ints, pair_of: Ints
) -> int:
    """Number the different keys in order of appearance (`pair_of` [len(keys)]) and count them.

    Returns the number of different keys, or -1, with empty slots, if they do not fit.
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


@kernel
def choose_pairs(state: State, found: Found, num_pairs: int) -> Ints:
    """Keys, ascending, of the pairs that may win later. With alpha > 0 also the rarer offsets of
    the same two tokens, because S counts them.
    """
    keys, tallies = found.keys, found.tallies
    chosen = np.empty(num_pairs, np.int64)
    size = 0
    for pair in range(num_pairs):
        if tallies[pair] >= state.min_count:
            chosen[size] = keys[pair]
            size += 1
    if state.alpha > 0.0 and size:
        frequent = np.sort(chosen[:size])
        for pair in range(num_pairs):
            if tallies[pair] < state.min_count:
                group = keys[pair] >> GROUP_BITS
                at = np.searchsorted(frequent, group << GROUP_BITS)
                if at < len(frequent) and frequent[at] >> GROUP_BITS == group:
                    chosen[size] = keys[pair]
                    size += 1
    return np.sort(chosen[:size])


@kernel
def write_records(state: State, keys: Ints, places: Ints, found: Found, pair_of: Ints) -> Found:
    """Make records of the pairs that may win later, in key order.

    `found` is empty before and after. In between, a tally becomes 1 + the index of the pair's next
    place, or negative if the pair gets no record.
    """
    counters, state_places = state.counters, state.places
    num_pairs = tally(keys, found.slots, found.keys, found.slot_of, found.tallies, pair_of)
    while num_pairs < 0:
        found = make_found(2 * len(found.keys))
        num_pairs = tally(keys, found.slots, found.keys, found.slot_of, found.tallies, pair_of)
    tallies, slots, slot_of = found.tallies, found.slots, found.slot_of
    chosen = choose_pairs(state, found, num_pairs)
    for pair in range(num_pairs):
        tallies[pair] = -tallies[pair]
    for key in chosen:
        pair = slots[find_slot(slots, found.keys, key)]
        record, start = counters[NUM_RECORDS], counters[NUM_PLACES]
        count = -tallies[pair]
        state.keys[record], state.starts[record], state.counts[record] = key, start, count
        state.exact_at[record] = counters[ROUND]
        link_record(state, record)
        tallies[pair] = start + 1
        counters[NUM_RECORDS], counters[NUM_PLACES] = record + 1, start + count
        counters[TOP] = max(counters[TOP], count)
    for i in range(len(keys)):
        pair = pair_of[i]
        if tallies[pair] > 0:
            state_places[tallies[pair] - 1] = places[i]
            tallies[pair] += 1
    for pair in range(num_pairs):
        slots[slot_of[pair]] = -1
    return found


# ---- the rounds ----


@kernel
def edge_offsets(state: State, token: int) -> Ints:
    """Board distances from a token's anchor to all cells that touch the token, ascending."""
    start, end = state.cell_start[token], state.cell_start[token + 1]
    edges = np.empty(2 * (end - start) + 2, np.int64)
    edges = edges[: list_edges(state.cells, start, end, edges, 0)]
    for i in range(len(edges)):
        edges[i] = step_offset(edges[i], state.stride)
    return edges


@kernel
def index_board(state: State) -> None:
    """Write the records of all pairs on the board.

    Only one pass reads the board: it sorts the pairs by their first token. Then each token's pairs
    are counted separately, in cache.
    """
    board, counters, stride = state.board, state.counters, state.stride
    num_ids = state.num_codes + counters[ROUND]
    offset_start = np.zeros(num_ids + 1, np.int64)
    offsets = np.empty(2 * counters[NUM_CELLS] + 2 * num_ids, np.int64)
    for token in range(num_ids):
        end = offset_start[token]
        for offset in edge_offsets(state, token):
            if offset > 0:  # a neighbour before the anchor has an earlier anchor, which lists it
                offsets[end] = offset
                end += 1
        offset_start[token + 1] = end
    starts = np.zeros(num_ids + 1, np.int64)
    for token in board:
        if token >= 0:
            counters[NUM_TOKENS] += 1
            starts[token + 1] += offset_start[token + 1] - offset_start[token]
    starts = np.cumsum(starts)
    ends = starts[:-1].copy()
    keys = np.empty(starts[-1], np.int64)
    places = np.empty(starts[-1], np.int32)
    neighbours = np.empty(len(offsets), np.int64)
    for anchor in range(len(board)):
        token = board[anchor]
        if token >= 0:
            column, at = anchor % stride, ends[token]
            first, last = offset_start[token], offset_start[token + 1]
            for i in range(list_neighbours(board, anchor, offsets, first, last, neighbours)):
                if neighbours[i] > anchor:
                    keys[at] = key_of_neighbours(board, column, anchor, neighbours[i], stride)
                    places[at] = anchor
                    at += 1
            ends[token] = at
    found = make_found(1 << 12)
    pair_of = np.empty(np.max(ends - starts[:-1]), np.int32)
    for token in range(num_ids):
        start, end = starts[token], ends[token]
        found = write_records(state, keys[start:end], places[start:end], found, pair_of)


@kernel
def merge_places(state: State, record: int, new: int) -> Ints:
    """Merge every occurrence of a record, in raster order; returns the anchors of the new tokens.

    A pair of equal tokens can overlap itself (`a a a`); the later occurrence finds its token gone.
    """
    board, stride, places, counters = state.board, state.stride, state.places, state.counters
    key = state.keys[record]
    a, b, step = key >> 44, (key >> GROUP_BITS) & 0xFFFFF, key & 0xFFFFFF
    offset = step_offset(step, stride)
    cells, first, last = state.cells, state.cell_start[b], state.cell_start[b + 1]
    start, count = state.starts[record], state.counts[record]
    merged = 0
    for i in range(start, start + count):
        anchor = places[i]
        if a == b and (board[anchor] != a or board[anchor + offset] != b):
            continue
        board[anchor] = new
        join_tokens(board, anchor, anchor + offset, cells, first, last, stride)
        places[start + merged] = anchor
        merged += 1
    state.counts[record] = 0
    merge = state.merges[counters[ROUND]]
    merge[0], merge[1], merge[2] = a, b, step
    counters[ROUND] += 1
    state.changed[a] = state.changed[b] = counters[ROUND]
    counters[NUM_TOKENS] -= merged
    return places[start : start + merged].copy()


@kernel
def add_shape(state: State, new: int) -> None:
    """Write the newest token's cells."""
    a, b, step = state.merges[new - state.num_codes]
    starts = state.cell_start
    unite_cells(state.cells, state.codes, starts, a, b, step, new)
    starts[new + 1] = starts[new] + starts[a + 1] - starts[a] + starts[b + 1] - starts[b]
    state.counters[NUM_CELLS] = starts[new + 1]


@kernel
def learn(state: State, until: int) -> int:
    """Learn until there are `until` merges. Returns LEARNT, NOTHING_LEFT, or SHAPES_FULL if `cells`
    and `codes` must grow before the next call.
    """
    counters = state.counters
    found = make_found(1 << 12)
    keys, places, pair_of = np.empty(0, np.int64), np.empty(0, np.int32), np.empty(0, np.int32)
    zero = np.int64(0)
    heap, pool = [(zero, zero)], [(zero, zero, zero, 0.0)]  # only to give numba their types
    heap.clear()
    pool.clear()
    status = LEARNT
    while counters[ROUND] < until:
        if counters[NUM_CELLS] * 3 > len(state.cells):  # a token at most doubles all cells
            status = SHAPES_FULL
            break
        if state.alpha == 0.0:
            record = choose_by_count(state, heap)
        else:
            record = choose_by_priority(state, pool)
        if record == NONE:
            status = NOTHING_LEFT
            break
        new = state.num_codes + counters[ROUND]
        anchors = merge_places(state, record, new)
        add_shape(state, new)
        offsets = edge_offsets(state, new)
        if len(keys) < len(anchors) * len(offsets):
            room = 2 * len(anchors) * len(offsets)
            keys, places = np.empty(room, np.int64), np.empty(room, np.int32)
            pair_of = np.empty(room, np.int32)
        size = collect(state.board, state.stride, anchors, new, offsets, keys, places)
        if max(counters[NUM_PLACES], counters[NUM_RECORDS]) + size > len(state.places):
            compact(state)
            heap.clear()
            pool.clear()
        found = write_records(state, keys[:size], places[:size], found, pair_of)
    for _, record in heap:
        link_record(state, record)
    for _, record, _, _ in pool:
        link_record(state, record)
    return status
