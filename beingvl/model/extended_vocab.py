"""Split rows: input embedding and output head are each two parameters, text rows and visual rows.

    token id        0 … num_text-1 | num_text … size-1
    parameter          text_rows   |   visual_rows          (specials, VQ codes, vBPE ids)

What a stage freezes is then a whole parameter: no gradient, no optimizer state, no weight decay, the same bytes afterwards. On
disk (HF folders) each pair is one matrix again; only this file joins and splits.

The head computes the loss itself, over target positions only, in chunks of rows that are recomputed in the backward pass, so
that logits of the whole vocabulary never exist for more than one chunk and the two weights are never concatenated.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

TEXT_ROWS = "text_rows"
VISUAL_ROWS = "visual_rows"


class ExtendedEmbedding(nn.Module):
    """Looks ids up in two row blocks. `forward`: `[...]` ids -> `[..., hidden_size]`."""

    def __init__(self, num_text: int, num_visual: int, hidden_size: int) -> None:
        super().__init__()
        self.num_text = num_text  # an integer, because a ZeRO-3 partitioned parameter has length 0
        self.text_rows = nn.Parameter(torch.empty(num_text, hidden_size))
        self.visual_rows = nn.Parameter(torch.empty(num_visual, hidden_size))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        is_visual = (ids >= self.num_text).unsqueeze(-1)
        text = F.embedding(ids.clamp(max=self.num_text - 1), self.text_rows)
        visual = F.embedding((ids - self.num_text).clamp(min=0), self.visual_rows)
        return torch.where(is_visual, visual, text)


class ExtendedHead(nn.Module):
    """The output head over two row blocks. `forward` returns the loss of every target token, or logits where none is given."""

    def __init__(self, num_text: int, num_visual: int, hidden_size: int, loss_chunk_tokens: int) -> None:
        super().__init__()
        self.loss_chunk_tokens = loss_chunk_tokens
        self.text_rows = nn.Parameter(torch.empty(num_text, hidden_size))
        self.visual_rows = nn.Parameter(torch.empty(num_visual, hidden_size))

    def forward(self, hidden: torch.Tensor, target_ids: torch.Tensor | None = None) -> torch.Tensor:
        """`hidden` `[n, hidden_size]`, `target_ids` `[n]` -> `[n]` float32 losses (nats), or logits `[n, vocabulary]`."""
        if target_ids is None:
            return _logits(hidden, self.text_rows, self.visual_rows)
        chunks = zip(hidden.split(self.loss_chunk_tokens), target_ids.split(self.loss_chunk_tokens), strict=True)
        losses = [
            checkpoint(_token_losses, rows, targets, self.text_rows, self.visual_rows, use_reentrant=False)
            for rows, targets in chunks
        ]
        return torch.cat(losses)


def _token_losses(
    hidden: torch.Tensor, target_ids: torch.Tensor, text_rows: torch.Tensor, visual_rows: torch.Tensor
) -> torch.Tensor:
    return F.cross_entropy(_logits(hidden, text_rows, visual_rows).float(), target_ids, reduction="none")


def _logits(hidden: torch.Tensor, text_rows: torch.Tensor, visual_rows: torch.Tensor) -> torch.Tensor:
    return torch.cat([F.linear(hidden, text_rows), F.linear(hidden, visual_rows)], dim=-1)


class PackedCausalLM(nn.Module):
    """A stock transformers causal LM with split rows and packed attention; `forward` gives the loss of every target token.

    Parameter names are those of the stock model, with `.text_rows` and `.visual_rows` in place of `.weight` on the embedding
    and the head.
    """

    def __init__(self, causal_lm: nn.Module) -> None:
        super().__init__()
        self.causal_lm = causal_lm

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        cu_seqlens: torch.Tensor,
        target_positions: torch.Tensor,
        target_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Losses `[num_targets]` float32 of one packed row; without `target_ids` the logits `[num_targets, vocabulary]`.

        Args:
            input_ids, position_ids: `[1, num_tokens]`.
            cu_seqlens: `[num_documents + 1]` int32.
            target_positions, target_ids: `[num_targets]`; position p predicts its target id.
        """
        hidden = self.causal_lm.base_model(
            input_ids=input_ids,
            position_ids=position_ids,
            attention_mask=None,
            use_cache=False,  # with a cache transformers attends across samples
            cu_seq_lens_q=cu_seqlens,
        ).last_hidden_state
        return self.causal_lm.get_output_embeddings()(hidden[0, target_positions], target_ids)


def build_packed_model(
    model_class: Any, config: Any, num_text: int, num_visual: int, loss_chunk_tokens: int, activation_checkpointing: bool
) -> PackedCausalLM:
    """Construct `model_class` (a causal LM of transformers) with split rows and no weights yet.

    Works inside `deepspeed.zero.Init`, which rewrites torch's constructors: import the class before.
    """
    from transformers.initialization import no_init_weights

    from beingvl.model import packed_attention

    small = copy.deepcopy(config)  # the stock embedding is replaced at once, so it is built with one row
    small.vocab_size, small.pad_token_id, small.tie_word_embeddings = 1, None, False
    with no_init_weights():
        causal_lm = model_class._from_config(small, attn_implementation=packed_attention.register())
    causal_lm.set_input_embeddings(ExtendedEmbedding(num_text, num_visual, config.hidden_size))
    causal_lm.set_output_embeddings(ExtendedHead(num_text, num_visual, config.hidden_size, loss_chunk_tokens))
    if activation_checkpointing:
        causal_lm.activation_checkpointing_enable({"use_reentrant": False})
    return PackedCausalLM(causal_lm)


def pack_stock_model(causal_lm: Any, num_text: int, loss_chunk_tokens: int) -> PackedCausalLM:
    """A stock causal LM, loaded with the attention `beingvl_packed`, as a packed one: its head is split without a copy."""
    weight = causal_lm.get_output_embeddings().weight
    head = ExtendedHead(0, 0, weight.shape[1], loss_chunk_tokens)
    head.text_rows = nn.Parameter(weight[:num_text], requires_grad=False)
    head.visual_rows = nn.Parameter(weight[num_text:], requires_grad=False)
    causal_lm.set_output_embeddings(head)
    return PackedCausalLM(causal_lm)


def stored_slice(name: str, num_text: int) -> tuple[str, slice]:
    """Where a parameter lies on disk, as (tensor name, rows).

    `model.embed_tokens.visual_rows` -> `model.embed_tokens.weight`, rows num_text … ; other names are their own, all rows.
    """
    stem, _, last = name.rpartition(".")
    if last == TEXT_ROWS:
        return f"{stem}.weight", slice(0, num_text)
    if last == VISUAL_ROWS:
        return f"{stem}.weight", slice(num_text, None)
    return name, slice(None)
