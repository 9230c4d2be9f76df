"""Tokenizers of model folders: load the base model's, add the visual tokens, check the ids.

A base model has tokenizer.json, a sentencepiece `tokenizer.model` (Llama-2) or a tiktoken
`tokenizer.model` (Llama-3 as first published). The result is always one tokenizer.json that stock
transformers loads. The new tokens are *added* tokens: in the main vocabulary they would shift all
special ids, and one `add_tokens` call costs little at loading (docs/dev/benchmarks.md).
"""

from __future__ import annotations

import base64
import binascii
import errno
import json
import os
from collections.abc import Mapping
from pathlib import Path

from tokenizers import AddedToken, processors
from transformers import AutoTokenizer, LlamaTokenizer, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter

from beingvl.artefact.files import path_inside, to_json, write_atomically
from beingvl.data.chat_template import BASE_TEMPLATE
from beingvl.errors import InputError
from beingvl.json_file import read_object
from beingvl.model.base_model import BaseModel, read_json
from beingvl.vocab import SPECIAL_TOKENS, VocabLayout, name_beside

# Llama 3.1's names for the 256 ids after the byte-pair ranks; most are
# <|reserved_special_token_N|>.
LLAMA3_SPECIALS = (
    *("<|begin_of_text|>", "<|end_of_text|>"),
    *("<|reserved_special_token_0|>", "<|reserved_special_token_1|>"),
    *("<|finetune_right_pad_id|>", "<|reserved_special_token_2|>"),
    *("<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>", "<|python_tag|>"),
    *(f"<|reserved_special_token_{number}|>" for number in range(3, 248)),
)
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| "
    r"?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Share of rows without a token; models that pad their rows (Qwen2, Phi, DeepSeek) have up to 0.03.
_LARGEST_GAP = 0.1
# What transformers keeps of a tokenizer.json's truncation and padding.
_BATCH_SETTINGS = (
    *("max_length", "stride", "truncation_side", "truncation_strategy"),
    *("pad_to_multiple_of", "pad_token_type_id", "padding_side"),
)
CONFIG_FILE = "tokenizer_config.json"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "original/tokenizer.model")


def find_tokenizer_file(folder: Path) -> Path | None:
    return next((folder / name for name in TOKENIZER_FILES if (folder / name).is_file()), None)


def load_tokenizer(folder: Path | str, num_text: int | None = None) -> PreTrainedTokenizerFast:
    """A model folder's tokenizer; `num_text` is its embedding's number of rows."""
    folder = Path(folder)
    path = find_tokenizer_file(folder)
    if path is None:
        raise InputError(f"{folder} has no tokenizer: expected one of {', '.join(TOKENIZER_FILES)}")
    if path.name == "tokenizer.model" and (ranks := read_tiktoken_ranks(path)):
        num_tokens = len(ranks) + len(LLAMA3_SPECIALS)
        if num_text not in (None, num_tokens):
            raise InputError(
                f"{path} has {len(ranks)} byte-pair ranks, which make {num_tokens} tokens with "
                f"Llama-3's specials, but the embedding has {num_text} rows; download it again"
            )
        return _from_tiktoken(ranks)
    is_alone = path.name == "tokenizer.model"
    is_alone = is_alone and not (path.parent / CONFIG_FILE).is_file()
    _refuse_files_outside(path.parent)
    try:
        if is_alone:
            # The file does not say how to prepare text, and AutoTokenizer would guess wrong.
            tokenizer = LlamaTokenizer.from_pretrained(path.parent, add_bos_token=True)
        else:
            tokenizer = AutoTokenizer.from_pretrained(path.parent, trust_remote_code=False)
    except Exception as error:  # damaged files raise plain Exception
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise InputError(
            f"{path} cannot be read as a tokenizer ({reason}); download it "
            "again (a sentencepiece file needs `pip install sentencepiece protobuf`)"
        ) from error
    if not tokenizer.is_fast:
        name = type(tokenizer).__name__
        raise InputError(f"{path} gives a slow tokenizer ({name}), expected a tokenizer.json")
    return tokenizer


def _refuse_files_outside(folder: Path) -> None:
    """Raises InputError if tokenizer_config.json names existing files outside the folder, which
    transformers would read. Paths that do not exist are common: they are from another machine.
    """
    path = folder / CONFIG_FILE
    config = read_object(path, "download it again") if path.is_file() else {}
    for key, value in config.items():
        for name in value if isinstance(value, list) else [value]:
            if key.endswith(("_file", "_files")) and os.path.isfile(folder / str(name)):
                path_inside(folder, str(name))


def read_tiktoken_ranks(path: Path) -> dict[bytes, int]:
    """Ranks in a tiktoken file (lines `base64 rank`); empty for other formats."""
    ranks = {}
    try:
        for line in path.read_bytes().splitlines():
            text, rank = line.split()
            ranks[base64.b64decode(text, validate=True)] = int(rank)
    except (ValueError, binascii.Error):
        return {}
    return ranks


def _from_tiktoken(ranks: dict[bytes, int]) -> PreTrainedTokenizerFast:
    """Llama-3's fast tokenizer: the ranks, its split pattern, its specials, bos before the text."""

    class Converter(TikTokenConverter):
        @staticmethod
        def load_tiktoken_bpe(_: str) -> dict[bytes, int]:
            return ranks

    bos, eos = LLAMA3_SPECIALS[:2]
    converter = Converter("", pattern=LLAMA3_PATTERN, extra_special_tokens=LLAMA3_SPECIALS)
    tokenizer = converter.converted()
    specials = [(bos, tokenizer.token_to_id(bos))]
    template = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=specials
    )
    byte_level = processors.ByteLevel(trim_offsets=False)
    tokenizer.post_processor = processors.Sequence([byte_level, template])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=bos,
        eos_token=eos,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )


def check_belongs_to(tokenizer: PreTrainedTokenizerFast, base: BaseModel) -> None:
    """Raises InputError unless bos and eos match the base model's configs and nearly all rows have
    a token; else the file was truncated, or is a different model's.
    """
    for name in ("bos_token_id", "eos_token_id"):
        found, expected = getattr(tokenizer, name), base.special_ids(name)
        if found is not None and expected and found not in expected:
            said = " or ".join(map(str, sorted(expected)))
            raise InputError(
                f"{base.folder}: the tokenizer's {name} is {found}, config.json and "
                f"generation_config.json say {said}; make them agree"
            )
    gap = base.num_text - len(tokenizer)
    if gap > base.num_text * _LARGEST_GAP:
        raise InputError(
            f"{base.folder}: the tokenizer has {len(tokenizer)} tokens, the embedding "
            f"{base.num_text} rows; it was truncated or is another model's: download it again"
        )


def save_tokenizer(
    tokenizer: PreTrainedTokenizerFast, folder: Path, base_template: str | None = None
) -> None:
    """Write tokenizer.json and its configs, also for transformers 4.

    The only chat template written is the base model's, and not as the default, because the model is
    trained on different prompts.
    """
    tokenizer.chat_template = {BASE_TEMPLATE: base_template} if base_template else None
    try:
        tokenizer.save_pretrained(folder)
    except Exception as error:  # tokenizers raises a plain Exception
        if "os error 28" in str(error) or "No space left" in str(error):
            full = errno.ENOSPC
            raise OSError(full, os.strerror(full), str(folder / "tokenizer.json")) from error
        raise
    path = folder / CONFIG_FILE
    config = json.loads(path.read_text(encoding="utf-8"))
    # tokenizer.json alone determines the tokenizer, in every version.
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    config.pop("chat_template", None)
    if isinstance(config.get("extra_special_tokens"), list):  # version 4 expects a mapping
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    write_atomically(path, to_json(config))


def extend_tokenizer(tokenizer: PreTrainedTokenizerFast, layout: VocabLayout, source: str) -> None:
    """Add the layout's tokens, in place, after the text ids.

    If the embedding has more rows than the tokenizer has tokens (Qwen2), named fillers fill the
    gap.
    """
    gap = range(len(tokenizer), layout.num_text)
    new_tokens = _free_names(layout.new_tokens(), tokenizer.get_vocab(), source)
    if len(tokenizer) > layout.num_text:
        raise InputError(
            f"{source} has {len(tokenizer)} tokens, but the embedding has {layout.num_text} rows; "
            "give the tokenizer that belongs to the weights"
        )
    specials = new_tokens[: len(SPECIAL_TOKENS)]
    image_tokens = new_tokens[len(SPECIAL_TOKENS) :]
    fillers = [f"<|unused_{token_id}|>" for token_id in gap]
    tokenizer.add_tokens(
        [AddedToken(token, special=True, normalized=False) for token in fillers + specials]
        + [AddedToken(token, normalized=False) for token in image_tokens]
    )
    tokenizer.pad_token = specials[0]


def _free_names(tokens: list[str], known: Mapping[str, int], source: str) -> list[str]:
    """`tokens`, renamed if the base model already has a token of that name; prints the renames."""
    taken = {token: name_beside(token) for token in tokens if token in known}
    if taken:
        shown = ", ".join(f"{token} is now {name}" for token, name in list(taken.items())[:5])
        print(f"{source} has {len(taken)} of the new tokens' names already: {shown}")
    for token, name in taken.items():
        if name in known:
            raise InputError(
                f"{source}: {token!r} and {name!r} are tokens of the base model already; "
                "use a different base model"
            )
    return [taken.get(token, token) for token in tokens]


def clear_limits(tokenizer: PreTrainedTokenizerFast, source: str) -> None:
    """Clear tokenizer.json's truncation and padding, and print it.

    Such leftovers from encoding a batch would truncate or pad every text of the data.
    """
    backend = tokenizer.backend_tokenizer
    settings = {"truncation": backend.truncation, "padding": backend.padding}
    if found := [name for name, value in settings.items() if value]:
        backend.no_truncation()
        backend.no_padding()
        for field in _BATCH_SETTINGS:
            tokenizer.init_kwargs.pop(field, None)
        print(f"{source}: {' and '.join(found)} in tokenizer.json would change texts: left out")


def add_missing_merges(tokenizer: PreTrainedTokenizerFast, layout: VocabLayout) -> None:
    """Add the merges' tokens to a tokenizer that was made before the vBPE."""
    if len(tokenizer) == layout.first_vbpe_id:
        merges = layout.new_tokens()[layout.first_vbpe_id - layout.num_text :]
        tokenizer.add_tokens([AddedToken(token, normalized=False) for token in merges])


def check_token_ids(tokenizer: PreTrainedTokenizerFast, layout: VocabLayout, source: str) -> None:
    """Raises InputError showing the first new token whose id is not what the layout says."""
    num_tokens = len(tokenizer)  # each call counts again
    for token_id, token in enumerate(layout.new_tokens(), start=layout.num_text):
        found = tokenizer.convert_ids_to_tokens(token_id) if token_id < num_tokens else None
        if found not in (token, layout.published_name(token_id), name_beside(token)):
            raise InputError(
                f"{source}: token id {token_id} is {found!r}, the layout ({layout.num_text} text "
                f"ids, {layout.num_vq} codes, {layout.num_merges} merges) expects {token!r}; give "
                "the tokenizer made for this vocabulary, or none"
            )


def check_vocabulary_map(tokenizer: PreTrainedTokenizerFast, config_file: Path) -> None:
    """Raises InputError showing the first token whose id in a published config.json's
    `vocabulary_map` differs from the tokenizer's.
    """
    config = read_json(config_file, "a model folder") if config_file.is_file() else {}
    vocabulary, listed = tokenizer.get_vocab(), config.get("vocabulary_map") or {}
    if not isinstance(listed, dict):
        raise InputError(f"{config_file}: vocabulary_map is not an object of token -> id")
    for token, token_id in listed.items():
        if vocabulary.get(token) != token_id:
            raise InputError(
                f"{config_file}: vocabulary_map gives {token!r} id {token_id}, the tokenizer "
                f"beside it {vocabulary.get(token)}; take both from one folder"
            )


def check_same_text_tokens(
    tokenizer: PreTrainedTokenizerFast, base: PreTrainedTokenizerFast, source: str
) -> None:
    """Raises InputError showing the first id of `base` at which the two differ."""
    for token_id in range(len(base)):
        found = tokenizer.convert_ids_to_tokens(token_id)
        expected = base.convert_ids_to_tokens(token_id)
        if found != expected:
            raise InputError(
                f"{source}: token id {token_id} is {found!r}, the base model's tokenizer says "
                f"{expected!r}; give the tokenizer made for this base model, or none"
            )
