import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from beingvl.errors import InputError
from beingvl.tokenizer import llava_json
from beingvl.tokenizer.llava_json import image_keys, stream_rows

VALUES = st.recursive(st.none() | st.integers() | st.text(max_size=8), lambda v: st.lists(v, max_size=3), max_leaves=6)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.dictionaries(st.text(max_size=5), VALUES, max_size=4), min_size=1, max_size=8), st.integers(1, 30))
def test_any_array_in_any_blocks_is_what_json_reads(tmp_path_factory, rows, block) -> None:
    path = tmp_path_factory.mktemp("rows") / "rows.json"
    saved, llava_json.BLOCK_CHARS = llava_json.BLOCK_CHARS, block
    try:
        for text in (json.dumps(rows), json.dumps(rows, indent=1, ensure_ascii=True), "\n".join(map(json.dumps, rows)) + "\n"):
            path.write_text(text, encoding="utf-8")
            assert list(stream_rows(path)) == rows
    finally:
        llava_json.BLOCK_CHARS = saved


WRONG = {
    '[{"a": 1}': "behind element 1 .*no closing bracket",
    '[{"a": 1} {"a": 2}]': "expected a comma",
    '[{"a": 1},]': "behind element 1",
    '[{"a": 1}] x': "something follows",
    '[{"a": ': "behind element 0",
    "[]": "non-empty list",
    "": "non-empty list",
    "[7]": "row 1: expected an object",
    '{"a": 1}\n{': "line 2",
    '{"a": ' + "1" * 5000 + "}": "line 1: not valid JSON .*digits",
    "[" + '{"a": ' * 100_000: "behind element 0 .*recursion",
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


def test_images_of_a_row() -> None:
    assert image_keys({"image": "a"}) == ["a"] and image_keys({"image": ["a", "b"]}) == ["a", "b"] and image_keys({}) == []
    for image in (7, ["a", 7], {"a": 1}):
        with pytest.raises(InputError, match="path or a list"):
            image_keys({"image": image})
