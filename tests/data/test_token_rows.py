"""The fast reader of token rows takes a line only as the readable one would; what neither takes
is an error with its line.
"""

import json
import random

import numpy as np
import pyarrow as pa
import pytest
import simdjson

from beingvl.data.token_rows import (
    MOST_CELLS,
    RowReader,
    check_images,
    hash_ids,
    images_of,
    make_buffers,
    parse_row,
)
from beingvl.data.token_rows_numba import BYTES_AHEAD, parse_lines, words_of
from beingvl.errors import InputError
from beingvl.vbpe.visual_bpe import VisualBPE
from tests.tiny import LAYOUT

ROW = {
    "id": "r1",
    "image": "a b/ü.jpg",
    "category": "perception",
    "conversations": [
        {"from": "human", "value": '<image>\n"Wie?" \\ / é 漢 😀 \t'},
        {"from": "gpt", "value": "x", "more": [[], {}]},
    ],
    "token_0": [256, 262],
    "token_image": [263, 264, 265, 266],
    "token_image_new": [279, 0],
    "token_1": [260, 5, 257],
    "target_spans": [[5, 7]],
    "score": -1.25,
    "kept": True,
    "note": None,
}
MANY = [*range(100_000, 100_100), *range(999_900, 1_000_000), *range(123_456, 200_000, 777)]


def fast(line: bytes, vbpe: VisualBPE | None = None) -> tuple | None:
    """The one row of a line as the compiled reader takes it, None when it leaves the line to its
    twin.
    """
    buffers = make_buffers(len(line))
    data, size = (
        np.frombuffer(bytearray(line + b"\n" + bytes(BYTES_AHEAD)), np.uint8),
        len(line) + 1,
    )
    at, rows = parse_lines(data, words_of(data), 0, size, buffers, images_of(LAYOUT, vbpe), 0)
    if not rows:
        return None
    assert at == size and rows == 1
    lists = ((buffers.ids, buffers.id_starts), (buffers.spans, buffers.span_starts))
    texts = [
        text[: starts[1]].tobytes().decode()
        for text, starts in zip(buffers.text, buffers.text_starts, strict=True)
    ]
    return (*texts, *(values[: starts[1]].tolist() for values, starts in lists))


def readable(line: bytes) -> tuple | None:
    """The same from the readable one, None when the line is no row."""
    try:
        row = parse_row(simdjson.Parser(), line)
    except (ValueError, TypeError, RuntimeError):
        return None
    return (row.id, row.image, row.category, row.input_ids.tolist(), row.target_spans.tolist())


def text(row: dict, **options) -> bytes:
    return json.dumps(row, **options).encode()


USUAL = [
    text(ROW, ensure_ascii=False),
    text(ROW, ensure_ascii=False, separators=(",", ":")),
    text({**ROW, "conversations": ["\u00e9\u6f22"], "image": "a"}),  # escaped characters
    text({key: ROW[key] for key in ("token_1", "token_0", "id")}),  # a published row of text alone
    text(
        {
            **ROW,
            "id": 17,
            "image": None,
            "category": None,
            "token_image_new": None,
            "target_spans": None,
        },
        ensure_ascii=False,
    ),
    text({**ROW, "target_spans": [5, 7], "category": ""}, ensure_ascii=False),
    text({**ROW, "target_spans": []}, ensure_ascii=False),
    b'  {"id":1,"token_0":[ ],"token_1":[0, 10]}\t'[2:],
    b'{"id":2,"token_0":[123456,100000, '
    b'999999,12345,1234567,0,7],"token_1":[654321, 10, 314159,9999999]}',
    text({**ROW, "token_0": MANY}, ensure_ascii=False),
    text({**ROW, "token_0": MANY}, ensure_ascii=False, separators=(",", ":")),
    text(
        {**ROW, "token_0": [*MANY[:70], 5, *MANY[:70]]}, ensure_ascii=False, separators=(",", ":")
    ),
    text({**ROW, "token_0": MANY}, ensure_ascii=False).replace(b", 11", b",11"),
    text({**ROW, "image": ["a b/ü.png", "b.png"]}, ensure_ascii=False, separators=(",", ":")),
    text({**ROW, "image": ["a.png"]}, ensure_ascii=False),
    b'{"id" : 1 , "token_0" :[] , "x":{"a":[1,-2.5,{"b":[]}],"c":"\\u00E9\\n"} '
    b',"token_1":[2147483] } \r',
]
UNUSUAL = [  # rows all the same
    b'{"id":1,"token_0":[2147483647],"token_1":[1,12345678]}',
    text({**ROW, "conversations": "😀"}),  # escaped surrogates
    text({**ROW, "image": ["a.png", "b.png"]}),  # its shortest JSON is another
    text({**ROW, "image": []}),
    text({**ROW, "image": ["a.png", 5]}, separators=(",", ":")),
    text({**ROW, "image": ["a.png", ["b.png"]]}, separators=(",", ":")),
    text({**ROW, "image": ["a\\b.png"]}),
    text({**ROW, "id": "a\nb"}),
    text({**ROW, "id": -1}),
    text({**ROW, "id": 1.5}),
    text({**ROW, "x": 1e300, "image": "a"}),
    b'{"id":1,"id":2,"image":null,"image":"x","token_0":[-1],"token_1":[]}',
    b'{"id":1,"token\\u005f0":[],"token_0":[1],"token_1":[4294967296]}',
    b' {"id":1,"token_0":[],"token_1":[]}',
    b'{"id":1,"token_0":[[1],[2,[3]]],"token_1":[1 , 2]}',
    text({**ROW, "x": eval("[" * 70 + "]" * 70), "image": "a"}),
]
WRONG = [
    *(
        text({**ROW, "token_0": MANY}, ensure_ascii=False, separators=(comma, ":")).replace(
            right, wrong
        )
        for comma in (",", ", ")
        for right, wrong in (
            (b"100047", b"000047"),
            (b"100041", b"10004:"),
            (b"100063", b"100/63"),
            (b"100002,", b"100002;"),
        )
    ),
    text({**ROW, "token_0": MANY}, ensure_ascii=False).replace(b" 100044", b"x100044"),
    b"",
    b"{}",
    b"[1]",
    b'{"id":1,"token_0":[01],"token_1":[]}',
    b'{"id":1,"token_0":[012345,1],"token_1":[]}',
    b'{"id":1,"token_0":[12345:,1],"token_1":[]}',
    b'{"id":1,"token_0":[123456,],"token_1":[]}',
    b'{"id":1,"token_0":[12345/,123456;1],"token_1":[]}',
    b'{"id":1,"token_0":[1,],"token_1":[]}',
    b'{"id":1,"token_0":[1],"token_1":[],}',
    b'{"id":1,"token_0":[1],"token_1":[]',
    b'{"id":1,"token_0":[1],"token_1":[]}}',
    b'{"id":1,"token_0":[1.5],"token_1":[]}',
    b'{"id":1,"token_0":["1"],"token_1":[]}',
    b'{"id":1,"token_0":null,"token_1":[]}',
    b'{"id":null,"token_0":[1],"token_1":[]}',
    b'{"id":[1],"token_0":[1],"token_1":[]}',
    b'{"id":1,"category":5,"token_0":[1],"token_1":[]}',
    b'{"id":1,"token_0":[1],"token_1":[],"x":"\\x"}',
    b'{"id":1,"token_0":[1],"token_1":[],"x":"\\u12G4"}',
    b'{"id":1,"token_0":[1],"token_1":[],"x":"\x01"}',
    b'{"id":1,"token_0":[1],"token_1":[],"x":tru}',
    b'{"id":1,"token_0":[1],"token_1":[],"x":1.}',
    b'{"id":1,"token_0":[1],"token_1":[],"x":[1}',
    b'{"id":1,"token_0":[1],"token_1":[],"image":5}',
    b'{"id":1,"token_0":[1],"token_1":[],"image":{"a":"b"}}',
    b'{"id":1,"token_0":[1],"token_1":[],"image":["a",]}',
    b'{"id":1,"token_0":[1],"token_1":[],"image":["a"}',
    b'{"id":123456789012345678901234567890,"token_0":[1],"token_1":[]}',
    b'{"id":1,"token_0":[1],"token_1":[],"x":' + b"[" * 2000 + b"]" * 2000 + b"}",
    b'{"id":1,"token_0":[1],"token_1":[],"x":"\xff"}',
    b'{"id":1,"token_0":[1],"token_1":[],"x":"\xc0\x80"}',
    b'{"id":1,"token_0":[1],"token_1":[],"x":"\xe0\x80\x80"}',
    b'{"id":1,"token_0":[1],"token_1":[],"x":"\xed\xa0\x80"}',
    b'{"id":1,"token_0":[1],"token_1":[],"x":"\xf0\x80\x80\x80"}',
    b'{"id":1,"token_0":[1],"token_1":[],"x":"\xf4\x90\x80\x80"}',
    b'{"id":1,"token_0":[1],"token_1":[],"x":"\xe2\x82"}',
]


@pytest.mark.parametrize("line", USUAL)
def test_usual_lines_take_the_fast_way(line) -> None:
    assert fast(line) == readable(line) is not None


@pytest.mark.parametrize("line", UNUSUAL)
def test_unusual_lines_are_read_by_the_twin(line) -> None:
    assert fast(line) is None and readable(line) is not None


@pytest.mark.parametrize("line", WRONG)
def test_wrong_lines_are_taken_by_neither(line) -> None:
    assert fast(line) is None and readable(line) is None


def test_a_damaged_line_is_never_taken_differently() -> None:
    source = random.Random(0)
    num_taken = 0
    for _ in range(20_000):
        line = bytearray(source.choice(USUAL + UNUSUAL[:13]))
        for _ in range(source.choice([1, 1, 2, 5])):
            at = source.randrange(len(line))
            kind = source.randrange(4)
            if kind == 0:
                line[at] = source.randrange(256)
            elif kind == 1:
                line[at] = source.choice(b'{}[],:"\\0123456789eE.-tfn \t')
            elif kind == 2:
                del line[at]
            else:
                line.insert(at, source.choice(b'{}[],:"\\0123456789 '))
        if b"\n" in line:
            continue
        found = fast(bytes(line))
        num_taken += found is not None
        assert found is None or found == readable(bytes(line)), bytes(line)
    assert num_taken > 2000


def test_hashes_of_ids_are_the_published_ones() -> None:
    """FNV-1a, 64 bits: test vectors of RFC 9923."""
    found = hash_ids(pa.array(["", "a", "foobar"])).tolist()
    assert found == [0xCBF29CE484222325, 0xAF63DC4C8601EC8C, 0x85944171F73967E8]
    assert (
        not len(hash_ids(pa.array([], pa.string())))
        and len(set(hash_ids(pa.array(["", ""])).tolist())) == 1
    )


def test_any_block_size_reads_the_same_rows(tmp_path) -> None:
    lines = [*USUAL, b"", b" \t", *UNUSUAL[1:7], USUAL[0]]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join(lines))
    found = []
    for size in (BYTES_AHEAD + 16, BYTES_AHEAD + 700, 1 << 20):
        reader = RowReader(LAYOUT)
        reader._block = bytearray(size)
        rows = reader.read(path, 0, path.stat().st_size)
        found.append(
            (
                rows.id.to_pylist(),
                rows.image.to_pylist(),
                rows.category.to_pylist(),
                rows.ids.tolist(),
            )
        )
        found[-1] += (rows.id_starts.tolist(), rows.spans.tolist(), rows.span_starts.tolist())
    assert found[0] == found[1] == found[2]
    assert found[0][0] == [readable(line)[0] for line in lines if line.strip()]


def test_a_file_that_shrinks_while_it_is_read(tmp_path, monkeypatch) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(USUAL[0] + b"\n")
    reader = RowReader(LAYOUT)
    make_room = reader._make_room
    monkeypatch.setattr(reader, "_make_room", lambda size: path.write_bytes(b"") or make_room(size))
    with pytest.raises(InputError, match="became shorter while it was read"):
        reader.read(path, 0, 10)


# ---- merged images ----


def merged_rows(path, vbpe: VisualBPE, grids: list[np.ndarray], change) -> None:
    rows = []
    for number, grid in enumerate(grids):
        codes, merged = (
            LAYOUT.image_to_token_ids(ids).tolist() for ids in (grid.ravel(), vbpe.encode(grid))
        )
        row = {
            "id": f"r{number}",
            "token_0": [256],
            "token_image": codes,
            "token_image_new": merged,
            "token_1": [257],
        }
        rows.append(json.dumps(change(row) if number == 7 else row))
    path.write_text("\n".join(rows))


@pytest.mark.parametrize("shape", [(4, 4), (2, 3)])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda row: row, None),
        (lambda row: {**row, "token_image": row["token_image"][:-1]}, "cells, token_image has"),
        (
            lambda row: {**row, "token_image_new": [*row["token_image_new"], 0]},
            "not all image tokens",
        ),
        (
            lambda row: {**row, "token_image_new": [LAYOUT.size - 1] * 4},
            "holds the image id 23, the vBPE's ids end at 17",
        ),
        (
            lambda row: {**row, "token_image": [263 + 15, *row["token_image"][1:]]},
            "does not decode",
        ),
        (
            lambda row: {**row, "token_image": [262, *row["token_image"][1:]]},
            "not all image tokens",
        ),
        (
            lambda row: {**row, "token_image": [263 + 16, *row["token_image"][1:]]},
            "the image id 16, the vBPE has 16 codes",
        ),
    ],
)
def test_merged_images_stand_for_their_codes(tmp_path, shape, change, message) -> None:
    vbpe = VisualBPE(16, np.array([[0, 1, 0, 1], [16, 0, 1, 0]], np.int32))
    grids = [np.random.default_rng(n).integers(0, 2, shape) for n in range(12)]
    path = tmp_path / "rows.jsonl"
    merged_rows(path, vbpe, grids, change)
    reader = RowReader(LAYOUT, vbpe)
    if message is None or (
        message == "does not decode" and shape == (2, 3)
    ):  # a grid of unknown width is not compared
        assert len(reader.read(path, 0, path.stat().st_size)) == 12
    else:
        with pytest.raises(InputError, match=f"sample 'r7': .*{message}"):
            reader.read(path, 0, path.stat().st_size)


@pytest.mark.parametrize("side", [4, 8, 11])
def test_streams_that_the_fast_reader_takes_are_those_that_decode_to_the_codes(side) -> None:
    vbpe = VisualBPE(
        16, np.array([[0, 1, 0, 1], [16, 0, 1, 0], [1, 16, 1, -1], [18, 17, 2, -2]], np.int32)
    )
    random_source = np.random.default_rng(side)
    outcomes = {True: 0, False: 0}
    for _ in range(1500):
        grid = random_source.integers(0, 2, (side, side)).astype(np.int32)
        stream = vbpe.encode(grid).astype(np.int32)
        for _ in range(random_source.integers(0, 3)):
            stream[random_source.integers(len(stream))] = random_source.choice(
                [-1, 0, 1, 16, 17, 18, 19, 20]
            )
        if random_source.integers(4) == 0:
            stream = np.delete(stream, random_source.integers(len(stream)))
        try:
            decodes = np.array_equal(vbpe.decode(stream, side, side), grid)
        except InputError:
            decodes = False
        assert (fast(line_of(grid, stream), vbpe) is not None) == decodes
        outcomes[decodes] += 1
    assert min(outcomes.values()) > 300


@pytest.mark.parametrize("shape", [(4, 4), (8, 8), (2, 3)])
def test_further_images_that_the_fast_reader_takes_are_those_that_its_twin_takes(shape) -> None:
    vbpe = VisualBPE(
        16, np.array([[0, 1, 0, 1], [16, 0, 1, 0], [1, 16, 1, -1], [18, 17, 2, -2]], np.int32)
    )
    random_source = np.random.default_rng(shape[1])
    outcomes = {True: 0, False: 0}
    for _ in range(1500):
        grid, *others = random_source.integers(0, 2, (3, *shape)).astype(np.int32)
        after = [7]
        for other in others:
            stream = vbpe.encode(other).astype(np.int32)
            if random_source.integers(3) == 0:
                stream[random_source.integers(len(stream))] = random_source.choice(
                    [0, 1, 15, 16, 17, 18, 19, 20]
                )
            if random_source.integers(6) == 0:
                stream = np.delete(stream, random_source.integers(len(stream)))
            after += [LAYOUT.boi_id, *(stream + LAYOUT.first_image_id).tolist(), LAYOUT.eoi_id]
        line = line_of(
            grid, vbpe.encode(grid), after[: -1 - random_source.integers(2)]
        )  # the last one whole, or cut
        try:
            check_images(parse_row(simdjson.Parser(), line), LAYOUT, vbpe)
            fits = True
        except ValueError:
            fits = False
        assert (fast(line, vbpe) is not None) == fits
        outcomes[fits] += 1
    assert min(outcomes.values()) > 300


def line_of(grid: np.ndarray, stream: np.ndarray, after: list[int] | None = None) -> bytes:
    codes, merged = ((ids.ravel() + LAYOUT.first_image_id).tolist() for ids in (grid, stream))
    return text(
        {
            "id": "a",
            "token_0": [256],
            "token_image": codes,
            "token_image_new": merged,
            "token_1": after or [257],
        }
    )


def test_an_image_larger_than_the_fast_reader_compares_is_compared_all_the_same(tmp_path) -> None:
    vbpe = VisualBPE(16, np.array([[0, 1, 0, 1]], np.int32))
    side = round(MOST_CELLS**0.5) + 1
    grid = np.random.default_rng(0).integers(0, 2, (side, side))
    for changed in (0, 1):
        codes = grid.copy()
        codes[-1, -1] ^= changed
        path = tmp_path / "rows.jsonl"
        path.write_bytes(line_of(codes, vbpe.encode(grid)))
        assert fast(path.read_bytes(), vbpe) is None
        if not changed:
            assert len(RowReader(LAYOUT, vbpe).read(path, 0, path.stat().st_size)) == 1
            continue
        with pytest.raises(InputError, match="sample 'a': token_image_new does not decode"):
            RowReader(LAYOUT, vbpe).read(path, 0, path.stat().st_size)


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (lambda ids: ids, None),
        (lambda ids: ids[:-1], "an image of token_1 covers 1. cells, the first image has 16"),
        (
            lambda ids: [*ids[:-1], 23],
            "an image of token_1 holds the image id 23, the vBPE's ids end at 17",
        ),
        (lambda ids: [0, 0, 0, 16, *[0] * 11], "invalid image stream at position 3 of 15"),
    ],
)
def test_images_behind_the_first_fill_a_grid_too(tmp_path, second, message) -> None:
    vbpe = VisualBPE(16, np.array([[0, 1, 0, 1], [16, 0, 1, 0]], np.int32))
    whole = vbpe.encode(np.random.default_rng(0).integers(0, 2, (4, 4))).tolist()
    further = [
        LAYOUT.boi_id,
        *LAYOUT.image_to_token_ids(np.array(second(whole))).tolist(),
        LAYOUT.eoi_id,
    ]
    grids = [np.random.default_rng(n).integers(0, 2, (4, 4)) for n in range(12)]
    path = tmp_path / "rows.jsonl"
    cut = [LAYOUT.boi_id, LAYOUT.first_image_id]  # by --too_long truncate
    merged_rows(
        path,
        vbpe,
        grids,
        lambda row: {**row, "token_0": [256, LAYOUT.boi_id], "token_1": [5, *further, 257, *cut]},
    )
    if message is None:
        assert len(RowReader(LAYOUT, vbpe).read(path, 0, path.stat().st_size)) == 12
        return
    with pytest.raises(InputError, match=f"sample 'r7': .*{message}"):
        RowReader(LAYOUT, vbpe).read(path, 0, path.stat().st_size)
