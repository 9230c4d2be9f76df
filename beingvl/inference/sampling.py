"""The options of transformers' `generate` that a caller may set."""

from typing import Any

GREEDY_BELOW = 1e-5  # logits divided by a smaller temperature may overflow
SAMPLING = (
    *("top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff"),
    *("repetition_penalty", "no_repeat_ngram_size", "min_new_tokens", "bad_words_ids"),
    *("num_beams", "length_penalty", "early_stopping", "renormalize_logits"),
)


def sampling_options(temperature: float, **more: Any) -> dict[str, Any]:
    """Arguments for `generate`: sampling with this temperature and `more`, or greedy."""
    if temperature < GREEDY_BELOW:
        return {"do_sample": False}
    return {"do_sample": True, "temperature": float(temperature), "top_k": 0, **more}
