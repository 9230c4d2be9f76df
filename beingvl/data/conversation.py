"""The chat template: the one place that turns a conversation and its images into token ids.

Training, generation and evaluation all call `build_sequence` or its two halves: `lay_out` encodes
the text and leaves gaps, `fill` puts the images into them. The default template is

    bos boi IMAGE eoi question sep answer eos  question sep answer eos  …

A single image comes first, wherever its `<image>` placeholder is; several images stay where their
placeholders are. A text-only sample has no image part. Targets are the answers with their eos. A
prompt for generation is the same sequence without the last answer: it ends after `sep`. An answer
ends at eos or at its template's stop text.

Worked example (text ids 0 … 9, bos 0, eos 1, sep 11, eoi 12, boi 14, image tokens 15 …; "hi" = 5,
"yes" = 7):

    turns = [("<image>hi", "yes")], images = [[15, 16]]
    input_ids = 0 14 15 16 12  5  11  7 1       target_spans = [(7, 9)]
                bos boi IMAGE eoi hi sep yes eos

The template `being-vl-0.5` reproduces the published pipeline, for files made with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer

from beingvl.artefact.files import printable
from beingvl.artefact.manifest import verify_small_files
from beingvl.data.made_with import DEFAULT, PUBLISHED, TEMPLATE
from beingvl.errors import InputError
from beingvl.vocab import VocabLayout

IMAGE_PLACEHOLDER = "<image>"
CUT_CHARACTER = (
    "contains an invalid character: bytes that are not UTF-8, or half of a surrogate pair, as in a "
    "truncated emoji"
)
STOP_TEXTS = {DEFAULT: "", PUBLISHED: "</s>"}
HUMAN_NAMES = ("human", "user")
ASSISTANT_NAMES = ("gpt", "assistant")

Turn = tuple[str, "str | None"]
"""(question, answer); the last answer is None in a prompt for generation."""


class TokenizedSample(NamedTuple):
    """Token ids `[n]` int32 in three parts, as in the JSONL format: before the first image, the
    first image, after it.

    `target_spans` are (start, end) pairs, end exclusive, in `token_0 + image + token_1`.
    """

    token_0: np.ndarray
    image: np.ndarray
    token_1: np.ndarray
    target_spans: list[tuple[int, int]]

    @property
    def input_ids(self) -> list[int]:
        return np.concatenate(self[:3]).tolist()

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self[:3]))


def open_tokenizer(model_folder: Path | str) -> Tokenizer:
    """A model folder's tokenizer.json. Raises InputError when it is missing, or when one of the
    folder's small files is damaged.
    """
    path = Path(model_folder) / "tokenizer.json"
    if not path.is_file():
        raise InputError(
            f"{model_folder} has no tokenizer.json; make the model folder with `beingvl convert`"
        )
    verify_small_files(model_folder)
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises nothing more specific
        raise InputError(
            f"{path} is damaged ({error}); copy or make the model folder again"
        ) from error
    # A base model's batch settings would truncate or pad every text.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


class TextEncoder:
    """Text to token ids with a model folder's tokenizer.json; `plain` gives no special tokens."""

    def __init__(self, model_folder: Path | str, layout: VocabLayout) -> None:
        self._tokenizer = open_tokenizer(model_folder)
        self._layout = layout

    @cached_property
    def longest_token(self) -> int:
        """No token stands for more characters of text."""
        return max(map(len, self._tokenizer.get_vocab()))

    def plain(self, text: str) -> list[int]:
        """Ids of plain text. Raises InputError if it spells a token such as `IMGIMGAAAAAAZ`."""
        ids = self._encode(text, with_specials=False)
        reserved = [token for token in ids if token >= self._layout.num_text]
        if reserved:
            raise InputError(
                f"the text {text[:60]!r} spells the reserved token "
                f"{self._tokenizer.id_to_token(reserved[0])!r}"
            )
        return ids

    def with_specials(self, text: str) -> list[int]:
        """Ids of `text`, which may spell special tokens (template `being-vl-0.5` only)."""
        return self._encode(text, with_specials=True)

    def special_text(self, token_id: int) -> str:
        """A special token's text, such as `<eoss>` unless the base model already has that name."""
        text = self._tokenizer.id_to_token(token_id)
        assert text is not None, f"the tokenizer has no token {token_id}"
        return text

    def _encode(self, text: str, with_specials: bool) -> list[int]:
        if printable(text) != text:
            raise InputError(f"the text {printable(text[:60])!r} {CUT_CHARACTER}")
        self._tokenizer.encode_special_tokens = not with_specials
        # The variant that keeps no offsets is a fifth faster.
        return self._tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids


def parse_conversation(conversations: Any) -> list[Turn]:
    """LLaVA `conversations` to turns. Raises InputError saying what is malformed.

    A system turn may come first. It becomes the beginning of the first question: context, never a
    target.
    """
    if not isinstance(conversations, list) or not conversations:
        raise InputError(
            "conversations is empty or not a list, expected alternating human and gpt turns"
        )
    first = conversations[0]
    if isinstance(first, dict) and first.get("from") == "system" and len(conversations) > 1:
        system = _value_of(first, ("system",), 0)
        question = _value_of(conversations[1], HUMAN_NAMES, 1)
        first = {"from": HUMAN_NAMES[0], "value": f"{system}\n\n{question}"}
        conversations = [first, *conversations[2:]]
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
            f"conversations[{position}] is from {str(entry.get('from'))[:60]!r}, expected "
            f"{' or '.join(map(repr, names))}"
        )
    return entry["value"]


def build_sequence(
    turns: Sequence[Turn],
    images: Sequence[np.ndarray],
    encoder: TextEncoder,
    layout: VocabLayout,
    template: str = DEFAULT,
) -> TokenizedSample:
    """Turns and images (each a 1-D array of image *token* ids) to one sequence.

    Raises InputError when placeholders and images do not match.
    """
    return fill(lay_out(turns, len(images), encoder, layout, template), images)


class Piece(NamedTuple):
    """Ids of a piece of text, or None in place of an image."""

    ids: list[int] | None
    is_target: bool = False


IMAGE = Piece(None)


def lay_out(
    turns: Sequence[Turn],
    num_images: int,
    encoder: TextEncoder,
    layout: VocabLayout,
    template: str = DEFAULT,
) -> list[Piece]:
    """The sequence with all text encoded and `num_images` gaps for images."""
    if TEMPLATE.check(template) == PUBLISHED:
        return _lay_out_published(turns, num_images, encoder, layout)
    image = [Piece([layout.boi_id]), IMAGE, Piece([layout.eoi_id])]
    num_placeholders = sum(question.count(IMAGE_PLACEHOLDER) for question, _ in turns)
    if num_placeholders > num_images:
        raise InputError(f"there are more {IMAGE_PLACEHOLDER} placeholders than images")
    if num_images > 1 and num_placeholders < num_images:
        raise InputError(
            f"{num_images} images were given for {num_placeholders} {IMAGE_PLACEHOLDER} "
            "placeholders"
        )
    pieces = [Piece([layout.bos_id])]
    if num_images == 1:  # it comes first, wherever its placeholder is
        pieces += image
    for question, answer in turns:
        texts = [text.strip() for text in question.split(IMAGE_PLACEHOLDER)]
        if num_images == 1:
            texts = [" ".join(text for text in texts if text)]
        for number, text in enumerate(texts):
            pieces += image if number else []
            if text:
                pieces.append(Piece(encoder.plain(text)))
        pieces.append(Piece([layout.sep_id]))
        if answer is not None:
            pieces.append(Piece([*encoder.plain(answer.strip()), layout.eos_id], is_target=True))
    return pieces


def _lay_out_published(
    turns: Sequence[Turn], num_images: int, encoder: TextEncoder, layout: VocabLayout
) -> list[Piece]:
    """`bos boi IMAGE` + tokenizer(`<eoss>` question ` ` answer `</s>` …). `</s>` is plain text;
    all of token_1 is a target. Only the first question is stripped and loses its `<image>`.
    """
    if num_images > 1:
        raise InputError(f"template being-vl-0.5 takes at most one image, found {num_images}")
    text = ""
    eoi, sep = encoder.special_text(layout.eoi_id), encoder.special_text(layout.sep_id)
    for number, (question, answer) in enumerate(turns):
        if number:
            text += f"{sep}{question} "
        else:
            first = question.replace(IMAGE_PLACEHOLDER, "").strip()
            text += f"{eoi if num_images else ''}{first} "
        text += f"{answer}{STOP_TEXTS[PUBLISHED]}" if answer is not None else ""
    start = (
        [Piece([layout.bos_id, layout.boi_id]), IMAGE] if num_images else [Piece([layout.bos_id])]
    )
    ids = encoder.with_specials(text)
    if turns[-1][1] is None:
        # The prompt keeps only tokens that are the same whatever follows: a word after the space
        # takes the space into its first token.
        pairs = zip(ids, encoder.with_specials(f"{text}a"), strict=False)
        ids = [token for token, _ in takewhile(lambda pair: pair[0] == pair[1], pairs)]
    return [*start, Piece(ids, is_target=True)]


def fill(pieces: Sequence[Piece], images: Sequence[np.ndarray]) -> TokenizedSample:
    """Put images (token ids) into their gaps."""
    remaining = iter(images)
    arrays: list[np.ndarray] = []
    first_image: tuple[int, int] | None = None
    spans = []
    start = 0
    for ids, is_target in pieces:
        arrays.append(np.array(next(remaining) if ids is None else ids, np.int32))
        end = start + len(arrays[-1])
        if is_target:
            spans.append((start, end))
        if ids is None and first_image is None:
            first_image = start, end
        start = end
    laid = np.concatenate(arrays)
    start, end = first_image or (1, 1)
    return TokenizedSample(laid[:start], laid[start:end], laid[end:], spans)
