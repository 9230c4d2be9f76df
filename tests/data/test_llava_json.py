import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from beingvl.data import llava_json
from beingvl.data.llava_json import BrokenRow, image_keys, stream_rows, stream_rows_and_broken
from beingvl.errors import InputError

VALUES = st.recursive(
    st.none() | st.integers() | st.text(max_size=8), lambda v: st.lists(v, max_size=3), max_leaves=6
)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.dictionaries(st.text(max_size=5), VALUES, max_size=4), min_size=1, max_size=8),
    st.integers(1, 30),
)
def test_any_array_in_any_blocks_is_what_json_reads(tmp_path_factory, rows, block) -> None:
    path = tmp_path_factory.mktemp("rows") / "rows.json"
    saved, llava_json.BLOCK_CHARS = llava_json.BLOCK_CHARS, block
    try:
        for text in (
            json.dumps(rows),
            json.dumps(rows, indent=1, ensure_ascii=True),
            "\n".join(map(json.dumps, rows)) + "\n",
        ):
            path.write_text(text, encoding="utf-8")
            assert list(stream_rows(path)) == rows
    finally:
        llava_json.BLOCK_CHARS = saved


WRONG = {
    '[{"a": 1}': "after element 1 .*no closing bracket",
    '[{"a": 1} {"a": 2}]': "expected a comma",
    '[{"a": 1},]': "after element 1",
    '[{"a": 1}] x': "something follows",
    '[{"a": ': "after element 0",
    "[]": "non-empty list",
    "": "non-empty list",
    "[7]": "row 1: expected an object",
    '{\n "a": 1\n}': "line 1: an object spans several lines",
    '{"a": 1}\n\n{': "row 2: line 3 is not valid JSON",
    '[{"a": 1}, {"a" 1}]': r"after element 1 .character 17: Expecting ':' delimiter",
    '{"a": ' + "1" * 5000 + "}": "row 1: line 1 is not valid JSON .*digits",
    "[" + '{"a": ' * 100_000: "after element 0 .*recursion",
}


@pytest.mark.parametrize("text", WRONG, ids=lambda text: text[:20])
def test_damage_is_located(tmp_path, text) -> None:
    (tmp_path / "rows.json").write_text(text)
    with pytest.raises(InputError, match=WRONG[text]):
        list(stream_rows(tmp_path / "rows.json"))


def test_what_is_no_text(tmp_path) -> None:
    (tmp_path / "rows.json").write_bytes(b'[{"a": "\xff"}]')
    with pytest.raises(InputError, match="not UTF-8"):
        list(stream_rows(tmp_path / "rows.json"))


def test_what_stands_behind_a_broken_row_is_read(tmp_path) -> None:
    path, good = tmp_path / "rows.json", {"a": "\u00fc"}
    lines = [
        b"\xef\xbb\xbf" + json.dumps(good).encode(),
        b"{",
        b"",
        b'{"a": "\xff"}',
        b"[1]",
        b"7",
        json.dumps(good).encode(),
    ]
    path.write_bytes(b"\n".join(lines))
    reasons = [
        "line 2 is not valid JSON",
        "line 4 is not UTF-8 text (invalid start byte at byte 7)",
        "found list",
        "found int",
    ]
    for text in (b"\n".join(lines), b" " + json.dumps([good, None, 1.5, [], "a", good]).encode()):
        path.write_bytes(text)
        found = list(stream_rows_and_broken(path))
        assert (
            found[0] == found[-1] == good
            and all(isinstance(row, BrokenRow) for row in found[1:-1])
            and len(found) == 6
        )
        for row, reason in zip(found[1:-1], reasons, strict=True):
            assert reason in row.reason
        reasons = ["found NoneType", "found float", "found list", "found str"]


def test_a_row_that_is_nested_too_deep_is_broken(tmp_path) -> None:
    """Long before Python's own limit, which is another one where a row is handed to a process."""
    path = tmp_path / "rows.jsonl"
    for depth, is_broken in ((63, False), (64, True), (500, True), (100_000, True)):
        path.write_text('{"a": ' + "[" * depth + "7" + "]" * depth + "}\n{}")
        found = list(stream_rows_and_broken(path))
        assert isinstance(found[0], BrokenRow) == is_broken and found[1] == {}


@pytest.mark.parametrize("block", [1, 7, 1 << 20])
def test_damage_of_an_array_is_located_in_the_whole_file(tmp_path, block, monkeypatch) -> None:
    monkeypatch.setattr(llava_json, "BLOCK_CHARS", block)
    text = json.dumps([{"a": n} for n in range(99)])
    (tmp_path / "rows.json").write_text(text[:-1] + ', {"a": }]')
    with pytest.raises(
        InputError, match=f"after element 99 .character {len(text) + 8:,}: Expecting value"
    ):
        list(stream_rows(tmp_path / "rows.json"))


def test_a_row_longer_than_any_row_is_not_held_in_memory(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(llava_json, "MAX_ROW_CHARS", 100)
    monkeypatch.setattr(llava_json, "BLOCK_CHARS", 10)
    monkeypatch.setattr(llava_json, "BLOCK_BYTES", 10)
    path, rows = tmp_path / "rows.json", [{"a": 1}, {"a": "b" * 1000}, {"a": "c" * 80}]
    path.write_text("\n".join(map(json.dumps, rows)))
    assert list(stream_rows_and_broken(path)) == [
        rows[0],
        BrokenRow("line 2 has 100 bytes or more"),
        rows[2],
    ]
    path.write_text(json.dumps(rows))
    with pytest.raises(
        InputError, match=r"after element 1 .*, or the element has more than 100 characters"
    ):
        list(stream_rows(path))


def test_images_of_a_row() -> None:
    assert (
        image_keys({"image": "a"}) == ["a"]
        and image_keys({"image": ["a", "b"]}) == ["a", "b"]
        and image_keys({}) == []
    )
    for image in (7, ["a", 7], {"a": 1}):
        with pytest.raises(InputError, match="path or a list"):
            image_keys({"image": image})
