"""The packed model in bf16 on a GPU against float32 on the CPU; its attention against each
sample alone.
"""

import copy
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from beingvl.data.loader import IGNORED, MicroBatch, collate
from beingvl.data.shard_columns import Sample
from beingvl.model.extended_vocab import PackedCausalLM, build_packed_model
from beingvl.model.packed_attention import packed_attention
from beingvl.vocab import VocabLayout
from tests.tiny import random_samples

LAYOUT = VocabLayout(num_text=1000, num_vq=256, num_merges=128, bos_id=998, eos_id=999)
LENGTHS = (300, 1, 77, 512, 2, 130)


@pytest.fixture(scope="module")
def reference() -> PackedCausalLM:
    """Float32 on the CPU, with weights that bf16 holds exactly and that attend: those of a fresh
    model hardly do.
    """
    config = LlamaConfig(
        vocab_size=LAYOUT.size,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )
    model = build_packed_model(
        LlamaForCausalLM, config, LAYOUT.num_text, LAYOUT.num_visual, 256, True
    )
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(
                parameter, std=1.0 if "embed" in name else 1.5 / parameter.shape[1] ** 0.5
            )
        else:
            torch.nn.init.ones_(parameter)
        parameter.data = parameter.data.bfloat16().float()
    return model.train()


@pytest.fixture(scope="module")
def model(reference: PackedCausalLM, device: torch.device) -> PackedCausalLM:
    """The same weights in bf16 on the device; rotary frequencies stay float32, as in training."""
    moved = copy.deepcopy(reference).to(device)
    for parameter in moved.parameters():
        parameter.data = parameter.data.bfloat16()
    return moved


def samples() -> list[Sample]:
    return random_samples(LAYOUT, [(length, length // 2) for length in LENGTHS])


def arguments_of(batch: MicroBatch, device: torch.device) -> dict:
    positions = np.flatnonzero(batch.target_ids != IGNORED)
    arrays = {
        "input_ids": batch.input_ids[None],
        "position_ids": batch.position_ids[None],
        "cu_seqlens": batch.cu_seqlens,
        "target_positions": positions,
        "target_ids": batch.target_ids[positions],
    }
    tensors = {name: torch.from_numpy(array).to(device) for name, array in arrays.items()}
    return {**tensors, "longest": int(np.diff(batch.cu_seqlens).max())}


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    found, expected = found.double().cpu(), expected.double().cpu()
    return float((found - expected).norm() / expected.norm())


def test_losses_and_gradients_in_bf16_follow_float32_on_the_cpu(reference, model, device) -> None:
    batch = collate(samples(), [0] * len(LENGTHS), LAYOUT)
    expected = reference(**arguments_of(batch, torch.device("cpu")))
    found = model(**arguments_of(batch, device))
    assert found.dtype == torch.float32
    assert float(found.mean()) == pytest.approx(float(expected.mean()), rel=5e-3)
    assert relative_error(found, expected) < 2e-2
    for packed in (reference, model):
        packed.zero_grad()
    expected.mean().backward()
    found.mean().backward()
    of_reference = dict(reference.named_parameters())
    errors = {
        name: relative_error(parameter.grad, of_reference[name].grad)
        for name, parameter in model.named_parameters()
    }
    print("largest relative error of a gradient:", max(errors.values()))
    assert max(errors.values()) < 8e-2, errors


def test_packed_samples_have_the_losses_they_have_alone(model, device) -> None:
    with torch.no_grad():
        packed = model(**arguments_of(collate(samples(), [0] * len(LENGTHS), LAYOUT), device))
        alone = [
            model(**arguments_of(collate([sample], [0], LAYOUT), device)) for sample in samples()
        ]
    assert relative_error(packed, torch.cat(alone)) < 1e-2


def test_a_sample_does_not_see_its_neighbours(model, device) -> None:
    """Equal shapes, other neighbours: the same kernels on the same numbers must give the same
    bits.
    """
    first, *others = samples()
    changed = [
        Sample(
            other.id,
            "",
            "a",
            ((other.input_ids + 1) % LAYOUT.size).astype(np.int32),
            other.target_spans,
        )
        for other in others
    ]
    with torch.no_grad():
        one, two = (
            model(**arguments_of(collate([first, *rest], [0] * len(LENGTHS), LAYOUT), device))
            for rest in (others, changed)
        )
    count = LENGTHS[0] // 2
    assert torch.equal(one[:count], two[:count]) and not torch.equal(one[count:], two[count:])


@pytest.mark.parametrize("num_kv_heads", [2, 8])
def test_attention_and_its_gradients_equal_float64_document_by_document(
    device, num_kv_heads
) -> None:
    torch.manual_seed(0)
    shapes = [(1, heads, sum(LENGTHS), 64) for heads in (8, num_kv_heads, num_kv_heads)]
    given = [torch.randn(shape).to(device, torch.bfloat16).requires_grad_() for shape in shapes]
    exact = [tensor.detach().cpu().double().requires_grad_() for tensor in given]
    borders = np.cumsum([0, *LENGTHS]).tolist()
    starts = torch.tensor(borders, dtype=torch.int32, device=device)
    found, _ = packed_attention(
        torch.nn.Identity(),
        *given,
        None,
        scaling=0.2,
        cu_seq_lens_q=starts,
        max_length_q=max(LENGTHS),
    )
    documents = []
    for start, end in pairwise(borders):
        query, key, value = (tensor[:, :, start:end] for tensor in exact)
        key, value = (tensor.repeat_interleave(8 // num_kv_heads, 1) for tensor in (key, value))
        later = torch.ones(end - start, end - start, dtype=torch.bool).triu(1)
        scores = (query @ key.transpose(2, 3) * 0.2).masked_fill(later, float("-inf"))
        documents.append(scores.softmax(-1) @ value)
    expected = torch.cat(documents, 2).transpose(1, 2)
    weights = torch.randn(expected.shape, dtype=torch.float64)
    (expected * weights).sum().backward()
    (found * weights.to(device, torch.bfloat16)).sum().backward()
    assert found.shape == expected.shape and relative_error(found, expected) < 1e-2
    for ours, exactly in zip(given, exact, strict=True):
        assert ours.grad is not None and relative_error(ours.grad, exactly.grad) < 2e-2


class Operations(TorchDispatchMode):
    """Names of all operations that run inside."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(str(function))
        return function(*args, **(kwargs or {}))


def test_bf16_on_a_gpu_takes_the_varlen_kernel(model, cuda) -> None:
    with Operations() as seen, torch.no_grad():
        model(**arguments_of(collate(samples(), [0] * len(LENGTHS), LAYOUT), cuda))
    assert any("varlen" in name for name in seen.names), sorted(seen.names)
    assert not any("scaled_dot_product" in name for name in seen.names), (
        "some layer took the path of the CPU"
    )


def test_a_micro_batch_never_waits_for_the_gpu(model, cuda) -> None:
    """Forward and backward only queue work: one `.item()` in a layer would empty the queue 32
    times a pass.
    """
    arguments = arguments_of(collate(samples(), [0] * len(LENGTHS), LAYOUT), cuda)
    model(**arguments).sum().backward()  # what is made once, on first use, may wait
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(**arguments).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
