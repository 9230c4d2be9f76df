"""Split rows, packed attention and the loss head against the stock transformers model."""

from typing import ClassVar

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM

from beingvl.data.loader import IGNORED, MicroBatch, collate, shifted_targets
from beingvl.data.shard_columns import Sample
from beingvl.model.extended_vocab import (
    ExtendedHead,
    PackedCausalLM,
    _logits_buffer,
    build_packed_model,
    stored_slice,
)
from beingvl.model.packed_attention import varlen_kernel
from beingvl.model.weight_files import WeightFolder
from tests.model.small_models import family_config
from tests.tiny import LAYOUT, random_samples, write_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


def packed_model(
    folder, chunk: int = 1024, activation_checkpointing: bool = False
) -> PackedCausalLM:
    config = AutoConfig.from_pretrained(folder)
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    model = build_packed_model(
        model_class, config, LAYOUT.num_text, LAYOUT.num_visual, chunk, activation_checkpointing
    )
    weights = WeightFolder(folder)
    for name, parameter in model.causal_lm.named_parameters():
        stored, rows = stored_slice(name, LAYOUT.num_text)
        parameter.data = weights[stored][rows].clone()
    return model.train()


def samples() -> list[Sample]:
    return random_samples(LAYOUT, [(length, 1) for length in (9, 1, 30, 17, 2)])


def losses_of(model: PackedCausalLM, batch: MicroBatch) -> torch.Tensor:
    positions = np.flatnonzero(batch.target_ids != IGNORED)
    return model(
        input_ids=torch.from_numpy(batch.input_ids)[None],
        position_ids=torch.from_numpy(batch.position_ids)[None],
        cu_seqlens=torch.from_numpy(batch.cu_seqlens),
        target_positions=torch.from_numpy(positions),
        target_ids=torch.from_numpy(batch.target_ids[positions]),
    )


@pytest.mark.parametrize("chunk", [1, 7, 1024])
@pytest.mark.parametrize("activation_checkpointing", [False, True])
def test_packed_losses_and_gradients_equal_each_sample_alone_in_the_stock_model(
    folder, chunk, activation_checkpointing
) -> None:
    stock = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    model = packed_model(folder, chunk, activation_checkpointing)
    expected = []
    for sample in samples():
        logits = stock(torch.from_numpy(sample.input_ids.astype(np.int64))[None]).logits[0]
        targets = torch.from_numpy(shifted_targets(sample, LAYOUT))
        expected.append(
            torch.nn.functional.cross_entropy(logits, targets, reduction="none")[targets != IGNORED]
        )
    found = losses_of(model, collate(samples(), [0] * 5, LAYOUT))
    torch.testing.assert_close(found, torch.cat(expected), rtol=1e-5, atol=1e-6)

    torch.cat(expected).sum().backward()
    found.sum().backward()
    stock_gradients = {name: parameter.grad for name, parameter in stock.named_parameters()}
    for name, parameter in model.causal_lm.named_parameters():
        stored, rows = stored_slice(name, LAYOUT.num_text)
        torch.testing.assert_close(
            parameter.grad, stock_gradients[stored][rows], rtol=1e-4, atol=1e-5, msg=name
        )


@pytest.mark.parametrize("family", ["llama3", "qwen2", "gpt2"])
def test_other_families_compute_what_their_stock_model_does(family) -> None:
    stock = AutoModelForCausalLM.from_config(
        family_config(family, LAYOUT.size, 0, 1), attn_implementation="eager"
    ).eval()
    config = stock.config
    packed = build_packed_model(
        type(stock), config, LAYOUT.num_text, config.vocab_size - LAYOUT.num_text, 64, False
    ).eval()
    state = stock.state_dict()
    for name, parameter in packed.causal_lm.named_parameters():
        stored, rows = stored_slice(name, LAYOUT.num_text)
        parameter.data = state[stored][rows].clone()
    ids = torch.arange(40) * 7 % LAYOUT.size
    with torch.no_grad():
        found = packed(
            ids[None],
            torch.arange(40)[None],
            torch.tensor([0, 40], dtype=torch.int32),
            torch.arange(40),
        )
        torch.testing.assert_close(found, stock(ids[None]).logits[0], rtol=1e-4, atol=1e-5)


def test_a_sample_does_not_see_its_neighbours(folder) -> None:
    model = packed_model(folder)
    first, *others = samples()
    alone = losses_of(model, collate([first], [0], LAYOUT))
    packed = losses_of(model, collate([others[1], first, others[2]], [0, 0, 0], LAYOUT))
    start = 29
    torch.testing.assert_close(packed[start : start + len(alone)], alone, rtol=1e-6, atol=1e-6)


def test_no_target_still_reaches_every_parameter(folder) -> None:
    model = packed_model(folder)
    losses = losses_of(model, collate([], [], LAYOUT))
    assert losses.shape == (0,)
    losses.sum().backward()
    assert all(
        parameter.grad is not None and not parameter.grad.any() for parameter in model.parameters()
    )


def test_full_logits_never_exist(folder) -> None:
    """No operation, forward or backward, gives more than `loss_chunk_tokens` rows as wide as the
    vocabulary.
    """

    class WideRows(TorchDispatchMode):
        rows: ClassVar[list[int]] = []

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if (
                isinstance(result, torch.Tensor)
                and result.ndim == 2
                and result.shape[1] == LAYOUT.size
            ):
                self.rows.append(len(result))
            return result

    with WideRows():
        losses_of(
            packed_model(folder, chunk=8), collate(samples(), [0] * 5, LAYOUT)
        ).sum().backward()
    assert max(WideRows.rows) == 8 and min(WideRows.rows) < 8


def test_the_loss_is_float32_arithmetic_in_a_bf16_model() -> None:
    """torch's linear_cross_entropy was 1.3 % off here: sums of bf16 losses."""
    torch.manual_seed(0)
    head = ExtendedHead(300, 20, 16, 64).to(torch.bfloat16)
    for rows in (head.text_rows, head.visual_rows):
        torch.nn.init.normal_(rows)
    hidden, targets = (
        torch.randn(999, 16, dtype=torch.bfloat16, requires_grad=True),
        torch.randint(0, 320, (999,)),
    )
    losses = head(hidden, targets)
    losses.sum().backward()
    found, hidden.grad = hidden.grad, None
    expected = torch.nn.functional.cross_entropy(head(hidden).float(), targets, reduction="none")
    expected.sum().backward()
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found, hidden.grad, rtol=2e-2, atol=1e-2)


def test_rows_of_logits_start_where_matrix_kernels_of_a_gpu_want_them() -> None:
    buffer = _logits_buffer(torch.empty(3, 8, dtype=torch.bfloat16), 145)
    assert buffer.shape == (3, 145) and buffer.stride() == (192, 1)


def test_the_varlen_kernel_of_this_torch_is_found() -> None:
    """It was not for as long as `torch.nn.attention` was asked for an attribute that only
    importing it makes.
    """
    assert varlen_kernel() is not None


def test_frozen_rows_get_no_gradient() -> None:
    head = ExtendedHead(30, 20, 16, 7)
    for rows in (head.text_rows, head.visual_rows):
        torch.nn.init.normal_(rows)
    head.text_rows.requires_grad_(False)
    head(torch.randn(20, 16), torch.randint(0, 50, (20,))).sum().backward()
    assert (
        head.text_rows.grad is None
        and head.visual_rows.grad is not None
        and head.visual_rows.grad.any()
    )


def test_stored_slice() -> None:
    assert stored_slice("model.embed_tokens.text_rows", 10) == (
        "model.embed_tokens.weight",
        slice(0, 10),
    )
    assert stored_slice("lm_head.visual_rows", 10) == ("lm_head.weight", slice(10, None))
    assert stored_slice("model.norm.weight", 10) == ("model.norm.weight", slice(None))
