"""One LLaVA row to token ids: one sequence per variant, with the conversation and its images as VQ
codes or merged ids. The text is encoded only once.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np

from beingvl.data.conversation import (
    TextEncoder,
    TokenizedSample,
    fill,
    lay_out,
    parse_conversation,
)
from beingvl.data.dialects.turns import refuse_bad_answers
from beingvl.data.llava_json import Row, image_keys
from beingvl.errors import InputError
from beingvl.images.vq_codes import CodeFolder
from beingvl.vbpe.visual_bpe import AnyVBPE
from beingvl.vocab import VocabLayout


class Image(NamedTuple):
    """An image's tokens `[n]` int32: codes, and merged ids (without a vBPE, the codes)."""

    codes: np.ndarray
    merged: np.ndarray


class TokenizedRow(NamedTuple):
    """`head`: the fields that are not tokens. `codes`: the first image's code tokens. `variants`:
    `base` with VQ codes and, with a vBPE, `vbpe` with merged ids.
    """

    head: dict[str, Any]
    codes: np.ndarray
    variants: dict[str, TokenizedSample]

    @property
    def num_tokens(self) -> int:
        """Length of the longest variant."""
        return max(sample.num_tokens for sample in self.variants.values())


class RowTokenizer:
    """Tokenizes LLaVA rows, one per call."""

    def __init__(
        self,
        encoder: TextEncoder,
        layout: VocabLayout,
        codes: CodeFolder | None,
        vbpe: AnyVBPE | None,
        template: str,
        default_category: str,
    ) -> None:
        self._encoder = encoder
        self._layout = layout
        self._codes: Any = codes  # None if no row may have images
        self._vbpe = vbpe
        self._template = template
        self._default_category = default_category
        self._ahead: dict[str, Image] = {}

    def encode_images(self, rows: Sequence[Row]) -> None:
        """Encode the images of these rows in one go, before the rows are tokenized: encoding text
        in between would push the vocabulary's tables out of the processor's cache.

        Images that cannot be encoded are left to the calls, which raise the error.
        """
        self._ahead = {}
        places: dict[str, int] = {}
        for row in rows if self._codes else ():
            with suppress(InputError):
                keys = image_keys(row) if isinstance(row, dict) else []
                places |= {key: self._codes.row(key) for key in keys}
        if places:
            grids = self._codes.grids(places)
            with suppress(InputError):
                self._ahead = self._encoded(places, grids)

    def _encoded(self, keys: Iterable[str], grids: np.ndarray) -> dict[str, Image]:
        codes = merged = list(self._layout.image_to_token_ids(grids.reshape(len(grids), -1)))
        if self._vbpe:
            ids, ends = self._vbpe.encode_batch(grids)
            merged = np.split(self._layout.image_to_token_ids(ids), ends[1:-1])
        return dict(zip(keys, map(Image, codes, merged), strict=True))

    def _image(self, key: str) -> Image:
        if key not in self._ahead:
            self._ahead |= self._encoded([key], self._codes.grids({key: self._codes.row(key)}))
        return self._ahead[key]

    def __call__(self, row: dict) -> TokenizedRow:
        """Raises InputError saying what is malformed."""
        if not isinstance(row.get("category"), str | None):
            raise InputError(f"category is {row['category']!r}, expected a text")
        if type(row.get("id")) not in (str, int):  # True is an int
            raise InputError(f"id is {row['id']!r}, expected text or a whole number")
        refuse_bad_answers(row)
        turns = parse_conversation(row.get("conversations"))
        images = [self._image(key) for key in image_keys(row)]
        pieces = lay_out(turns, len(images), self._encoder, self._layout, self._template)
        base = fill(pieces, [image.codes for image in images])
        variants = {"base": base}
        if self._vbpe:
            variants["vbpe"] = fill(pieces, [image.merged for image in images])
        head = {
            "id": str(row["id"]),
            "image": row.get("image"),
            "category": row.get("category") or self._default_category,
            "conversations": row["conversations"],
        }
        return TokenizedRow(head, base.image, variants)


def fit(row: TokenizedRow, max_length: int | None, too_long: str) -> tuple[TokenizedRow, bool]:
    """The row, its variants truncated to `max_length` tokens if `too_long` is `truncate`, and
    whether any was truncated.

    Raises InputError if the row is too long and must not be truncated, or if no target would be
    left.
    """
    longest = row.num_tokens
    if max_length is None or longest <= max_length:
        return row, False
    if too_long == "reject":
        raise InputError(f"the sample has {longest} tokens, --max_length is {max_length}")
    cut = {}
    for variant, sample in row.variants.items():
        kept = max_length - len(sample.token_0) - len(sample.image)
        spans = [
            (start, min(end, max_length))
            for start, end in sample.target_spans
            if start < max_length
        ]
        if kept < 1 or not spans:
            raise InputError(
                f"the sample has {longest} tokens, and its first {max_length} "
                "(--max_length) contain no answer"
            )
        cut[variant] = sample._replace(token_1=sample.token_1[:kept], target_spans=spans)
    return row._replace(variants=cut), True
