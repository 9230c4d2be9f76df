"""The chat template: the one function that turns a conversation and its images into token ids.

Training, generation and evaluation all call `build_sequence`. The default template is

    bos boi IMAGE eoi question sep answer eos  question sep answer eos  …

One image stands first whatever the position of its `<image>` placeholder; with several images each
stands where its placeholder is. A text-only sample has no image part. Targets are the answers with
their eos. A prompt for generation is the same sequence with the last answer missing: it ends behind
`sep`.

Worked example (text ids 0 … 9, bos 0, eos 1, sep 11, eoi 12, boi 14, image tokens 15 …; "hi" = 5,
"yes" = 7):

    turns = [("<image>hi", "yes")], images = [[15, 16]]
    input_ids = 0 14 15 16 12  5  11  7 1       target_spans = [(7, 9)]
                bos boi IMAGE eoi hi sep yes eos

Template `being-vl-0.5` reproduces the published pipeline for files made with it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from beingvl.artefact.files import printable
from beingvl.errors import InputError
from beingvl.vocab import VocabLayout

IMAGE_PLACEHOLDER = "<image>"
TEMPLATES = ("default", "being-vl-0.5")
CUT_CHARACTER = (
    "holds what is no character: bytes that are not UTF-8, or half of a surrogate "
    "pair, as a cut emoji leaves it"
)
HUMAN_NAMES = ("human", "user")
ASSISTANT_NAMES = ("gpt", "assistant")

Turn = tuple[str, "str | None"]
"""(question, answer); the answer of the last turn is None in a prompt for generation."""


@dataclass(frozen=True)
class TokenizedSample:
    """Token ids in three parts, as the JSONL format has them: before the first image, the first
    image, behind it.

    `target_spans` are (start, end) pairs, end exclusive, in `token_0 + image + token_1`.
    """

    token_0: list[int]
    image: list[int]
    token_1: list[int]
    target_spans: list[tuple[int, int]]

    @property
    def input_ids(self) -> list[int]:
        return [*self.token_0, *self.image, *self.token_1]


def open_tokenizer(model_folder: Path | str) -> Tokenizer:
    """A model folder's tokenizer.json. Raises InputError when it is missing or damaged."""
    path = Path(model_folder) / "tokenizer.json"
    if not path.is_file():
        raise InputError(
            f"{model_folder} has no tokenizer.json; make the model folder with `beingvl convert`"
        )
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises nothing narrower
        raise InputError(
            f"{path} is damaged ({error}); copy or make the model folder again"
        ) from error


class TextEncoder:
    """Text to token ids with a model folder's tokenizer.json; `plain` never produces a special
    or visual token.
    """

    def __init__(self, model_folder: Path | str, layout: VocabLayout) -> None:
        self._tokenizer = open_tokenizer(model_folder)
        self._layout = layout

    def plain(self, text: str) -> list[int]:
        """Ids of `text` as ordinary text. Raises InputError when it spells a reserved token such
        as `IMGIMGAAAAAAZ`.
        """
        ids = self._encode(text, with_specials=False)
        reserved = [token for token in ids if token >= self._layout.num_text]
        if reserved:
            raise InputError(
                f"the text {text[:60]!r} spells the reserved token "
                f"{self._tokenizer.id_to_token(reserved[0])!r}"
            )
        return ids

    def with_specials(self, text: str) -> list[int]:
        """Ids of `text` in which special tokens may be spelled out (template `being-vl-0.5`
        only).
        """
        return self._encode(text, with_specials=True)

    def _encode(self, text: str, with_specials: bool) -> list[int]:
        if printable(text) != text:
            raise InputError(f"the text {printable(text[:60])!r} {CUT_CHARACTER}")
        self._tokenizer.encode_special_tokens = not with_specials
        return self._tokenizer.encode(text, add_special_tokens=False).ids


def parse_conversation(conversations: Any) -> list[Turn]:
    """LLaVA `conversations` to turns. Raises InputError that says what is malformed."""
    if not isinstance(conversations, list) or not conversations:
        raise InputError(
            "conversations is empty or not a list, expected alternating human and gpt turns"
        )
    if len(conversations) % 2:
        raise InputError(
            f"conversations has {len(conversations)} entries, expected pairs of human and gpt"
        )
    turns: list[Turn] = []
    for position in range(0, len(conversations), 2):
        question = _value_of(conversations[position], HUMAN_NAMES, position)
        answer = _value_of(conversations[position + 1], ASSISTANT_NAMES, position + 1)
        if not answer.strip():
            raise InputError(f"conversations[{position + 1}] has an empty answer")
        turns.append((question, answer))
    return turns


def _value_of(entry: Any, names: Sequence[str], position: int) -> str:
    if not isinstance(entry, dict) or not isinstance(entry.get("value"), str):
        raise InputError(f"conversations[{position}] is not an object with a text 'value'")
    if entry.get("from") not in names:
        raise InputError(
            f"conversations[{position}] is from {entry.get('from')!r}, expected "
            f"{' or '.join(map(repr, names))}"
        )
    return entry["value"]


def build_sequence(
    turns: Sequence[Turn],
    images: Sequence[np.ndarray],
    encoder: TextEncoder,
    layout: VocabLayout,
    template: str = "default",
) -> TokenizedSample:
    """Turns and images (each a 1-D array of image *token* ids) to one sequence.

    Raises InputError when placeholders and images do not fit each other.
    """
    if template == "being-vl-0.5":
        return _build_published(turns, images, encoder, layout)
    if template != "default":
        raise InputError(f"template {template!r} is unknown, expected one of {list(TEMPLATES)}")
    builder = _SequenceBuilder(layout)
    remaining = list(images)
    if len(images) == 1:
        if sum(question.count(IMAGE_PLACEHOLDER) for question, _ in turns) > 1:
            raise InputError(f"there are more {IMAGE_PLACEHOLDER} placeholders than images")
        builder.add_image(remaining.pop())
    for question, answer in turns:
        _add_question(builder, question, remaining, encoder.plain, one_image=len(images) == 1)
        builder.add([layout.sep_id])
        if answer is not None:
            builder.add([*encoder.plain(answer.strip()), layout.eos_id], is_target=True)
    if remaining:
        raise InputError(
            f"{len(images)} images were given for {len(images) - len(remaining)} "
            f"{IMAGE_PLACEHOLDER} placeholders"
        )
    return builder.finish()


def _add_question(
    builder: _SequenceBuilder,
    question: str,
    images: list[np.ndarray],
    encode: Callable[[str], list[int]],
    one_image: bool,
) -> None:
    pieces = question.split(IMAGE_PLACEHOLDER)
    if one_image:  # it stands first already
        builder.add(encode(" ".join(piece.strip() for piece in pieces if piece.strip())))
        return
    for number, piece in enumerate(pieces):
        if number:
            if not images:
                raise InputError(f"there are more {IMAGE_PLACEHOLDER} placeholders than images")
            builder.add_image(images.pop(0))
        if piece.strip():
            builder.add(encode(piece.strip()))


class _SequenceBuilder:
    """Collects ids, remembers where the first image lies and which spans are targets."""

    def __init__(self, layout: VocabLayout) -> None:
        self._layout = layout
        self._ids: list[int] = [layout.bos_id]
        self._first_image: tuple[int, int] | None = None
        self._spans: list[tuple[int, int]] = []

    def add(self, ids: Sequence[int], is_target: bool = False) -> None:
        if is_target:
            self._spans.append((len(self._ids), len(self._ids) + len(ids)))
        self._ids.extend(ids)

    def add_image(self, token_ids: np.ndarray) -> None:
        self.add([self._layout.boi_id])
        if self._first_image is None:
            self._first_image = (len(self._ids), len(self._ids) + len(token_ids))
        self.add([int(token) for token in token_ids])
        self.add([self._layout.eoi_id])

    def finish(self) -> TokenizedSample:
        start, end = self._first_image or (1, 1)
        return TokenizedSample(
            self._ids[:start], self._ids[start:end], self._ids[end:], self._spans
        )


def _build_published(
    turns: Sequence[Turn], images: Sequence[np.ndarray], encoder: TextEncoder, layout: VocabLayout
) -> TokenizedSample:
    """`bos boi IMAGE` + tokenizer(`<eoss>` question ` ` answer `</s>` …); `</s>` is plain text,
    all of token_1 is target.
    """
    if len(images) > 1:
        raise InputError(f"template being-vl-0.5 takes at most one image, found {len(images)}")
    text = ""
    for number, (question, answer) in enumerate(turns):
        prefix = "<reserved08706>" if number else "<eoss>" if images else ""
        text += prefix + question.replace(IMAGE_PLACEHOLDER, "").strip() + " "
        text += f"{answer}</s>" if answer is not None else ""
    token_0 = [layout.bos_id, layout.boi_id] if images else [layout.bos_id]
    image = [int(token) for token in images[0]] if images else []
    token_1 = encoder.with_specials(text)
    start = len(token_0) + len(image)
    return TokenizedSample(token_0, image, token_1, [(start, start + len(token_1))])
