"""One LLaVA row to token ids: the conversation, its images' codes and their merged ids, as one
sequence per variant. Its text is encoded once.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from beingvl.data.conversation import (
    TextEncoder,
    TokenizedSample,
    fill,
    lay_out,
    parse_conversation,
)
from beingvl.data.llava_json import image_keys
from beingvl.errors import InputError
from beingvl.images.vq_codes import CodeFolder
from beingvl.vbpe.visual_bpe import AnyVBPE
from beingvl.vocab import VocabLayout


class TokenizedRow(NamedTuple):
    """`head`: the fields that stay as they came. `codes`: the first image's code tokens.
    `variants`: `base` with VQ codes and, with a vBPE, `vbpe` with merged ids.
    """

    head: dict[str, Any]
    codes: np.ndarray
    variants: dict[str, TokenizedSample]

    @property
    def num_tokens(self) -> int:
        """Of the longest variant."""
        return max(sample.num_tokens for sample in self.variants.values())


class RowTokenizer:
    """What it takes to tokenize rows."""

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
        self._codes = codes
        self._vbpe = vbpe
        self._template = template
        self._default_category = default_category

    def __call__(self, row: dict) -> TokenizedRow:
        """Raises InputError that says what is malformed."""
        if not isinstance(row.get("category"), str | None):
            raise InputError(f"category is {row['category']!r}, expected a text")
        if type(row.get("id")) not in (str, int):  # True is an int
            raise InputError(f"id is {row['id']!r}, expected a text or a whole number")
        turns = parse_conversation(row.get("conversations"))
        keys = image_keys(row) if self._codes else []
        grids = [self._codes.codes[self._codes.row(key)] for key in keys] if self._codes else []
        pieces = lay_out(turns, len(grids), self._encoder, self._layout, self._template)
        images = [self._layout.image_to_token_ids(grid.ravel()) for grid in grids]
        base = fill(pieces, images)
        variants = {"base": base}
        if self._vbpe:
            ids = [self._vbpe.encode(grid) for grid in grids]
            merged = [self._layout.image_to_token_ids(stream) for stream in ids]
            variants["vbpe"] = fill(pieces, merged)
        head = {
            "id": str(row["id"]),
            "image": row.get("image"),
            "category": row.get("category") or self._default_category,
            "conversations": row["conversations"],
        }
        return TokenizedRow(head, base.image, variants)


def fit(row: TokenizedRow, max_length: int | None, too_long: str) -> tuple[TokenizedRow, bool]:
    """The row with its variants cut to `max_length` tokens when `too_long` is `truncate`, and
    whether one was cut.

    Raises InputError when a row is too long and may not be cut, or when no target would be left.
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
                f"the sample has {longest} tokens, and of its first {max_length} "
                "(--max_length) none is an answer"
            )
        cut[variant] = sample._replace(token_1=sample.token_1[:kept], target_spans=spans)
    return row._replace(variants=cut), True
