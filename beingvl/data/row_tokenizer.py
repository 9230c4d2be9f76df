"""One LLaVA row to token rows: the conversation, its images' codes and their merged ids as one
sequence each.
"""

from __future__ import annotations

from typing import Any

from beingvl.data.conversation import (
    TextEncoder,
    TokenizedSample,
    build_sequence,
    parse_conversation,
)
from beingvl.data.llava_json import image_keys
from beingvl.errors import InputError
from beingvl.images.vq_codes import CodeFolder
from beingvl.vbpe.published import LegacyVisualBPE
from beingvl.vbpe.visual_bpe import VisualBPE
from beingvl.vocab import VocabLayout


class RowTokenizer:
    """One LLaVA row to one JSONL row per variant: `base` with VQ codes, `vbpe` with merged ids."""

    def __init__(
        self,
        encoder: TextEncoder,
        layout: VocabLayout,
        codes: CodeFolder | None,
        vbpe: VisualBPE | LegacyVisualBPE | None,
        template: str,
        default_category: str,
    ) -> None:
        self._encoder = encoder
        self._layout = layout
        self._codes = codes
        self._vbpe = vbpe
        self._template = template
        self._default_category = default_category

    @property
    def variants(self) -> list[str]:
        return ["base", "vbpe"] if self._vbpe else ["base"]

    def __call__(self, row: dict) -> dict[str, dict[str, Any]]:
        """Variant -> JSONL row. Raises InputError that says what is malformed."""
        if not isinstance(row.get("category"), str | None):
            raise InputError(f"category is {row['category']!r}, expected a text")
        if type(row.get("id")) not in (str, int):  # True is an int
            raise InputError(f"id is {row['id']!r}, expected a text or a whole number")
        turns = parse_conversation(row.get("conversations"))
        grids = (
            [self._codes.codes[self._codes.row(key)] for key in image_keys(row)]
            if self._codes
            else []
        )
        raw_images = [self._layout.image_to_token_ids(grid.ravel()) for grid in grids]
        raw = build_sequence(turns, raw_images, self._encoder, self._layout, self._template)
        out = {"base": self._jsonl_row(row, raw, raw.image)}
        if self._vbpe:
            merged_images = [
                self._layout.image_to_token_ids(self._vbpe.encode(grid)) for grid in grids
            ]
            merged = build_sequence(
                turns, merged_images, self._encoder, self._layout, self._template
            )
            out["vbpe"] = self._jsonl_row(row, merged, raw.image, merged.image)
        return out

    def _jsonl_row(
        self,
        row: dict,
        sample: TokenizedSample,
        token_image: list[int],
        token_image_new: list[int] | None = None,
    ) -> dict[str, Any]:
        return {
            "id": str(row["id"]),
            "image": row.get("image"),
            "category": row.get("category") or self._default_category,
            "conversations": row["conversations"],
            "token_0": sample.token_0,
            "token_image": token_image,
            **({} if token_image_new is None else {"token_image_new": token_image_new}),
            "token_1": sample.token_1,
            "target_spans": sample.target_spans,
        }


def fit(
    variants: dict[str, dict], max_length: int | None, too_long: str
) -> tuple[dict[str, dict], bool]:
    """The variants of a row, cut to `max_length` tokens when `too_long` is `truncate`, and
    whether one was cut.

    Raises InputError when a row is too long and may not be cut, or when no target would be left.
    """
    longest = max(map(num_tokens, variants.values()))
    if max_length is None or longest <= max_length:
        return variants, False
    if too_long == "reject":
        raise InputError(f"the sample has {longest} tokens, --max_length is {max_length}")
    cut = {}
    for variant, row in variants.items():
        kept = max_length - (num_tokens(row) - len(row["token_1"]))
        spans = [
            (start, min(end, max_length))
            for start, end in row["target_spans"]
            if start < max_length
        ]
        if kept < 1 or not spans:
            raise InputError(
                f"the sample has {longest} tokens, and of its first {max_length} "
                "(--max_length) none is an answer"
            )
        cut[variant] = {**row, "token_1": row["token_1"][:kept], "target_spans": spans}
    return cut, True


def num_tokens(row: dict) -> int:
    return (
        len(row["token_0"])
        + len(row.get("token_image_new", row["token_image"]))
        + len(row["token_1"])
    )
