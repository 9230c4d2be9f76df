"""The options of transformers' `generate` that a caller may set."""

SAMPLING = (
    *("top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff"),
    *("repetition_penalty", "no_repeat_ngram_size", "min_new_tokens", "bad_words_ids"),
    *("num_beams", "length_penalty", "early_stopping", "renormalize_logits"),
)
