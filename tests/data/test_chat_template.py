"""`tokenizer.apply_chat_template` of stock transformers gives the ids of `build_sequence`."""

import json
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2.exceptions import TemplateError
from transformers import AutoTokenizer

from beingvl.data.chat_template import chat_template
from beingvl.data.conversation import TextEncoder, build_sequence
from beingvl.model import tokenizer_files
from beingvl.vocab import VocabLayout
from tests.model.small_models import (
    llama3_tokenizer_file,
    make_tokenizer,
    write_sentencepiece_base,
)

TEXT = st.text(
    st.one_of(st.sampled_from("aB7 .,!?'\n\t<|>/s_é中🙂\u00a0"), st.characters(codec="utf-8")),
    max_size=12,
)
SPELLS = re.compile(r"IMGIMG|<vbpe|<\||</?s>|<unk>|<(image|pad|eoss|reserved|racm)")
WORDS = TEXT.filter(lambda text: text.strip() and not SPELLS.search(text))
KINDS = "byte-level", "llama-3", "sentencepiece", "a blank before the first word alone"


SLOW = pytest.param("llama-3", marks=pytest.mark.slow)  # 128,256 ids are read


@pytest.fixture(scope="module", params=[SLOW if kind == "llama-3" else kind for kind in KINDS])
def made(request, tmp_path_factory):
    """(folder, its layout, its encoder, stock tokenizer) with all new tokens."""
    folder = tmp_path_factory.mktemp("model")
    if request.param == "llama-3":
        (folder / "tokenizer.model").symlink_to(llama3_tokenizer_file())
    elif request.param == "byte-level":
        make_tokenizer().save_pretrained(folder)
    else:
        write_sentencepiece_base(folder)
    tokenizer = tokenizer_files.load_tokenizer(folder)
    layout = VocabLayout(len(tokenizer), 4, 2, tokenizer.bos_token_id, tokenizer.eos_token_id)
    tokenizer_files.extend_tokenizer(tokenizer, layout, str(folder))
    tokenizer_files.save_tokenizer(tokenizer, folder)
    if request.param == KINDS[3]:
        path = folder / "tokenizer.json"
        fields = json.loads(path.read_text())
        fields["normalizer"] = None
        metaspace = {"replacement": "▁", "prepend_scheme": "first", "split": False}
        fields["pre_tokenizer"] = {"type": "Metaspace", **metaspace}
        path.write_text(json.dumps(fields))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return folder, layout, TextEncoder(folder, layout), tokenizer


def ids_of(made, template: str, messages) -> list[int]:
    folder, layout, _, tokenizer = made
    if tokenizer.init_kwargs.get("taught") != template:
        tokenizer.chat_template = chat_template(folder, layout, template)
        tokenizer.init_kwargs["taught"] = template
    return tokenizer.apply_chat_template(messages, return_dict=False)


def messages_of(turns, as_parts: bool) -> list[dict]:
    messages = []
    for question, answer in turns:
        content: object = question
        if as_parts:
            texts = question.split("<image>")
            content = [{"type": "text", "text": texts[0]}]
            for text in texts[1:]:
                content += [{"type": "image"}, {"type": "text", "text": text}]
        messages.append({"role": "user", "content": content})
        if answer is not None:
            messages.append({"role": "assistant", "content": answer})
    return messages


@pytest.mark.parametrize("is_prompt", [True, False])
def test_text_turns_and_images_have_the_ids_of_training(made, is_prompt) -> None:
    _, layout, encoder, _ = made
    place = np.array([layout.image_placeholder_id], np.int32)
    questions = st.lists(WORDS, min_size=1, max_size=3)

    @settings(max_examples=25, deadline=None)
    @given(st.lists(st.tuples(questions, WORDS), min_size=1, max_size=3), st.booleans())
    def check(pieces, as_parts) -> None:
        turns = [("<image>".join(texts), answer) for texts, answer in pieces]
        if is_prompt:
            turns[-1] = (turns[-1][0], None)
        num_images = sum(question.count("<image>") for question, _ in turns)
        expected = build_sequence(turns, [place] * num_images, encoder, layout).input_ids
        assert ids_of(made, "default", messages_of(turns, as_parts)) == expected

    check()


@pytest.mark.parametrize("is_prompt", [True, False])
def test_the_published_template_too(made, is_prompt) -> None:
    _, layout, encoder, _ = made
    place = np.array([layout.image_placeholder_id], np.int32)

    @settings(max_examples=25, deadline=None)
    @given(st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=3), st.booleans(), st.booleans())
    def check(turns, has_image, as_parts) -> None:
        turns = [*turns]
        if is_prompt:
            turns[-1] = (turns[-1][0].rstrip(), None)
        if has_image:
            turns[0] = (f"<image>\n{turns[0][0]}", turns[0][1])
        expected = build_sequence(turns, [place] * has_image, encoder, layout, "being-vl-0.5")
        assert ids_of(made, "being-vl-0.5", messages_of(turns, as_parts)) == expected.input_ids

    check()


def test_what_no_text_can_spell_is_refused_by_the_template(made) -> None:
    special = made[2].special_text(made[1].bos_id)
    for content, message in [
        (f"hi {special}", "reserved token"),
        ("IMGIMGAAAAAAZ", "reserved token"),
        ([{"type": "video"}], "of type video, expected text or image"),
    ]:
        with pytest.raises(TemplateError, match=message):
            ids_of(made, "default", [{"role": "user", "content": content}])
    turn = {"role": "user", "content": "hi"}
    for template in ("default", "being-vl-0.5"):
        with pytest.raises(TemplateError, match="of user, expected one of assistant"):
            ids_of(made, template, [turn, turn])
    with pytest.raises(TemplateError, match="takes one image, found 2"):
        ids_of(made, "being-vl-0.5", [{"role": "user", "content": "<image> <image> same?"}])


def test_a_system_message_begins_the_first_question(made) -> None:
    _, layout, encoder, _ = made
    system = {"role": "system", "content": "Be brief."}
    messages = [system, {"role": "user", "content": "hi"}]
    for template in ("default", "being-vl-0.5"):
        expected = build_sequence([("Be brief.\n\nhi", None)], [], encoder, layout, template)
        assert ids_of(made, template, messages) == expected.input_ids
