"""Tokenizers of model folders: load whatever a base model has, add the visual tokens, check the
ids.

A base model brings tokenizer.json, a sentencepiece `tokenizer.model` (Llama-2) or a tiktoken
`tokenizer.model` (Llama-3 as first published). The result is always one tokenizer.json that stock
transformers loads. The new tokens are *added* tokens: written into the vocabulary proper they would
shift every special id, and one `add_tokens` call costs little at loading (docs/benchmarks.md).
"""

from __future__ import annotations

import base64
import binascii
import errno
import importlib.util
import json
import os
from pathlib import Path

from tokenizers import AddedToken, processors
from transformers import AutoTokenizer, LlamaTokenizer, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter

from beingvl.artefact.files import to_json, write_atomically
from beingvl.errors import InputError
from beingvl.model.base_model import BaseModel
from beingvl.vocab import SPECIAL_TOKENS, VocabLayout

# Llama 3.1's names for the 256 ids behind the byte-pair ranks; further ones are
# <|reserved_special_token_N|>.
LLAMA3_SPECIALS = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|reserved_special_token_0|>",
    "<|reserved_special_token_1|>",
    "<|finetune_right_pad_id|>",
    "<|reserved_special_token_2|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
    "<|python_tag|>",
    *(f"<|reserved_special_token_{number}|>" for number in range(3, 248)),
)
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| "
    r"?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# share of rows without a token; models that round their rows up (Qwen2, Phi, DeepSeek) have up to
# 0.03
_LARGEST_GAP = 0.1
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "original/tokenizer.model")


def find_tokenizer_file(folder: Path) -> Path | None:
    return next((folder / name for name in TOKENIZER_FILES if (folder / name).is_file()), None)


def load_tokenizer(folder: Path | str, num_text: int | None = None) -> PreTrainedTokenizerFast:
    """The tokenizer of a model folder; `num_text` is its embedding's number of rows, where known.

    Raises InputError when there is none or it cannot be read, or was cut off.
    """
    folder = Path(folder)
    path = find_tokenizer_file(folder)
    if path is None:
        raise InputError(f"{folder} has no tokenizer: expected one of {', '.join(TOKENIZER_FILES)}")
    if path.name == "tokenizer.model":
        ranks = read_tiktoken_ranks(path)
        if ranks and num_text not in (None, len(ranks) + len(LLAMA3_SPECIALS)):
            raise InputError(
                f"{path} has {len(ranks)} byte-pair ranks, which make "
                f"{len(ranks) + len(LLAMA3_SPECIALS)} tokens with Llama-3's "
                f"specials, but the embedding has {num_text} rows: it was cut off or is "
                "another model's; download it again"
            )
        if ranks:
            return _from_tiktoken(ranks)
        missing = [
            name for name in ("sentencepiece", "google.protobuf") if not _is_importable(name)
        ]
        if missing:
            raise InputError(
                f"{path} needs {' and '.join(missing)} to be read: `pip install sentencepiece "
                "protobuf`"
            )
    try:
        if path.name == "tokenizer.model" and not (path.parent / "tokenizer_config.json").is_file():
            # Alone, the file does not say how text is prepared; without its config AutoTokenizer
            # would guess another way.
            tokenizer = LlamaTokenizer.from_pretrained(path.parent, add_bos_token=True)
        else:
            tokenizer = AutoTokenizer.from_pretrained(path.parent, trust_remote_code=False)
    except (
        Exception
    ) as error:  # transformers and tokenizers raise bare exceptions for damaged files
        raise InputError(
            f"{path} cannot be read as a tokenizer ({type(error).__name__}: {error}); it "
            "may be cut off: download it again"
        ) from error
    if not tokenizer.is_fast:
        raise InputError(
            f"{path} gives a slow tokenizer ({type(tokenizer).__name__}), expected one "
            "with a tokenizer.json"
        )
    return tokenizer


def _is_importable(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # the parent of a dotted name
        return False


def read_tiktoken_ranks(path: Path) -> dict[bytes, int]:
    """Ranks of a tiktoken file (lines `base64 rank`); empty when it is another format, such as
    sentencepiece.
    """
    ranks = {}
    try:
        for line in path.read_bytes().splitlines():
            text, rank = line.split()
            ranks[base64.b64decode(text, validate=True)] = int(rank)
    except (ValueError, binascii.Error):
        return {}
    return ranks


def _from_tiktoken(ranks: dict[bytes, int]) -> PreTrainedTokenizerFast:
    """Llama-3's fast tokenizer: byte-pair ranks, its split pattern, its specials, the begin
    token in front.
    """

    class Converter(TikTokenConverter):
        @staticmethod
        def load_tiktoken_bpe(_: str) -> dict[bytes, int]:
            return ranks

    bos, eos = LLAMA3_SPECIALS[:2]
    tokenizer = Converter(
        "", pattern=LLAMA3_PATTERN, extra_special_tokens=LLAMA3_SPECIALS
    ).converted()
    template = processors.TemplateProcessing(
        single=f"{bos} $A",
        pair=f"{bos} $A {bos}:1 $B:1",
        special_tokens=[(bos, tokenizer.token_to_id(bos))],
    )
    tokenizer.post_processor = processors.Sequence(
        [processors.ByteLevel(trim_offsets=False), template]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=bos,
        eos_token=eos,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )


def check_belongs_to(tokenizer: PreTrainedTokenizerFast, base: BaseModel) -> None:
    """A tokenizer's begin and end token are those of the base model's configs, and nearly every
    row has a token.

    Raises InputError otherwise: a tokenizer file that was cut off, or another model's.
    """
    for name in ("bos_token_id", "eos_token_id"):
        found, expected = getattr(tokenizer, name), base.special_ids(name)
        if found is not None and expected and found not in expected:
            raise InputError(
                f"{base.folder}: the tokenizer's {name} is {found}, config.json and "
                "generation_config.json say "
                f"{' or '.join(map(str, sorted(expected)))}; the tokenizer was cut off or is "
                "another model's: make them agree"
            )
    gap = base.num_text - len(tokenizer)
    if gap > base.num_text * _LARGEST_GAP:
        raise InputError(
            f"{base.folder}: the tokenizer has {len(tokenizer)} tokens, the embedding "
            f"{base.num_text} rows; the tokenizer was "
            f"cut off or is another model's: download it again"
        )


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write tokenizer.json and its configs, for transformers 4 too. A full disk is an OSError,
    as everywhere else.
    """
    try:
        tokenizer.save_pretrained(folder)
    except Exception as error:  # tokenizers raises a bare one
        if any(text in str(error) for text in ("os error 28", "No space left")):
            raise OSError(
                errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder / "tokenizer.json")
            ) from error
        raise
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["tokenizer_class"] = (
        "PreTrainedTokenizerFast"  # tokenizer.json alone decides, in every version
    )
    if isinstance(
        config.get("extra_special_tokens"), list
    ):  # version 4 wants a mapping under this name
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    write_atomically(path, to_json(config))


def extend_tokenizer(tokenizer: PreTrainedTokenizerFast, layout: VocabLayout, source: str) -> None:
    """Add the layout's tokens, in place, behind the text ids.

    An embedding with more rows than the tokenizer has tokens (Qwen2) gets named fillers for the
    gap. Raises InputError when the tokenizer already has one of the new tokens or more tokens than
    the embedding has rows.
    """
    gap = range(len(tokenizer), layout.num_text)
    new_tokens = layout.new_tokens()
    known = tokenizer.get_vocab()
    for token_id, token in enumerate(new_tokens, start=layout.num_text):
        if token in known:
            raise InputError(
                f"{source}: {token!r} is already token {known[token]} of the base model, "
                f"expected it to become {token_id}; "
                f"this base model's vocabulary cannot be extended with Being-VL's names"
            )
    if len(tokenizer) > layout.num_text:
        raise InputError(
            f"{source} has {len(tokenizer)} tokens, but the embedding has {layout.num_text} rows; "
            f"give the tokenizer that belongs to the weights"
        )
    fillers = [
        AddedToken(f"<|unused_{token_id}|>", special=True, normalized=False) for token_id in gap
    ]
    num_specials = len(SPECIAL_TOKENS)
    specials = [
        AddedToken(token, special=True, normalized=False) for token in new_tokens[:num_specials]
    ]
    tokenizer.add_tokens(
        [
            *fillers,
            *specials,
            *(AddedToken(token, normalized=False) for token in new_tokens[num_specials:]),
        ]
    )
    tokenizer.pad_token = SPECIAL_TOKENS[0]


def add_missing_merges(tokenizer: PreTrainedTokenizerFast, layout: VocabLayout) -> None:
    """A tokenizer that ends with the last VQ code, made before there was a vBPE, gets the
    merges' tokens.
    """
    if len(tokenizer) == layout.first_vbpe_id:
        merges = layout.new_tokens()[layout.first_vbpe_id - layout.num_text :]
        tokenizer.add_tokens([AddedToken(token, normalized=False) for token in merges])


def check_token_ids(tokenizer: PreTrainedTokenizerFast, layout: VocabLayout, source: str) -> None:
    """Every new token has the id that the layout says. Raises InputError that shows the first
    that has not.
    """
    num_tokens = len(tokenizer)  # counted anew at every call
    for token_id, token in enumerate(layout.new_tokens(), start=layout.num_text):
        found = tokenizer.convert_ids_to_tokens(token_id) if token_id < num_tokens else None
        if found != token:
            raise InputError(
                f"{source}: token id {token_id} is {found!r}, the layout ({layout.num_text} "
                f"text ids, {layout.num_vq} codes, "
                f"{layout.num_merges} merges) expects {token!r}; give the tokenizer made for "
                "this vocabulary, or none"
            )


def check_same_text_tokens(
    tokenizer: PreTrainedTokenizerFast, base: PreTrainedTokenizerFast, source: str
) -> None:
    """Both tokenizers agree on every id of `base`. Raises InputError that shows the first that
    differs.
    """
    for token_id in range(len(base)):
        found, expected = (
            tokenizer.convert_ids_to_tokens(token_id),
            base.convert_ids_to_tokens(token_id),
        )
        if found != expected:
            raise InputError(
                f"{source}: token id {token_id} is {found!r}, the base model's tokenizer says "
                f"{expected!r}; "
                f"give the tokenizer made for this base model, or none"
            )
