"""Both twins of vBPE give the same merges, streams and grids, on everything hypothesis can think
of.
"""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from beingvl.errors import InputError
from beingvl.vbpe import visual_bpe as vbpe_module
from beingvl.vbpe.kernels import BORDER, encode_board, place_images
from beingvl.vbpe.reference import (
    TokenGrid,
    best_pair,
    cells_reference,
    decode_reference,
    encode_reference,
    positions_reference,
    spatial_consistency,
    train_reference,
)
from beingvl.vbpe.trainer import Trainer, plan_board
from beingvl.vbpe.training_kernels import compact
from beingvl.vbpe.visual_bpe import VisualBPE

EXAMPLE = VisualBPE(9, np.array([[7, 8, 0, 1], [9, 7, 1, 0]]))  # the grid in the module docstring


@st.composite
def corpora(draw: st.DrawFn) -> tuple[int, list[np.ndarray]]:
    """(number of codes, grids): few codes, so that pairs repeat and overlap; 1 x 1, 1 x N, N x
    1, mixed sizes are frequent.
    """
    num_codes = draw(st.integers(1, 4))
    side = st.one_of(st.just(1), st.integers(1, 7))
    sizes = draw(
        st.one_of(
            st.lists(st.tuples(side, side), min_size=1, max_size=4),
            st.tuples(side, side).map(lambda size: [size] * 3),
        )
    )
    codes = st.integers(0, num_codes - 1)
    grids = [
        draw(
            st.lists(codes, min_size=h * w, max_size=h * w).map(
                lambda row, s=(h, w): np.reshape(row, s)
            )
        )
        for h, w in sizes
    ]
    return num_codes, grids


priorities = st.tuples(
    st.sampled_from([0.0, 0.3, 0.7, 1.0, 3.0]),
    st.sampled_from([0.01, 0.5, 1.0, 2.0]),
    st.integers(1, 3),
)


# ---- twins ----


@settings(max_examples=300, deadline=None)
@given(corpora(), priorities, st.integers(0, 40))
def test_trainers_agree_and_encode_gives_the_trainers_own_streams(corpus, priority, num_merges):
    num_codes, grids = corpus
    merges, streams = train_reference(grids, num_codes, num_merges, *priority)
    trainer = Trainer([grid[None] for grid in grids], num_codes, *priority)
    assert trainer.learn(num_merges) == (len(merges) == num_merges)
    assert [tuple(merge) for merge in trainer.merges.tolist()] == merges
    assert trainer.num_tokens == sum(map(len, streams))
    vbpe = VisualBPE(num_codes, trainer.merges)
    for image, (grid, stream) in enumerate(zip(grids, streams, strict=True)):
        assert trainer.stream(image).tolist() == stream
        assert vbpe.encode(grid).tolist() == stream == encode_reference(grid, num_codes, merges)
        assert np.array_equal(vbpe.decode(stream, *grid.shape), grid)
        assert np.array_equal(decode_reference(stream, *grid.shape, num_codes, merges), grid)
    for image_id in range(vbpe.num_ids):
        dy, dx, code = vbpe.cells(image_id)
        cells = dict(zip(zip(dy.tolist(), dx.tolist(), strict=True), code.tolist(), strict=True))
        assert cells == cells_reference(image_id, num_codes, merges)
        assert list(cells) == sorted(cells) and next(iter(cells)) == (0, 0)


@settings(max_examples=150, deadline=None)
@given(corpora(), priorities, st.integers(1, 30), st.data())
def test_learning_in_parts_compacted_or_resumed_changes_nothing(corpus, priority, num_merges, data):
    num_codes, grids = corpus
    arrays = [grid[None] for grid in grids]
    whole = Trainer(arrays, num_codes, *priority)
    whole.learn(num_merges)
    stop = data.draw(st.integers(0, whole.num_merges))
    parts = Trainer(arrays, num_codes, *priority)
    parts.learn(stop)
    compact(parts._state)
    resumed = Trainer(arrays, num_codes, *priority, VisualBPE(num_codes, parts.merges).tables)
    for trainer in (parts, resumed):
        trainer.learn(num_merges)
        assert np.array_equal(trainer.merges, whole.merges)
        assert all(
            np.array_equal(trainer.stream(image), whole.stream(image))
            for image in range(len(grids))
        )


@settings(max_examples=100, deadline=None)
@given(corpora(), st.data())
def test_vocabulary_of_other_images_still_decodes_to_the_grid(corpus, data):
    num_codes, grids = corpus
    merges, _ = train_reference(grids, num_codes, 20, 0.0)
    vbpe = VisualBPE(num_codes, merges)
    height, width = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 12))
    codes = data.draw(
        st.lists(st.integers(0, num_codes - 1), min_size=height * width, max_size=height * width)
    )
    grid = np.reshape(codes, (height, width))
    stream = vbpe.encode(grid)
    assert stream.tolist() == encode_reference(grid, num_codes, merges)
    assert np.array_equal(vbpe.decode(stream, height, width), grid)


@pytest.mark.parametrize("num_with_codes", [0, 1, 2, 3])
def test_a_batch_of_streams_is_decoded_as_one_by_one(num_with_codes):
    rng = np.random.default_rng(num_with_codes)
    vbpe = VisualBPE(4, [(0, 1, 0, 1), (4, 0, 1, 0), (1, 4, 1, -1)])
    outcomes = {True: 0, False: 0}
    for _ in range(300):
        sides = rng.integers(1, 5, 3)
        grids = [rng.integers(0, 3, (side, side)) for side in sides]
        streams = [vbpe.encode(grid) for grid in grids]
        if rng.integers(2):
            changed = streams[rng.integers(3)]
            changed[rng.integers(len(changed))] = rng.integers(-1, vbpe.num_ids + 1)
        right = True
        for number, (grid, stream) in enumerate(zip(grids, streams, strict=True)):
            try:
                decoded = vbpe.decode(stream, *grid.shape)
                right &= number >= num_with_codes or np.array_equal(decoded, grid)
            except InputError:
                right = False
        codes = np.concatenate(
            [np.empty(0, int), *(grid.ravel() for grid in grids[:num_with_codes])]
        )
        ends = np.cumsum([0, *map(len, streams)])
        assert vbpe.decodes_to(np.concatenate(streams), ends, sides, codes) == right
        assert not vbpe.decodes_to(np.concatenate(streams), ends, sides, np.append(codes, -1))
        outcomes[right] += 1
    assert min(outcomes.values()) > 30


@settings(max_examples=300, deadline=None)
@given(corpora(), st.data())
def test_decode_accepts_exactly_the_streams_that_tile_the_grid(corpus, data):
    """Random ids: either decoding fails at the position where the reference fails, or both give
    the same grid.
    """
    num_codes, grids = corpus
    merges, _ = train_reference(grids, num_codes, 10, 0.0)
    vbpe = VisualBPE(num_codes, merges)
    height, width = grids[0].shape
    ids = data.draw(st.lists(st.integers(-1, vbpe.num_ids), max_size=height * width + 1))
    if data.draw(st.booleans()):
        ids = vbpe.encode(grids[0]).tolist()[: data.draw(st.integers(0, height * width))] + ids[:2]
    covered: set[tuple[int, int]] = set()
    wrong = None
    for position, image_id in enumerate(ids):
        free = min({(y, x) for y in range(height) for x in range(width)} - covered, default=None)
        if free is None or not 0 <= image_id < vbpe.num_ids:
            wrong = position
            break
        cells = {
            (free[0] + y, free[1] + x) for y, x in cells_reference(image_id, num_codes, merges)
        }
        if cells & covered or any(y >= height or not 0 <= x < width for y, x in cells):
            wrong = position
            break
        covered |= cells
    if wrong is None and len(covered) < height * width:
        wrong = len(ids)
    if wrong is None:
        assert np.array_equal(
            vbpe.decode(ids, height, width), decode_reference(ids, height, width, num_codes, merges)
        )
    else:
        with pytest.raises(ValueError, match=f"at position {wrong} of {len(ids)}"):
            vbpe.decode(ids, height, width)


@settings(max_examples=150, deadline=None)
@given(corpora(), st.data())
def test_merging_moves_no_token_from_its_cell(corpus, data):
    """Rows of text and square images, some of them raw: the twin gives the same positions, those
    that the tokens' anchors had before they were merged.
    """
    num_codes, grids = corpus
    merges, _ = train_reference(grids, num_codes, 20, 0.0)
    vbpe = VisualBPE(num_codes, merges)
    row, expected, raw = [-1], [0], [-1]
    for side in data.draw(st.lists(st.integers(1, 6), max_size=3)):
        codes = st.lists(st.integers(0, num_codes - 1), min_size=side**2, max_size=side**2)
        grid = np.reshape(data.draw(codes), (side, side))
        tokens = TokenGrid(grid)
        for rank, merge in enumerate(merges if data.draw(st.booleans()) else []):
            tokens.apply(merge, num_codes + rank)
        begin = len(raw)
        row += [*tokens.stream(), -1, -1]
        expected += [begin + y * side + x for y, x in sorted(tokens.ids)]
        raw += [*grid.ravel().tolist(), -1, -1]
        expected += [len(raw) - 2, len(raw) - 1]
    assert vbpe.positions(np.array(row, np.int32)).tolist() == expected
    assert positions_reference(row, num_codes, merges) == expected
    assert vbpe.positions(np.array(raw, np.int32)).tolist() == list(range(len(raw)))


@pytest.mark.parametrize("image", [[9, 5], [7, 9, 5], [9, 7, 11]])
def test_an_image_of_no_square_grid_has_no_positions(image):
    """Three cells; a token that reaches outside; an unknown id."""
    with pytest.raises(InputError, match="starts at token 2 does not fill a square grid"):
        EXAMPLE.positions(np.array([-1, -1, *image, -1], np.int32))


def test_an_image_that_the_row_cuts_off_is_counted_token_by_token():
    grid = np.array([[7, 8, 7], [7, 5, 8], [1, 2, 3]])
    row = [-1, *EXAMPLE.encode(grid), -1, *EXAMPLE.encode(grid)[:3]]
    positions = EXAMPLE.positions(np.array(row, np.int32)).tolist()
    assert positions == [0, 1, 3, 5, 6, 7, 8, 9, 10, 11, 12, 13]


def test_larger_grids_with_big_tokens_and_compaction():
    """Enough rounds on structured images that the trainer runs out of room and closes its gaps,
    with tokens of many cells.
    """
    rng = np.random.default_rng(0)
    tiles = rng.integers(0, 6, (4, 8, 8))
    grids = np.array(
        [np.block([[tiles[rng.integers(4)] for _ in range(3)] for _ in range(2)]) for _ in range(5)]
    )
    grids[rng.random(grids.shape) < 0.05] = 6
    for alpha in (0.0, 0.3):
        merges, streams = train_reference(grids, 7, 150, alpha)
        trainer = Trainer([grids], 7, alpha, 1.0, 2)
        trainer.learn(150)
        assert [tuple(merge) for merge in trainer.merges.tolist()] == merges
        assert [trainer.stream(image).tolist() for image in range(5)] == streams
        assert VisualBPE(7, merges).sizes.max() >= 20


def test_thousands_of_equal_candidates():
    """All pairs occur once: the pool of candidates has to grow, and ties decide everything."""
    grid = np.random.default_rng(0).permutation(1600).reshape(40, 40)
    merges, streams = train_reference([grid], 1600, 4, 0.3, 1.0, 1)
    trainer = Trainer([grid[None]], 1600, 0.3, 1.0, 1)
    assert trainer.learn(4)
    assert [tuple(merge) for merge in trainer.merges.tolist()] == merges
    assert trainer.stream(0).tolist() == streams[0]
    assert trainer.learn(1599) and trainer.num_tokens == 1 and not trainer.learn(1600)
    vbpe = VisualBPE(1600, trainer.merges)
    assert vbpe.encode(grid).tolist() == [3198]
    assert np.array_equal(vbpe.decode([3198], 40, 40), grid)


def test_encoding_outgrows_its_first_room():
    grid = np.zeros((40, 40), int)
    trainer = Trainer([grid[None]], 1, 0.0, 1.0, 1)
    trainer.learn(1000)
    vbpe = VisualBPE(1, trainer.merges)
    links, places = np.empty(3200, np.int32), np.empty(3200, np.int32)
    board = np.full(42 * 41 + 1, BORDER, np.int32)
    place_images(board, 41, grid[None].astype(np.int32), np.array([41]))
    heads = np.full(vbpe.num_merges, -1, np.int32)
    assert not encode_board(board, 41, 40, vbpe.tables, heads, links, places)
    assert (heads == -1).all()
    assert (
        vbpe.encode(grid).tolist()
        == trainer.stream(0).tolist()
        == encode_reference(grid, 1, vbpe.merges.tolist())
    )


def test_one_all_equal_image_of_many_cells():
    grid = np.zeros((300, 200), np.uint16)
    trainer = Trainer([grid[None]], 1, 0.3, 1.0, 2)
    assert not trainer.learn(1000)
    vbpe = VisualBPE(1, trainer.merges)
    assert len(vbpe.encode(grid)) == trainer.num_tokens < 40
    assert not vbpe.decode(vbpe.encode(grid), 300, 200).any()


# ---- the rules, by hand ----


def test_module_docstring_example():
    stream = EXAMPLE.encode(np.array([[7, 8, 7], [7, 5, 8]]))
    assert stream.tolist() == [10, 7, 5, 8]
    assert EXAMPLE.decode(stream, 2, 3).tolist() == [[7, 8, 7], [7, 5, 8]]
    grid = np.array([[7, 8, 7], [7, 5, 8], [1, 2, 3]])
    row = [-1, -1, *EXAMPLE.encode(grid), -1]
    assert EXAMPLE.positions(np.array(row, np.int32)).tolist() == [0, 1, 2, 4, 6, 7, 8, 9, 10, 11]


def test_overlapping_repeats_merge_from_the_left():
    merges, streams = train_reference([np.zeros((1, 5), int)], 1, 1, 0.0)
    assert merges == [(0, 0, 0, 1)] and streams == [[1, 1, 0]]
    assert VisualBPE(1, merges).encode(np.zeros((1, 5), int)).tolist() == [1, 1, 0]


def test_ties_go_to_the_smaller_pair_and_pairs_to_the_left_below_are_found():
    assert best_pair(Counter({(1, 0, 0, 1): 2, (0, 1, 1, 0): 2, (0, 1, 0, 2): 2}), 0.0, 1.0, 2) == (
        0,
        1,
        0,
        2,
    )
    grid = TokenGrid(np.array([[0, 1], [2, 2]]))
    grid.apply((2, 2, 0, 1), 3)
    assert set(grid.pairs()) == {(0, 1, 0, 1), (0, 3, 1, 0), (1, 3, 1, -1)}


def test_spatial_consistency():
    assert spatial_consistency({(0, 1): 7}, 1.0) == 1.0
    assert spatial_consistency({(0, 1): 5, (1, 0): 5}, 1.0) == pytest.approx(
        np.exp(-0.25), abs=1e-9
    )
    assert spatial_consistency({(0, 1): 3, (1, 0): 1}, 0.5) == pytest.approx(
        (3 * np.exp(-0.25) + np.exp(-2.25)) / 4, abs=1e-9
    )


def test_alpha_prefers_the_consistent_pair():
    # (0, 1) lies beside and below, its S is 0.78; (2, 3) lies only beside, its S is 1 but its F
    # only 4 / 5.
    counts = Counter({(0, 1, 0, 1): 5, (0, 1, 1, 0): 4, (2, 3, 0, 1): 4})
    assert best_pair(counts, 0.3, 1.0, 2) == (0, 1, 0, 1)
    assert best_pair(counts, 1.0, 1.0, 2) == (2, 3, 0, 1)


def test_plan_board_keeps_images_apart():
    rng = np.random.default_rng(0)
    sizes = rng.integers(1, 30, (200, 2))
    stride, num_cells, origins = plan_board(sizes)
    inside = [
        origin + stride * np.arange(height)[:, None] + np.arange(width)
        for (height, width), origin in zip(sizes, origins, strict=True)
    ]
    taken = np.zeros(num_cells, int)
    for cells in inside:
        taken[cells] += 1
    assert taken.max() == 1
    for cells in inside:
        around = np.unique([cells - 1, cells + 1, cells - stride, cells + stride])
        assert around.min() >= 0 and around.max() < num_cells
        assert not taken[np.setdiff1d(around, cells)].any()
    assert num_cells < 2 * sizes.prod(axis=1).sum()


# ---- batches ----


def test_encode_batch_equals_single_images_whatever_the_threads():
    rng = np.random.default_rng(1)
    grids = rng.integers(0, 4, (700, 6, 5)).astype(np.uint16)
    trainer = Trainer([grids[:50]], 4, 0.3, 1.0, 2)
    trainer.learn(60)
    vbpe = VisualBPE(4, trainer.merges)
    single = [vbpe.encode(grid) for grid in grids]
    for num_threads in (1, 3):
        ids, offsets = vbpe.encode_batch(grids, num_threads)
        assert ids.dtype == np.int32 and offsets.dtype == np.int64
        assert np.array_equal(ids, np.concatenate(single))
        assert np.array_equal(np.diff(offsets), [len(stream) for stream in single])
    ids, offsets = vbpe.encode_batch(grids[:0], 2)
    assert len(ids) == 0 and offsets.tolist() == [0]


def test_without_merges_the_stream_is_the_raster():
    grid = np.arange(12, dtype=np.uint16).reshape(3, 4)
    vbpe = VisualBPE(12, [])
    assert vbpe.encode(grid).tolist() == list(range(12))
    assert vbpe.num_merges == 0 and vbpe.num_ids == 12


# ---- on disk ----


def test_saved_file_is_readable_and_comes_back(tmp_path):
    vbpe = VisualBPE(9, EXAMPLE.merges, {"vqgan": "sha256:1"}, {"alpha": 0.3}, (32, 32))
    vbpe.save(tmp_path / "vbpe.json")
    lines = (tmp_path / "vbpe.json").read_text().splitlines()
    assert "    [7, 8, 0, 1]," in lines and "    [9, 7, 1, 0]" in lines
    for path in (tmp_path, tmp_path / "vbpe.json", str(tmp_path)):
        loaded = VisualBPE.load(path)
        assert loaded == vbpe == EXAMPLE
        assert (loaded.lineage, loaded.parameters, loaded.grid) == (
            vbpe.lineage,
            vbpe.parameters,
            vbpe.grid,
        )
    VisualBPE(9, []).save(tmp_path / "none.json")
    assert VisualBPE.load(tmp_path / "none.json").num_merges == 0
    assert list(tmp_path.glob("*.tmp")) == []


def test_fingerprint_is_of_codes_and_merges_only():
    same = VisualBPE(9, [(7, 8, 0, 1), (9, 7, 1, 0)], {"vqgan": "x"})
    assert EXAMPLE.fingerprint() == same.fingerprint()
    assert EXAMPLE.fingerprint().startswith("sha256:")
    others = [
        VisualBPE(10, EXAMPLE.merges),
        VisualBPE(9, EXAMPLE.merges[:1]),
        VisualBPE(9, [(7, 8, 0, 1), (9, 7, 0, 2)]),
    ]
    assert len({EXAMPLE.fingerprint(), *(other.fingerprint() for other in others)}) == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "other"}, "is not a vBPE vocabulary"),
        ({"format_version": 2}, "format version 2, this beingvl reads 1"),
        ({"merges": [[7, 8, 0, 1]]}, "does not have the fingerprint"),
        ({"kind": "3d"}, "is damaged"),
        ({"num_codes": None}, "is damaged"),
        ({"merges": [[7, 8, 0]]}, r"merges of shape \[1, 3\]"),
        ({"merges": [[7, 8, 0, 1], [1]]}, "not a list of"),
        ({"merges": 5}, "not a list of"),
        ({"merges": [[7, 8, 0, 0.5]]}, "type float64"),
    ],
)
def test_damaged_files_are_refused(tmp_path, change, message):
    path = tmp_path / "vbpe.json"
    EXAMPLE.save(path)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(InputError, match=message):
        VisualBPE.load(path)


def test_missing_and_unreadable_files_are_refused(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        VisualBPE.load(tmp_path)
    (tmp_path / "vbpe.json").write_text("{")
    with pytest.raises(InputError, match="is not valid JSON"):
        VisualBPE.load(tmp_path)
    (tmp_path / "vbpe.json").write_text("[]")
    with pytest.raises(InputError, match="is not a vBPE vocabulary"):
        VisualBPE.load(tmp_path)


# ---- wrong input ----


@pytest.mark.parametrize(
    ("num_codes", "merges", "message"),
    [
        (0, [], "0 codes, expected 1 to 65536"),
        (65_537, [], "65537 codes"),
        (9, [(7, 9, 0, 1)], "merge 0 is .* expected two ids below 9"),
        (9, [(7, 8, 0, 1), (-1, 8, 0, 1)], "merge 1 is"),
        (9, [(7, 8, 0, -1)], "after \\(0, 0\\) in raster order"),
        (9, [(7, 8, 0, 5000)], "merge 0 is"),
        (9, np.zeros((1 << 19, 4), int), "expected at most 524288 together"),
    ],
)
def test_impossible_merges_are_refused(num_codes, merges, message):
    with pytest.raises(InputError, match=message):
        VisualBPE(num_codes, merges)


@pytest.mark.parametrize(
    ("merges", "message"),
    [
        ([(0, 0, 0, 2)], "do not share an edge"),
        ([(0, 0, 1, 1)], "do not share an edge"),
        ([(0, 0, 0, 1), (1, 1, 0, 1)], "overlap"),
        ([(0, 0, 0, 1), (0, 0, 0, 1)], "appears twice"),
        ([(rank, rank, 0, 1) for rank in range(40)], "overlap|which no grid holds"),
        ([(0, 0, 0, 1), *((rank, rank, 1, 0) for rank in range(1, 60))], "which no grid holds"),
    ],
)
def test_merges_without_a_shape_are_refused(merges, message):
    with pytest.raises(InputError, match=message):
        VisualBPE(1, merges).encode(np.zeros((2, 2), int))


def test_a_file_whose_tokens_are_too_large_together_is_refused(monkeypatch):
    monkeypatch.setattr(vbpe_module, "MAX_SHAPE_CELLS", 3)
    with pytest.raises(InputError, match="have 4 cells in all, expected at most 3"):
        VisualBPE(2, [(0, 1, 0, 1)]).encode(np.zeros((1, 1), int))


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        (np.zeros((2, 2)), "type float64, expected integers"),
        (np.full((2, 2), np.nan), "expected integers"),
        (np.zeros(4, int), r"shape \[4\], expected grids"),
        (np.zeros((2, 2, 2), int), r"shape \[2, 2, 2\]"),
        (np.full((2, 2), 9), r"codes 9 … 9, expected 0 … 8"),
        (np.full((2, 2), -1), r"codes -1 … -1"),
        (np.zeros((0, 2), int), "a grid of 0 x 2 cells"),
        (np.zeros((1, 2048), int), "a grid of 1 x 2048 cells, expected 1 to 2047"),
    ],
)
def test_what_is_no_grid_of_codes_cannot_be_encoded(grid, message):
    with pytest.raises(InputError, match=message):
        EXAMPLE.encode(grid)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (
            [10, 7, 5],
            "position 3 of 3: the stream ends while cells of the 2 x 3 grid are left over",
        ),
        ([10, 7, 5, 8, 8], "position 4 of 5: the 2 x 3 grid is already full before id 8"),
        ([10, 7, 11, 8], "position 2 of 4: id 11 is unknown, expected 0 … 10"),
        ([10, 7, 5 + (1 << 40), 8], "position 2 of 4: id 1099511627781 is unknown"),
        ([7, 8, 10], "position 2 of 3: the token of id 10 reaches outside the 2 x 3 grid"),
        ([7, 10, 9], "position 2 of 3: the token of id 9 overlaps an earlier one"),
    ],
)
def test_invalid_streams_say_where(ids, message):
    with pytest.raises(InputError, match=message):
        EXAMPLE.decode(np.array(ids), 2, 3)


def test_decode_refuses_what_is_no_stream():
    with pytest.raises(InputError, match="expected integers"):
        EXAMPLE.decode(np.zeros((2, 2), int), 2, 2)
    with pytest.raises(InputError, match="expected integers"):
        EXAMPLE.decode(np.array([0.5]), 1, 1)
    with pytest.raises(InputError, match="a grid of 0 x 3 cells"):
        EXAMPLE.decode(np.array([7]), 0, 3)
    with pytest.raises(InputError, match="image id 11 is unknown"):
        EXAMPLE.cells(11)
