"""Split rows: input embedding and output head are each two parameters, text rows and visual rows.

    token id        0 … num_text-1 | num_text … size-1
    parameter          text_rows   |   visual_rows          (specials, VQ codes, vBPE ids)

So a stage always freezes whole parameters: no gradient, no optimizer state, no weight decay, and
bit-identical afterwards. On disk each pair is one matrix again.

The head computes the loss itself, over target positions only, in chunks that the backward pass
recomputes. Logits of the whole vocabulary never exist for more than one chunk, and the two weights
are never concatenated. The backward pass is written by hand (`ChunkedCrossEntropy`): autograd would
make a gradient of the whole head for each chunk and add them up.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers.initialization import no_init_weights

from beingvl.model import packed_attention
from beingvl.model.adapters import attach_adapters
from beingvl.model.param_groups import A, B, is_adapter
from beingvl.stage.stage_config import Rule

ROW_ALIGNMENT = 64  # elements
TEXT_ROWS = "text_rows"
VISUAL_ROWS = "visual_rows"


class ExtendedEmbedding(nn.Module):
    """Looks ids up in two row blocks. `forward`: `[...]` ids -> `[..., hidden_size]`."""

    def __init__(self, num_text: int, num_visual: int, hidden_size: int) -> None:
        super().__init__()
        self.num_text = num_text  # stored, because a parameter partitioned by ZeRO-3 has length 0
        self.text_rows = nn.Parameter(torch.empty(num_text, hidden_size))
        self.visual_rows = nn.Parameter(torch.empty(num_visual, hidden_size))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        is_visual = (ids >= self.num_text).unsqueeze(-1)
        text = F.embedding(ids.clamp(max=self.num_text - 1), self.text_rows)
        visual = F.embedding((ids - self.num_text).clamp(min=0), self.visual_rows)
        return torch.where(is_visual, visual, text)


class ExtendedHead(nn.Module):
    """The output head over two row blocks. `forward` gives losses or, without targets, logits."""

    def __init__(
        self, num_text: int, num_visual: int, hidden_size: int, loss_chunk_tokens: int
    ) -> None:
        super().__init__()
        self.loss_chunk_tokens = loss_chunk_tokens
        self.text_rows = nn.Parameter(torch.empty(num_text, hidden_size))
        self.visual_rows = nn.Parameter(torch.empty(num_visual, hidden_size))

    def forward(self, hidden: torch.Tensor, target_ids: torch.Tensor | None = None) -> torch.Tensor:
        """`hidden` `[n, hidden_size]`, `target_ids` `[n]` -> `[n]` float32 losses (nats), or
        logits `[n, vocabulary]`.
        """
        if target_ids is None:
            blocks = (self.text_rows, self.visual_rows)
            return torch.cat([F.linear(hidden, rows) for rows in blocks], dim=-1)
        return ChunkedCrossEntropy.apply(
            hidden, target_ids, self.text_rows, self.visual_rows, self.loss_chunk_tokens
        )


class ChunkedCrossEntropy(torch.autograd.Function):
    """Cross entropy of linear logits over two row blocks, `chunk` positions at a time, in float32.

    The forward pass keeps only log(sum(exp(logits))), one number per position. The backward pass
    recomputes each chunk's logits and accumulates into the gradients in place. Logits are computed
    in the model's dtype and then cast to float32, as without chunks.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        target_ids: torch.Tensor,
        text_rows: torch.Tensor,
        visual_rows: torch.Tensor,
        chunk: int,
    ) -> torch.Tensor:
        """`hidden` `[n, hidden_size]`, `target_ids` `[n]` -> `[n]` float32 losses (nats)."""
        normalizers = hidden.new_empty(len(hidden), dtype=torch.float32)
        target_logits = torch.empty_like(normalizers)
        for rows in _chunks(len(hidden), chunk):
            logits = _chunk_logits(hidden[rows], text_rows, visual_rows)
            target_logits[rows] = logits.gather(1, target_ids[rows, None]).squeeze(1)
            largest = logits.amax(1)
            normalizers[rows] = logits.sub_(largest[:, None]).exp_().sum(1).log_().add_(largest)
            del logits  # before the next chunk's are made
        ctx.save_for_backward(hidden, target_ids, text_rows, visual_rows, normalizers)
        ctx.chunk = chunk
        return normalizers - target_logits

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """d loss / d logits = softmax - one-hot of the target; frozen rows get no gradient."""
        (of_losses,) = gradients
        hidden, target_ids, text_rows, visual_rows, normalizers = ctx.saved_tensors
        of_hidden = torch.zeros_like(hidden)
        of_text = torch.zeros_like(text_rows) if ctx.needs_input_grad[2] else None
        of_visual = torch.zeros_like(visual_rows) if ctx.needs_input_grad[3] else None
        for rows in _chunks(len(hidden), ctx.chunk):
            of_logits = _chunk_logits(hidden[rows], text_rows, visual_rows)
            of_logits.sub_(normalizers[rows, None]).exp_()
            of_logits[torch.arange(len(of_logits), device=hidden.device), target_ids[rows]] -= 1
            low = _logits_buffer(hidden[rows], of_logits.shape[1])
            low.copy_(of_logits.mul_(of_losses[rows, None]))
            text, visual = low.split([len(text_rows), len(visual_rows)], dim=1)
            of_hidden[rows] = (text @ text_rows).addmm_(visual, visual_rows)
            for of_rows, part in ((of_text, text), (of_visual, visual)):
                if of_rows is not None:
                    of_rows.addmm_(part.T, hidden[rows])
            del of_logits, low, text, visual, part
        return of_hidden, None, of_text, of_visual, None


def _chunks(length: int, chunk: int) -> list[slice]:
    return [slice(start, start + chunk) for start in range(0, length, chunk)]


def _chunk_logits(
    hidden: torch.Tensor, text_rows: torch.Tensor, visual_rows: torch.Tensor
) -> torch.Tensor:
    """Float32 logits `[n, vocabulary]`, both products in one buffer; without gradients."""
    logits = _logits_buffer(hidden, len(text_rows) + len(visual_rows))
    text, visual = logits.split([len(text_rows), len(visual_rows)], dim=1)
    torch.mm(hidden, text_rows.T, out=text)
    torch.mm(hidden, visual_rows.T, out=visual)
    return logits.float()


def _logits_buffer(hidden: torch.Tensor, width: int) -> torch.Tensor:
    """Uninitialised `[n, width]` in the dtype of `hidden`, with rows that start at multiples of 128
    bytes.

    GPU matrix kernels access rows 16 bytes at a time if they are aligned; rows of 144,645 columns
    of 2 bytes are not.
    """
    return hidden.new_empty(len(hidden), -(-width // ROW_ALIGNMENT) * ROW_ALIGNMENT)[:, :width]


class PackedCausalLM(nn.Module):
    """A stock transformers causal LM with split rows and packed attention.

    Parameter names are those of the stock model, with `.text_rows` and `.visual_rows` in place of
    `.weight` on the embedding and the head.
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
        longest: int | None = None,
    ) -> torch.Tensor:
        """Losses `[num_targets]` float32 of one packed row, or, without `target_ids`, logits
        `[num_targets, vocabulary]`.

        Args:
            input_ids, position_ids: `[1, num_tokens]`.
            cu_seqlens: `[num_documents + 1]` int32.
            target_positions, target_ids: `[num_targets]`; each position predicts its target id.
            longest: tokens of the longest document; without it, every layer waits for the GPU.
        """
        hidden = self.causal_lm.base_model(
            input_ids=input_ids,
            position_ids=position_ids,
            attention_mask=None,
            use_cache=False,  # with a cache, transformers attends across samples
            cu_seq_lens_q=cu_seqlens,
            max_length_q=longest,
        ).last_hidden_state
        return self.causal_lm.get_output_embeddings()(hidden[0, target_positions], target_ids)


def build_packed_model(
    model_class: Any,
    config: Any,
    num_text: int,
    num_visual: int,
    loss_chunk_tokens: int,
    activation_checkpointing: bool,
    rules: Sequence[Rule] = (),
) -> PackedCausalLM:
    """Construct `model_class` (a causal LM of transformers) with split rows and the adapters of the
    freezer's `rules`, without weights.

    Works inside `deepspeed.zero.Init`, which patches torch's constructors: import the class before.
    """
    small = copy.deepcopy(config)
    # The stock embedding is replaced below, so it needs only one row.
    small.vocab_size, small.pad_token_id, small.tie_word_embeddings = 1, None, False
    # No checkpoint holds dropout's random numbers, so a resumed run would differ.
    for name in [name for name in small.to_dict() if name.endswith(("dropout", "_pdrop"))]:
        setattr(small, name, 0.0)
    with no_init_weights():
        causal_lm = model_class._from_config(small, attn_implementation=packed_attention.register())
    causal_lm.set_input_embeddings(ExtendedEmbedding(num_text, num_visual, config.hidden_size))
    causal_lm.set_output_embeddings(
        ExtendedHead(num_text, num_visual, config.hidden_size, loss_chunk_tokens)
    )
    attach_adapters(causal_lm, rules)
    if activation_checkpointing:
        # transformers renamed it in 2026; version 6 drops the old name.
        enable = getattr(causal_lm, "activation_checkpointing_enable", None)
        enable = enable or causal_lm.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    return PackedCausalLM(causal_lm)


def pack_stock_model(causal_lm: Any, num_text: int, loss_chunk_tokens: int) -> PackedCausalLM:
    """Wrap a stock causal LM with the attention `beingvl_packed`, without copying its weights."""
    weight = causal_lm.get_output_embeddings().weight
    head = ExtendedHead(0, 0, weight.shape[1], loss_chunk_tokens)
    head.text_rows = nn.Parameter(weight[:num_text], requires_grad=False)
    head.visual_rows = nn.Parameter(weight[num_text:], requires_grad=False)
    causal_lm.set_output_embeddings(head)
    return PackedCausalLM(causal_lm)


def stored_slice(name: str, num_text: int) -> tuple[str, slice]:
    """Where a parameter is stored on disk, as (tensor name, rows).

    `model.embed_tokens.visual_rows` -> `model.embed_tokens.weight`, rows num_text … Adapters are
    merged into the weight beside them; other parameters have the same name and all rows.
    """
    if is_adapter(name):
        return f"{name.removesuffix(A).removesuffix(B)}.weight", slice(None)
    stem, _, last = name.rpartition(".")
    if last == TEXT_ROWS:
        return f"{stem}.weight", slice(0, num_text)
    if last == VISUAL_ROWS:
        return f"{stem}.weight", slice(num_text, None)
    return name, slice(None)
