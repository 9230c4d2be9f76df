"""Block-diagonal causal attention over samples laid end to end, registered with transformers as
`beingvl_packed`.

Attention never crosses samples. Their borders come as `cu_seq_lens_q`, an int32 tensor of document
starts followed by the total, passed through the model's forward as a keyword argument. transformers
builds no mask for an attention that it does not know, so nothing can leak between samples.

    CPU  per-document scaled_dot_product_attention (flex_attention has no CPU backward)
    GPU  torch.nn.attention.varlen.varlen_attn (bf16/fp16; torch 2.11 and later), else the CPU path

`max_length_q` is the longest document as an integer; without it every layer would wait for the GPU
to compute it.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch.nn import functional as F
from transformers import AttentionInterface

ATTENTION_NAME = "beingvl_packed"


def register() -> str:
    """Make `attn_implementation="beingvl_packed"` known to transformers; returns the name."""
    AttentionInterface.register(ATTENTION_NAME, packed_attention)
    return ATTENTION_NAME


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention over one packed row.

    Args:
        query: `[1, num_heads, num_tokens, head_dim]`.
        key, value: `[1, num_kv_heads, num_tokens, head_dim]`.
        attention_mask: must be None.
        cu_seq_lens_q: `[num_documents + 1]` int32, the documents' borders.

    Returns:
        `[1, num_tokens, num_heads, head_dim]` and None for the attention weights.
    """
    assert cu_seq_lens_q is not None and attention_mask is None, "document borders and no mask"
    assert query.shape[0] == 1, "packed samples lie end to end in one row"
    is_half = query.dtype in (torch.bfloat16, torch.float16)
    if query.is_cuda and is_half and (varlen := varlen_kernel()):
        longest = int(cu_seq_lens_q.diff().max()) if max_length_q is None else max_length_q
        lengths = (cu_seq_lens_q, cu_seq_lens_q, longest, longest)
        # [num_tokens, heads, head_dim]
        rows = [tensor[0].transpose(0, 1) for tensor in (query, key, value)]
        return varlen(*rows, *lengths, scale=scaling).unsqueeze(0), None
    borders = cu_seq_lens_q.tolist()
    documents = [
        F.scaled_dot_product_attention(
            query[:, :, start:end],
            key[:, :, start:end],
            value[:, :, start:end],
            dropout_p=dropout,
            is_causal=True,
            scale=scaling,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        for start, end in itertools.pairwise(borders)
    ]
    return torch.cat(documents, dim=2).transpose(1, 2), None


@cache
def varlen_kernel() -> Callable[..., torch.Tensor] | None:
    """torch's causal attention over documents laid end to end, `(query, key, value, starts, starts,
    longest, longest, scale=…)`; None if this torch has none, which is why it is imported here.
    """
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    known = inspect.signature(varlen_attn).parameters
    if "window_size" not in known:  # torch 2.10 has no window, and not always a scale
        return None

    def causal(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *lengths: Any,
        scale: float | None,
    ) -> torch.Tensor:
        if "enable_gqa" in known:
            grouped = query.shape[1] != key.shape[1]
            return varlen_attn(
                query, key, value, *lengths, scale=scale, window_size=(-1, 0), enable_gqa=grouped
            )
        repeats = query.shape[1] // key.shape[1]  # torch 2.11 needs equal numbers of heads
        key, value = (tensor.repeat_interleave(repeats, dim=1) for tensor in (key, value))
        return varlen_attn(query, key, value, *lengths, scale=scale, window_size=(-1, 0))

    return causal
