"""The options of transformers' `generate` that a caller may set."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from beingvl.errors import InputError

SAMPLING = (
    *("top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff"),
    *("repetition_penalty", "no_repeat_ngram_size", "min_new_tokens", "bad_words_ids"),
    *("num_beams", "length_penalty", "early_stopping", "renormalize_logits"),
)


def check_sampling(options: Mapping[str, Any]) -> None:
    """Raises InputError for any other name."""
    for name in options:
        if name not in SAMPLING:
            near = difflib.get_close_matches(name, SAMPLING, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; expected one of {SAMPLING}"
            raise InputError(f"{name!r} is not an option of generation{hint}")
