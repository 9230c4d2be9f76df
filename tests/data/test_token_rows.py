"""Lines of token rows: what is a row, what is an error with its line, and merged images that do not
stand for their codes.
"""

import json
import random

import numpy as np
import pytest
import simdjson

from beingvl.data import token_rows
from beingvl.data.shard_columns import Row, ShardColumns, ShardFacts
from beingvl.data.token_rows import NOT_A_ROW, are_fine, check_images, parse_row, read_rows
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
SHORT = {
    "id": "r1",
    "token_0": [256, 262],
    "token_image": [263, 264, 265, 266],
    "token_image_new": [279, 0],
    "token_1": [260, 5, 257],
    "target_spans": [[5, 7]],
}
MANY = [*range(100_000, 100_100), *range(999_900, 1_000_000), *range(123_456, 200_000, 777)]


def found_in(line: bytes) -> tuple | None:
    """The row of a line, None when it is not one."""
    try:
        row = parse_row(simdjson.Parser(), line).row
    except NOT_A_ROW:
        return None
    return (*row[:3], np.concatenate(row.ids).tolist(), row.spans.tolist())


def oracle(line: bytes) -> tuple:
    """The same with the standard library's parser, in the plainest way; of a name that is there
    twice the first one counts.
    """
    row = json.loads(line, object_pairs_hook=lambda pairs: dict(reversed(pairs)))

    def integers(name: str) -> list[int]:
        flat: list[int] = []
        stack = [row[name]]
        while stack:
            value = stack.pop()
            if isinstance(value, list):
                stack += reversed(value)
            else:
                flat.append(value)
        return flat

    image_field = "token_image" if row.get("token_image_new") is None else "token_image_new"
    image_ids = [] if row.get(image_field) is None else integers(image_field)
    ids = [*integers("token_0"), *image_ids, *integers("token_1")]
    spans = [len(ids) - len(integers("token_1")), len(ids)]
    if row.get("target_spans") is not None:
        spans = integers("target_spans")
    image = row.get("image") or ""
    if isinstance(row.get("image"), list):
        image = json.dumps(row["image"], separators=(",", ":"), ensure_ascii=False)
    category = row.get("category") or row.get("original", {}).get("category") or "default"
    return str(row.get("id") or ""), image, category, ids, spans


def text(row: dict, **options) -> bytes:
    return json.dumps(row, **options).encode()


ROWS = [
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
    b'{"id":null,"token_0":[1],"token_1":[]}',
    b'{"token_0":[1],"token_1":[2],"original":{"category":"reasoning"}}',
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


@pytest.mark.parametrize("line", ROWS)
def test_rows(line) -> None:
    assert found_in(line) == oracle(line)


@pytest.mark.parametrize("line", WRONG)
def test_wrong_lines_are_named(tmp_path, line) -> None:
    assert found_in(line) is None
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join([text(SHORT), b" ", line or b"0", text(SHORT)]))
    with pytest.raises(InputError, match=r"rows.jsonl, line 3: not a token row \("):
        read_rows(path, 0, path.stat().st_size, LAYOUT)


def test_a_damaged_line_is_an_error_or_another_row() -> None:
    source = random.Random(0)
    num_taken = 0
    for _ in range(20_000):
        line = bytearray(source.choice(ROWS[:29]))
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
        found = found_in(bytes(line))
        num_taken += found is not None
        assert found is None or found == oracle(bytes(line)), bytes(line)
    assert num_taken > 2000


def test_equal_ids_have_equal_hashes() -> None:
    rows = [Row(name, "", "a", (np.ones(1, np.int32),), np.empty(0, np.int32)) for name in "abca"]
    hashes = ShardFacts.of_columns(ShardColumns.of_rows(rows)).id_hashes.tolist()
    assert hashes[0] == hashes[3] and len(set(hashes)) == 3


@pytest.mark.parametrize("piece_bytes", [37, 500, 1 << 20])
@pytest.mark.parametrize("rows_per_block", [1, 3, 1000])
def test_any_blocks_and_pieces_read_the_same_rows(
    tmp_path, monkeypatch, rows_per_block, piece_bytes
) -> None:
    monkeypatch.setattr(token_rows, "ROWS_PER_BLOCK", rows_per_block)
    lines = [text({**SHORT, "id": f"r{n}", "image": "é" * n}) for n in range(10)]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join([*lines[:3], b"", b" \t", *lines[3:]]))
    size = path.stat().st_size
    done: list[int] = []
    blocks = [
        read_rows(path, start, min(start + piece_bytes, size), LAYOUT, advance=done.append)
        for start in range(0, size, piece_bytes)
    ]
    rows = ShardColumns.joined(blocks)
    assert rows.id.to_pylist() == [f"r{n}" for n in range(10)]
    assert rows.image.to_pylist() == ["é" * n for n in range(10)]
    assert np.diff(rows.id_starts).tolist() == [7] * 10 and rows.ids.dtype == np.int32
    assert rows.ids[:7].tolist() == [256, 262, 279, 0, 260, 5, 257]
    assert rows.spans.tolist() == [5, 7] * 10 and rows.span_starts.tolist()[-1] == 20
    assert sum(done) == size - 4  # without blank lines


def test_a_file_that_shrinks_while_it_is_read(tmp_path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(text(SHORT) + b"\n")
    with pytest.raises(InputError, match="became shorter while it was read"):
        read_rows(path, 0, path.stat().st_size + 10, LAYOUT)


@pytest.mark.parametrize("changed", [{"token_1": [2**40]}, {"token_0": [-1]}, {"token_1": [2**31]}])
def test_ids_that_no_vocabulary_holds(tmp_path, changed) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(text(SHORT) + b"\n" + text({**SHORT, "id": "bad", **changed}))
    (wrong,) = next(iter(changed.values()))
    found = f"rows.jsonl: sample 'bad' has id {wrong}, the vocabulary ends at {LAYOUT.size - 1}"
    with pytest.raises(InputError, match=found):
        read_rows(path, 0, path.stat().st_size, LAYOUT)


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
    if message is None or (
        message == "does not decode" and shape == (2, 3)
    ):  # a grid of unknown width is not compared
        assert len(read_rows(path, 0, path.stat().st_size, LAYOUT, vbpe)) == 12
    else:
        with pytest.raises(InputError, match=f"sample 'r7': .*{message}"):
            read_rows(path, 0, path.stat().st_size, LAYOUT, vbpe)


@pytest.mark.parametrize("side", [4, 8, 11])
def test_streams_that_are_fine_are_those_that_decode_to_the_codes(side) -> None:
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
        row = parse_row(simdjson.Parser(), line_of(grid, stream))
        assert are_fine([row], LAYOUT, vbpe) == decodes == passes(row, vbpe)
        outcomes[decodes] += 1
    assert min(outcomes.values()) > 300


@pytest.mark.parametrize("shape", [(4, 4), (8, 8), (2, 3)])
def test_further_images_that_are_fine_are_those_that_the_readable_twin_takes(shape) -> None:
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
        row = parse_row(simdjson.Parser(), line)
        fits = passes(row, vbpe)
        assert are_fine([row], LAYOUT, vbpe) == (fits and shape != (2, 3))
        outcomes[fits] += 1
    assert min(outcomes.values()) > 300


def passes(row: token_rows.TokenRow, vbpe: VisualBPE) -> bool:
    try:
        check_images(row, LAYOUT, vbpe)
    except ValueError:
        return False
    return True


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


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (lambda ids: ids, None),
        (lambda ids: ids[:-1], "an image of token_1 covers 1. cells, token_image has 16"),
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
        assert len(read_rows(path, 0, path.stat().st_size, LAYOUT, vbpe)) == 12
        return
    with pytest.raises(InputError, match=f"sample 'r7': .*{message}"):
        read_rows(path, 0, path.stat().st_size, LAYOUT, vbpe)
