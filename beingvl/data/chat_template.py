"""The chat template in transformers' form (Jinja), for programs that know nothing about beingvl:

    tokenizer.apply_chat_template([{"role": "user", "content": "<image>Which digit is this?"}])

gives the same ids as `build_sequence`, with one `<image>` token in place of an image's tokens.
Every model folder contains it. The two would differ for a text that spells a special token, because
rendering happens before tokenizing; the template raises an error for such a text.
"""

from __future__ import annotations

import json
import re
from importlib.resources import files
from pathlib import Path

from tokenizers import Tokenizer

from beingvl.data.conversation import TextEncoder, open_tokenizer
from beingvl.data.made_with import TEMPLATE
from beingvl.vocab import VocabLayout

CHAT_TEMPLATE_FILE = "chat_template.jinja"
BASE_TEMPLATE = "base"
"""transformers' name for the template that came with the base model, if any."""
BASE_TEMPLATES = "additional_chat_templates"  # transformers' folder for it
_NAMES = {name: name for name in ("bos", "eos", "sep", "boi", "eoi")}
_NAMES |= {"image": "image_placeholder"}
_PROBES = "a", "Hello there", "42", "é"


def chat_template(model_folder: Path, layout: VocabLayout, template: str) -> str | None:
    """The Jinja of `template` for a model folder's tokenizer. None if the folder has no tokenizer
    with all special tokens, or if its tokenizer encodes text differently after a special token than
    on its own: then no text gives the training ids.
    """
    if not (model_folder / "tokenizer.json").is_file():
        return None
    tokenizer = open_tokenizer(model_folder)
    ids = {name: getattr(layout, f"{id_}_id") for name, id_ in _NAMES.items()}
    if any(tokenizer.id_to_token(id_) is None for id_ in ids.values()):
        return None
    text_of = TextEncoder(model_folder, layout).special_text
    names = {name: text_of(id_) for name, id_ in ids.items()}
    leads = [lead for lead in ("", " ") if _is_alike(tokenizer, names["eos"], lead)]
    if not leads:
        return None
    # Whether a space stays a token of its own when a word follows.
    blank, word = (tokenizer.encode(f"x {end}", add_special_tokens=False).ids for end in ("", "a"))
    values = {
        **names,
        "lead": leads[0],
        "blank": " " if word[: len(blank)] == blank else "",
        "reserved": _reserved(tokenizer, names["image"], layout),
    }
    lines = [
        f"{{%- set {name} = {json.dumps(value, ensure_ascii=False)} -%}}"
        for name, value in values.items()
    ]
    folder = files("beingvl.data") / "chat_templates"
    parts = ["messages", TEMPLATE.check(template)]
    lines += [(folder / f"{part}.jinja").read_text(encoding="utf-8") for part in parts]
    return "\n".join(lines)


def _is_alike(tokenizer: Tokenizer, special: str, lead: str) -> bool:
    """Whether text after a special token and `lead` gets the same ids as on its own."""

    def ids(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False).ids

    return all(ids(f"{special}{lead}{probe}")[1:] == ids(probe) for probe in _PROBES)


def _reserved(tokenizer: Tokenizer, image: str, layout: VocabLayout) -> list[str]:
    """What a text must not spell: special tokens and image tokens; of numbered tokens, only the
    common beginning.
    """
    found = {
        token.content
        for token_id, token in tokenizer.get_added_tokens_decoder().items()
        if token.special or token_id >= layout.num_text
    }
    begins = {re.sub(r"(?<=.{6})\d+\W*$", "", name) for name in found - {image}}
    codes = {name for name in begins if name.startswith("IMGIMG")}
    return sorted(begins - codes | ({"IMGIMG"} if codes else set()))
