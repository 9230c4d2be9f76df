import numpy as np
import pytest

from beingvl.data.conversation import TextEncoder, build_sequence, parse_conversation
from beingvl.errors import InputError
from tests.tiny import LAYOUT, write_tokenizer

BOS, EOS, SEP, EOI, BOI = LAYOUT.bos_id, LAYOUT.eos_id, LAYOUT.sep_id, LAYOUT.eoi_id, LAYOUT.boi_id
IMAGE, OTHER = np.array([263, 264]), np.array([265])


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> TextEncoder:
    folder = tmp_path_factory.mktemp("model")
    write_tokenizer(folder, LAYOUT)
    return TextEncoder(folder, LAYOUT)


def build(encoder: TextEncoder, turns, images, template="default"):
    return build_sequence(turns, images, encoder, LAYOUT, template)


def test_one_image_stands_first_wherever_its_placeholder_is(encoder) -> None:
    q, a = encoder.plain("hi"), encoder.plain("yes")
    expected = [BOS, BOI, 263, 264, EOI, *q, SEP, *a, EOS]
    for question in ("<image>\nhi", "hi\n<image>", "hi"):
        sample = build(encoder, [(question, "yes")], [IMAGE])
        assert sample.input_ids == expected
    assert (sample.token_0.tolist(), sample.image.tolist()) == ([BOS, BOI], [263, 264])
    assert sample.target_spans == [(8, 12)]
    assert sample.input_ids[8:12] == [*a, EOS]


def test_further_turns_and_text_only(encoder) -> None:
    sample = build(encoder, [("a", "b"), ("c", "d")], [])
    ids = {letter: encoder.plain(letter)[0] for letter in "abcd"}
    assert sample.input_ids == [BOS, ids["a"], SEP, ids["b"], EOS, ids["c"], SEP, ids["d"], EOS]
    assert sample.target_spans == [(3, 5), (7, 9)]
    assert len(sample.image) == 0


def test_several_images_stand_where_their_placeholders_are(encoder) -> None:
    sample = build(encoder, [("x<image>y<image>", "z")], [IMAGE, OTHER])
    x, y, z = (encoder.plain(letter)[0] for letter in "xyz")
    assert sample.input_ids == [BOS, x, BOI, 263, 264, EOI, y, BOI, 265, EOI, SEP, z, EOS]
    assert sample.token_0.tolist() == [BOS, x, BOI] and sample.image.tolist() == [263, 264]
    assert sample.target_spans == [(11, 13)]


def test_a_prompt_is_the_sequence_with_the_last_answer_missing(encoder) -> None:
    whole = build(encoder, [("a", "b"), ("<image>c", "d")], [IMAGE])
    prompt = build(encoder, [("a", "b"), ("<image>c", None)], [IMAGE])
    assert prompt.input_ids == whole.input_ids[:-2]
    assert prompt.input_ids[-1] == SEP


@pytest.mark.parametrize(
    ("question", "images"),
    [
        ("<image>", [IMAGE, OTHER]),
        ("<image><image><image>", [IMAGE, OTHER]),
        ("<image>", []),
        ("<image> and <image>", [IMAGE]),
    ],
)
def test_placeholders_and_images_must_fit(encoder, question, images) -> None:
    with pytest.raises(InputError, match="placeholders"):
        build(encoder, [(question, "a")], images)
    if len(images) == 1:
        with pytest.raises(InputError, match="placeholders"):
            build(encoder, [("<image>", "a"), ("<image>", "a")], images)


def test_user_text_cannot_spell_special_or_visual_tokens(encoder) -> None:
    spelled = encoder.plain("<eoss><|end_of_text|><image>")
    assert len(spelled) == len("<eoss><|end_of_text|><image>") and max(spelled) < 256
    with pytest.raises(InputError, match="reserved token 'IMGIMGAAAAAAZ'"):
        encoder.plain("see IMGIMGAAAAAAZ")


def test_published_template_is_kept_exactly(encoder) -> None:
    sample = build(encoder, [("<image>\nhi", "yes"), ("so", "no")], [IMAGE], "being-vl-0.5")
    text = encoder.plain("hi yes</s>"), encoder.plain("so no</s>")
    assert sample.input_ids == [BOS, BOI, 263, 264, EOI, *text[0], SEP, *text[1]]
    assert sample.target_spans == [(4, len(sample.input_ids))]
    with pytest.raises(InputError, match="at most one image"):
        build(encoder, [("hi", "yes")], [IMAGE, OTHER], "being-vl-0.5")


def test_unknown_template_and_missing_tokenizer(encoder, tmp_path) -> None:
    with pytest.raises(InputError, match="template 'chatml' is unknown"):
        build(encoder, [("a", "b")], [], "chatml")
    with pytest.raises(InputError, match=r"no tokenizer\.json"):
        TextEncoder(tmp_path, LAYOUT)


HUMAN, GPT = {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}


@pytest.mark.parametrize(
    ("conversations", "message"),
    [
        (None, "empty or not a list"),
        ([], "empty"),
        ([HUMAN], "pairs"),
        ([HUMAN, HUMAN], "is from 'human', expected 'gpt'"),
        ([GPT, HUMAN], "is from 'gpt', expected 'human'"),
        ([HUMAN, {"from": "gpt", "value": " "}], "empty answer"),
        ([HUMAN, {"from": "gpt"}], "text 'value'"),
        (["q", "a"], "not an object"),
    ],
)
def test_malformed_conversations(conversations, message) -> None:
    with pytest.raises(InputError, match=message):
        parse_conversation(conversations)


def test_conversation_roles_have_two_names() -> None:
    assert parse_conversation(
        [{"from": "user", "value": "q"}, {"from": "assistant", "value": "a"}]
    ) == [("q", "a")]
