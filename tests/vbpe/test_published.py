"""Published vocabularies: only lists, tuples and integers are read, and they encode as described
in the module.
"""

from __future__ import annotations

import pickle
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from beingvl.errors import InputError
from beingvl.vbpe.published import LegacyVisualBPE, encode_legacy_reference, import_published
from beingvl.vbpe.train_vbpe import import_vbpe
from beingvl.vbpe.visual_bpe import VisualBPE, load_for_layout
from beingvl.vocab import VocabLayout


def write_pickle(path, content, protocol=4):
    path.write_bytes(pickle.dumps(content, protocol))
    return path


@st.composite
def vocabularies(draw: st.DrawFn) -> LegacyVisualBPE:
    num_codes = draw(st.integers(1, 4))
    parts = [
        (draw(st.integers(0, num_codes + rank - 1)), draw(st.integers(0, num_codes + rank - 1)))
        for rank in range(12)
    ]
    return LegacyVisualBPE(num_codes, np.array(parts[: draw(st.integers(0, 12))]).reshape(-1, 2))


@settings(max_examples=200, deadline=None)
@given(vocabularies(), st.integers(1, 6), st.integers(1, 6), st.integers(0, 2**32 - 1))
def test_twins_agree(vbpe, height, width, seed):
    grids = np.random.default_rng(seed).integers(0, vbpe.num_codes, (3, height, width))
    ids, offsets = vbpe.encode_batch(grids, num_threads=2)
    for grid, start, end in zip(grids, offsets, offsets[1:], strict=False):
        assert ids[start:end].tolist() == encode_legacy_reference(
            grid, vbpe.num_codes, vbpe.merges.tolist()
        )
        assert ids[start:end].tolist() == vbpe.encode(grid).tolist()


def test_rules_by_hand():
    # The first 7 takes its right 8, the one below it has a 6 there and takes the 8 below; the last
    # 7 finds nothing.
    grid = np.array([[7, 8, 5], [7, 6, 7], [8, 0, 0]])
    assert LegacyVisualBPE(9, [(7, 8)]).encode(grid).tolist() == [9, 5, 9, 6, 7, 0, 0]
    assert LegacyVisualBPE(9, [(7, 8), (5, 9), (0, 0)]).encode(grid).tolist() == [9, 10, 6, 7, 11]
    assert LegacyVisualBPE(9, [(1, 1), (5, 7)]).encode(grid).tolist() == [
        7,
        8,
        10,
        6,
        7,
        8,
        0,
        0,
    ]  # across the row's end: flat
    assert LegacyVisualBPE(9, [(1, 2), (0, 0)]).encode(np.zeros((1, 3), int)).tolist() == [10, 0]


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_published_pickles_of_every_protocol(tmp_path, protocol):
    path = write_pickle(tmp_path / "vbpe.pkl", [((3, 4), 8192), ((8192, 5), 8193)], protocol)
    vbpe = VisualBPE.load(path)
    assert isinstance(vbpe, LegacyVisualBPE)
    assert (vbpe.num_codes, vbpe.num_ids, vbpe.merges.tolist()) == (8192, 8194, [[3, 4], [8192, 5]])
    vbpe.save(tmp_path / "vbpe.json")
    again = VisualBPE.load(tmp_path)
    assert (
        again == vbpe
        and again.fingerprint() == vbpe.fingerprint()
        and again.parameters["imported_from"] == "vbpe.pkl"
    )
    assert LegacyVisualBPE(8192, [[3, 4]]) != vbpe


def test_offsets_and_sizes(tmp_path):
    path = write_pickle(tmp_path / "vbpe.pkl", [((103, 104), 500), ((500, 105), 501)])
    assert import_published(path, 10, 100).merges.tolist() == [[3, 4], [10, 5]]
    assert import_published(path, 400).merges.tolist() == [[3, 4], [400, 5]]  # the first new says
    with pytest.raises(
        InputError,
        match=r"merge 0 uses token 103, expected a code 490 … 499 .* --init_size and --vocab_pad "
        r"right\?",
    ):
        import_published(path, 10)
    with pytest.raises(InputError, match="its first new token is 500, so it is not for 501 codes"):
        import_published(path, 501)
    with pytest.raises(InputError, match="merge 0 uses token 501"):
        import_published(write_pickle(path, [((501, 3), 500), ((1, 2), 501)]))
    with pytest.raises(InputError, match="2 merges make only 1 different"):
        import_published(write_pickle(path, [((1, 2), 8), ((2, 3), 8)]))
    with pytest.raises(InputError, match="the number of codes is unknown: give --init_size"):
        import_published(write_pickle(path, []))
    assert import_published(path, 5).num_merges == 0


def test_where_codes_begin_when_nobody_says_it(tmp_path):
    path = write_pickle(tmp_path / "x.pkl", [((3, 400), 500), ((500, 401), 501)])
    assert VisualBPE.load(path).num_codes == 500
    path = write_pickle(path, [((128300, 128400), 136448)])  # as its documents make it
    assert VisualBPE.load(path).merges.tolist() == [[44, 144]]
    path = write_pickle(path, [((301, 302), 316)])  # behind a text of any size
    with pytest.raises(InputError, match=r"not say how many codes .* --import_pkl .* --init_size"):
        VisualBPE.load(path)
    assert import_vbpe(path, tmp_path / "vbpe", init_size=16).merges.tolist() == [[1, 2]]


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("the pickle was executed",))


@pytest.mark.parametrize(
    "content",
    [
        Bomb(),
        [Bomb()],
        [((1, 2), Bomb())],
        {},
        [((1, 2), 3.0)],
        "text",
        [((1, b"2"), 3)],
        [np.int64(3)],
        None,
    ],
)
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_anything_else_is_refused_before_it_is_executed(tmp_path, content, protocol):
    with pytest.raises(InputError, match=r"more than lists, tuples and integers \(pickle opcode"):
        VisualBPE.load(write_pickle(tmp_path / "x.pkl", content, protocol))


@pytest.mark.parametrize(
    "content", [[(1, 2, 3)], [((1, 2, 3), 4)], [[(1, 2), 3], 5], [((1, (2,)), 3)], 7, ((1, 2), 3)]
)
def test_other_shapes_are_refused(tmp_path, content):
    with pytest.raises(
        InputError,
        match=r"(entry \d is|holds one (int|tuple)).* expected (a list of )?\(\(token1, "
        r"token2\), new_token\)",
    ):
        VisualBPE.load(write_pickle(tmp_path / "x.pkl", content))


@pytest.mark.parametrize(
    "data",
    [b"", b"\x80\x04", b"no pickle", pickle.dumps([((1, 2), 3)])[:-4], b"(l.", b"g5\n.", b"t."],
)
def test_damaged_pickles_are_refused(tmp_path, data):
    (tmp_path / "x.pkl").write_bytes(data)
    with pytest.raises(
        InputError, match=r"is not a readable pickle|more than lists|number of codes is unknown"
    ):
        VisualBPE.load(tmp_path / "x.pkl")


def test_wrong_merges_and_decoding_are_refused():
    with pytest.raises(InputError, match=r"merge 1 is \[0, 6\], expected two ids below 6"):
        LegacyVisualBPE(5, [(0, 1), (0, 6)])
    with pytest.raises(InputError, match=r"shape \[1, 3\]"):
        LegacyVisualBPE(5, [(0, 1, 2)])
    with pytest.raises(InputError, match="0 codes, expected 1 to"):
        LegacyVisualBPE(0, [])
    with pytest.raises(InputError, match="cannot be decoded"):
        LegacyVisualBPE(5, []).decode(np.zeros(4, int), 2, 2)
    with pytest.raises(InputError, match="no fixed shape"):
        LegacyVisualBPE(5, []).cells(0)
    with pytest.raises(InputError, match="codes 5 … 5, expected 0 … 4"):
        LegacyVisualBPE(5, []).encode(np.full((1, 1), 5))


def test_the_published_sizes_are_checked_against_the_layout(tmp_path):
    layout = VocabLayout(num_text=100, num_vq=10, num_merges=4, bos_id=1, eos_id=2)
    path = write_pickle(tmp_path / "vbpe.pkl", [((103, 104), 110), ((110, 105), 111)])
    for sizes in ((), (10, 100, 110), (None, 100), (None, None, 110)):
        assert load_for_layout(path, layout, *sizes).merges.tolist() == [[3, 4], [10, 5]]
    for sizes, message in (
        ((9,), "--vbpe_init_size is 9, the model's layout has 10 codes"),
        ((10, 101), "--vbpe_vocab_pad 101 and .* expected 0 or 100 or 105, and"),
        ((10, 100, 111), "--vbpe_vocab_end 111 do not fit the model's layout"),
        ((10, 105, 115), "expected a code 105 … 114 or the new token of an earlier merge"),
    ):
        with pytest.raises(InputError, match=message):
            load_for_layout(path, layout, *sizes)
    import_published(path, None, 100).save(tmp_path / "vbpe.json")
    assert load_for_layout(tmp_path / "vbpe.json", layout, 10, 100, 110).num_merges == 2
    with pytest.raises(InputError, match=r"10 codes and 2 merges, .* has room for 10 and 1"):
        load_for_layout(path, replace(layout, num_merges=1))
