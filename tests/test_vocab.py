import numpy as np
import pytest

from beingvl.errors import InputError
from beingvl.vocab import LAYOUT_FILE, VocabLayout, image_token_text

LLAMA3 = VocabLayout(num_text=128256, num_vq=8192, num_merges=8192, bos_id=128000, eos_id=128001)


def test_llama3_ranges_are_the_published_ones() -> None:
    assert [
        LLAMA3.pad_id,
        LLAMA3.sep_id,
        LLAMA3.eoi_id,
        LLAMA3.image_placeholder_id,
        LLAMA3.boi_id,
    ] == list(range(128256, 128261))
    assert (LLAMA3.first_image_id, LLAMA3.first_vbpe_id, LLAMA3.size) == (128261, 136453, 144645)
    assert LLAMA3.num_visual == 16389


def test_token_texts() -> None:
    assert image_token_text(0) == "IMGIMGAAAAAAZ"
    assert image_token_text(10) == "IMGIMGAAAABAZ"
    assert image_token_text(8191) == "IMGIMGAAIBJBZ"
    tokens = LLAMA3.new_tokens()
    assert len(tokens) == len(set(tokens)) == 16389
    assert tokens[:5] == ["<pad>", "<reserved08706>", "<eoss>", "<image>", "<racm3:break>"]
    assert tokens[5] == "IMGIMGAAAAAAZ" and tokens[5 + 8192] == "<vbpe00000>"


def test_image_ids_round_trip_and_stay_in_range() -> None:
    ids = np.array([0, 8191, 8192, 16383])
    tokens = LLAMA3.image_to_token_ids(ids)
    assert tokens.tolist() == [128261, 136452, 136453, 144644]
    assert LLAMA3.token_to_image_ids(tokens).tolist() == ids.tolist()
    with pytest.raises(InputError, match="16384"):
        LLAMA3.image_to_token_ids(np.array([16384]))
    with pytest.raises(InputError, match="not all image tokens"):
        LLAMA3.token_to_image_ids(np.array([128260]))


@pytest.mark.parametrize("num_text", [32000, 49152, 65536, 128256])
def test_codes_of_16_bits_become_token_ids_of_any_vocabulary(num_text: int) -> None:
    layout = VocabLayout(num_text=num_text, num_vq=65536, num_merges=0, bos_id=0, eos_id=1)
    tokens = layout.image_to_token_ids(np.array([0, 8191, 65535], np.uint16))
    assert (
        tokens.tolist() == [num_text + 5, num_text + 8196, num_text + 65540]
        and tokens.dtype == np.int32
    )


def test_token_kinds() -> None:
    ids = np.array([0, 128255, 128256, 128260, 128261, 136452, 136453, 144644])
    assert LLAMA3.token_kinds(ids).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert LLAMA3.is_image_token(ids).tolist() == [False] * 4 + [True] * 4


def test_layout_file(tmp_path) -> None:
    with pytest.raises(InputError, match="beingvl convert"):
        VocabLayout.load(tmp_path)
    (tmp_path / LAYOUT_FILE).write_text('{"num_text": 10}')
    with pytest.raises(InputError, match="num_merges"):
        VocabLayout.load(tmp_path)


@pytest.mark.parametrize(
    "wrong", [{"num_text": 0}, {"num_vq": 0}, {"num_merges": -1}, {"bos_id": 10}, {"eos_id": -1}]
)
def test_impossible_layouts_are_refused(wrong: dict) -> None:
    with pytest.raises(InputError, match=next(iter(wrong))):
        VocabLayout.from_dict(
            {"num_text": 10, "num_vq": 4, "num_merges": 2, "bos_id": 0, "eos_id": 1, **wrong}
        )


def test_the_folder_of_a_stage_says_where_its_model_is(tmp_path) -> None:
    (tmp_path / "final").mkdir()
    (tmp_path / "final" / LAYOUT_FILE).touch()
    with pytest.raises(InputError, match=r"it is not a Being-VL model folder; give .*/final"):
        VocabLayout.load(tmp_path)


def test_fingerprint_tells_layouts_apart() -> None:
    other = VocabLayout.from_dict({**LLAMA3.to_dict(), "num_merges": 8191})
    assert (
        LLAMA3.fingerprint()
        == VocabLayout.from_dict(LLAMA3.to_dict()).fingerprint()
        != other.fingerprint()
    )
