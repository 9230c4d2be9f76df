"""`--template base`: prompts in the base model's own chat format.

An instruct base knows its own format, and stage 1 does not change its text weights. In our format,
which stage 2 teaches, it does not know where to stop and repeats itself up to the limit.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from transformers import AutoTokenizer

from beingvl.data.chat_template import BASE_TEMPLATE
from beingvl.data.conversation import IMAGE_PLACEHOLDER, TextEncoder, Turn, lay_out
from beingvl.errors import InputError
from beingvl.json_file import read_object
from beingvl.vocab import VocabLayout


class BasePrompts:
    """Prompts in the base model's format, with images between begin-of-image and end-of-image."""

    def __init__(self, folder: Path, layout: VocabLayout, encoder: TextEncoder) -> None:
        """Raises InputError if the base model had no chat template."""
        self._folder, self._layout, self._encoder = folder, layout, encoder
        self._tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        known = self._tokenizer.chat_template
        if not isinstance(known, dict) or BASE_TEMPLATE not in known:
            raise InputError(f"{folder}: its base model had no chat template; leave --template out")

    @property
    def stop_ids(self) -> list[int]:
        """The stop tokens in the base model's generation_config.json."""
        path = self._folder / "generation_config.json"
        known = read_object(path, "copy the model folder again") if path.is_file() else {}
        stops = known.get("eos_token_id")
        return [stop for stop in (stops if isinstance(stops, list) else [stops]) if stop]

    def ids(self, turns: Sequence[Turn], images: Sequence[np.ndarray]) -> list[int]:
        """The prompt's ids. Raises InputError for placeholders without images, and for texts that
        spell a special token.
        """
        lay_out(turns, len(images), self._encoder, self._layout)  # only for its checks
        special = self._encoder.special_text
        place = "".join(
            special(token)
            for token in (
                self._layout.boi_id,
                self._layout.image_placeholder_id,
                self._layout.eoi_id,
            )
        )
        messages = []
        for number, (question, answer) in enumerate(turns):
            if len(images) == 1:  # a single image comes first, as in training
                question = question.replace(IMAGE_PLACEHOLDER, "").strip()
                question = question if number else f"{IMAGE_PLACEHOLDER}{question}"
            texts = question.split(IMAGE_PLACEHOLDER)
            for text in filter(None, (*texts, answer)):
                if self._encoder.with_specials(text) != self._encoder.plain(text):
                    raise InputError(f"the text {text[:60]!r} spells a special token")
            messages.append({"role": "user", "content": place.join(texts)})
            if answer is not None:
                messages.append({"role": "assistant", "content": answer})
        try:
            ids = self._tokenizer.apply_chat_template(
                messages,
                chat_template=BASE_TEMPLATE,
                add_generation_prompt=True,
                return_dict=False,
            )
        except Exception as error:  # the base's template may raise anything
            raise InputError(f"{self._folder}: the base's chat template fails ({error})") from error
        return with_images(ids, images, self._layout)


def with_images(
    token_ids: Sequence[int], images: Sequence[np.ndarray], layout: VocabLayout
) -> list[int]:
    """The ids, with each `<image>` replaced by an image's tokens. Raises InputError if the numbers
    of images and placeholders differ.
    """
    num_places = list(token_ids).count(layout.image_placeholder_id)
    if num_places != len(images):
        raise InputError(f"{len(images)} images were given for {num_places} places in the prompt")
    remaining = iter(images)
    laid: list[int] = []
    for token in token_ids:
        laid += next(remaining).tolist() if token == layout.image_placeholder_id else [token]
    return laid
