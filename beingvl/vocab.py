"""The vocabulary layout: the only owner of id ranges.

    [ text 0 … num_text-1 | 5 specials | num_vq VQ codes | num_merges vBPE ids ]
      base model's own      \\________ the new "visual" rows ________________/

For Llama-3.1 (128,256 text ids), 8192 codes and 8192 merges, that is 144,645 ids, 16,389 of them
new. A model folder has its layout in `vocab_layout.json`; all sizes in the program come from there.

There are two id spaces. vBPE uses *image ids*: 0 … num_vq-1 are codes, num_vq + r is the merge of
rank r. The language model uses *token ids*: image id i is token id `first_image_id + i`, because
codes and merges are adjacent. Only this file converts between the two.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from beingvl.errors import InputError
from beingvl.json_file import read_json
from beingvl.published_form import LAYOUT_FILE, refuse_published

SPECIAL_TOKENS = ("<pad>", "<reserved08706>", "<eoss>", "<image>", "<racm3:break>")
TOKEN_KINDS = ("text", "special", "vq", "vbpe")


@dataclass(frozen=True)
class VocabLayout:
    """Sizes and the text's bos and eos ids; everything else follows from them.

    Llama-3.1: `VocabLayout(num_text=128256, num_vq=8192, num_merges=8192, bos_id=128000,
    eos_id=128001)`.
    """

    num_text: int
    num_vq: int
    num_merges: int
    bos_id: int
    eos_id: int

    def __post_init__(self) -> None:
        for name in ("num_text", "num_vq"):
            if getattr(self, name) < 1:
                found = f"{name} is {getattr(self, name)}"
                raise InputError(f"vocabulary layout: {found}, expected at least 1")
        if self.num_merges < 0:
            raise InputError(
                f"vocabulary layout: num_merges is {self.num_merges}, expected 0 or more"
            )
        for name in ("bos_id", "eos_id"):
            if not 0 <= getattr(self, name) < self.num_text:
                found, last = f"{name} {getattr(self, name)}", self.num_text - 1
                raise InputError(f"vocabulary layout: {found} is not a text id (0 … {last})")

    @classmethod
    def around_codes(cls, codes: range, num_tokens: int, bos_id: int, eos_id: int) -> VocabLayout:
        """The layout of `num_tokens` tokens, given the token ids of the VQ codes.

        Raises InputError if these leave no room for text and specials before them.
        """
        num_text, num_merges = codes.start - len(SPECIAL_TOKENS), num_tokens - codes.stop
        return cls(num_text, len(codes), num_merges, bos_id, eos_id)

    # ---- the five specials, in their fixed order ----
    @property
    def pad_id(self) -> int:
        return self.num_text

    @property
    def sep_id(self) -> int:
        return self.num_text + 1

    @property
    def eoi_id(self) -> int:
        """End of image, `<eoss>`."""
        return self.num_text + 2

    @property
    def image_placeholder_id(self) -> int:
        return self.num_text + 3

    @property
    def boi_id(self) -> int:
        """Begin of image, `<racm3:break>`."""
        return self.num_text + 4

    # ---- ranges ----
    @property
    def first_image_id(self) -> int:
        """Token id of VQ code 0."""
        return self.num_text + len(SPECIAL_TOKENS)

    @property
    def first_vbpe_id(self) -> int:
        """Token id of the vBPE merge of rank 0."""
        return self.first_image_id + self.num_vq

    @property
    def size(self) -> int:
        """Number of token ids, i.e. rows of the embedding matrix."""
        return self.first_vbpe_id + self.num_merges

    @property
    def num_visual(self) -> int:
        """Number of new vocabulary rows: specials, codes and merges."""
        return self.size - self.num_text

    # ---- conversions ----
    def image_to_token_ids(self, image_ids: np.ndarray) -> np.ndarray:
        """Image ids `[n]` to token ids `[n]` int32. Raises InputError for ids out of range."""
        image_ids = np.asarray(image_ids)
        end = self.num_vq + self.num_merges
        if image_ids.size and not 0 <= image_ids.min() <= image_ids.max() < end:
            raise InputError(
                f"image ids {image_ids.min()} … {image_ids.max()} do not fit a vocabulary of "
                f"{self.num_vq} codes and {self.num_merges} merges: the vBPE or VQ-GAN is not the "
                "one this vocabulary was made for"
            )
        # Codes are uint16, which is too small for LLaMA-3's token ids.
        return image_ids.astype(np.int32) + self.first_image_id

    def token_to_image_ids(self, token_ids: np.ndarray) -> np.ndarray:
        """The inverse of `image_to_token_ids`. Raises InputError for other tokens."""
        token_ids = np.asarray(token_ids)
        first, end = self.first_image_id, self.size
        if token_ids.size and not first <= token_ids.min() <= token_ids.max() < end:
            found = f"token ids {token_ids.min()} … {token_ids.max()}"
            raise InputError(f"{found} are not all image tokens ({first} … {end - 1})")
        return (token_ids - first).astype(np.int32)

    def image_ids_in_row(self, token_ids: np.ndarray) -> np.ndarray:
        """Image ids `[n]` int32 of a token row; -1 for tokens that are not image tokens."""
        return np.maximum(token_ids - self.first_image_id, -1).astype(np.int32)

    def is_image_token(self, token_ids: np.ndarray) -> np.ndarray:
        """Boolean mask of the VQ and vBPE tokens."""
        return (token_ids >= self.first_image_id) & (token_ids < self.size)

    def token_kinds(self, token_ids: np.ndarray) -> np.ndarray:
        """Each token id's index into TOKEN_KINDS, uint8 of the same shape."""
        borders = [self.num_text, self.first_image_id, self.first_vbpe_id]
        return np.searchsorted(borders, token_ids, side="right").astype(np.uint8)

    def new_tokens(self) -> list[str]:
        """Texts of the `num_visual` new tokens in id order, for the base model's tokenizer."""
        codes = [image_token_text(code) for code in range(self.num_vq)]
        merges = [f"<vbpe{rank:05d}>" for rank in range(self.num_merges)]
        return [*SPECIAL_TOKENS, *codes, *merges]

    def published_name(self, token_id: int) -> str | None:
        """Published name of a merge's token, IMGIMGBDGEFDZ for 136453; None for other tokens."""
        return image_token_text(token_id) if token_id >= self.first_vbpe_id else None

    # ---- on disk ----
    def fingerprint(self) -> str:
        """Hash that artefacts must share to be used together."""
        text = json.dumps(asdict(self), sort_keys=True)
        return "sha256:" + hashlib.sha256(text.encode()).hexdigest()

    def to_dict(self) -> dict[str, int]:
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: Any, source: str = "vocabulary layout") -> VocabLayout:
        expected = set(cls.__dataclass_fields__)
        if not isinstance(fields, dict) or set(fields) != expected:
            found = sorted(fields) if isinstance(fields, dict) else type(fields).__name__
            keys = f"exactly the keys {sorted(expected)}"
            raise InputError(f"{source}: found {found}, expected {keys}")
        for name, value in fields.items():
            if type(value) is not int:
                raise InputError(
                    f"{source}: {name} is {str(value)[:60]!r}, expected a whole number"
                )
        return cls(**fields)

    @classmethod
    def load(cls, model_folder: Path | str) -> VocabLayout:
        """Read the `vocab_layout.json` of a Being-VL model folder."""
        path = Path(model_folder) / LAYOUT_FILE
        if not Path(model_folder).exists():
            expected = "expected a Being-VL model folder, or that of a finished stage"
            raise InputError(f"{model_folder} does not exist; {expected}")
        refuse_published(model_folder)
        if not path.is_file():
            final = Path(model_folder) / "final"
            is_stage = (final / LAYOUT_FILE).is_file()
            hint = f"give {final}" if is_stage else "make one with `beingvl convert`"
            if not is_stage and (Path(model_folder) / "checkpoints").is_dir():
                raise InputError(
                    f"{model_folder} is a stage that is not finished; start it again, or export a "
                    "checkpoint of it"
                )
            raise InputError(
                f"{model_folder} has no {LAYOUT_FILE}: it is not a Being-VL model folder; {hint}"
            )
        return cls.read(path)

    @classmethod
    def read(cls, path: Path) -> VocabLayout:
        """Read the layout from a file that exists."""
        return cls.from_dict(read_json(path, "make the model folder again"), str(path))


def image_token_text(number: int) -> str:
    """Published name of an image token: six digits written A–J, e.g. 10 -> IMGIMGAAAABAZ.

    `number` is a VQ token's code, or a merge's token id.
    """
    digits = "".join(chr(ord("A") + int(digit)) for digit in f"{number:06d}")
    return f"IMGIMG{digits}Z"


def name_beside(token: str) -> str:
    """Name of a new token if the base model already has a token of its usual name."""
    return f"<|being_{token.strip('<>')}|>"
