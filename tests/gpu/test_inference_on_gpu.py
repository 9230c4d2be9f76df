"""Answers and VQ codes of a GPU against those of the CPU."""

import numpy as np
import pytest
import torch

from beingvl.images.vqgan import VQGAN
from beingvl.inference.model import BeingVL
from tests.images.test_vqgan import make_janus
from tests.tiny import LAYOUT, write_model


def test_greedy_answers_are_those_of_the_cpu(tmp_path, device) -> None:
    folder = write_model(tmp_path / "model", hidden_size=128)
    random = np.random.default_rng(0)
    prompts = [
        random.integers(0, LAYOUT.size, length).tolist() for length in random.integers(4, 60, 24)
    ]
    answers = {}
    for place in (torch.device("cpu"), device):
        model = BeingVL(folder).load_model("float32", place)
        for parameter in model.model.parameters():  # freshly initialised weights hardly attend
            if parameter.dim() == 2:
                parameter.data *= 4
        answers[place] = model.continue_token_sequences(prompts, 12, batch_size=8)
    assert answers[device] == answers[torch.device("cpu")]
    assert len({tuple(answer) for answer in answers[device]}) > 12, (
        "answers that are all alike say nothing"
    )


@pytest.fixture(scope="module")
def codes(tmp_path_factory, device) -> dict[str, np.ndarray]:
    """Codes of 32 smooth pictures, by the CPU, by the device in float32 and in bf16; and how
    near the CPU's choice was.
    """
    folder = tmp_path_factory.mktemp("vqgan")
    make_janus(base_channels=64).save(folder)
    torch.manual_seed(1)
    pixels = torch.nn.functional.interpolate(
        torch.rand(32, 3, 4, 4) * 2 - 1, (16, 16), mode="bicubic"
    )
    exact = VQGAN.load(folder)
    with torch.inference_mode():
        latents = exact.model.quant_conv(exact.model.encoder(pixels)).permute(0, 2, 3, 1)
    nearest = torch.cdist(
        torch.nn.functional.normalize(latents, dim=-1).flatten(0, 2),
        torch.from_numpy(exact.codebook),
    )
    best, second = nearest.topk(2, largest=False).values.unbind(1)
    found = {
        "cpu": exact.encode(pixels),
        "margin": (second - best).numpy().reshape(32, *exact.grid),
    }
    for dtype in (torch.float32, torch.bfloat16):
        found[str(dtype)] = VQGAN.load(folder, device, dtype).encode(pixels)
    return found


def test_codes_in_float32_are_those_of_the_cpu(codes) -> None:
    """But where two codes are equally near within float32; with TF32 convolutions many more
    would differ.
    """
    differs = codes["cpu"] != codes["torch.float32"]
    assert not differs[codes["margin"] > 1e-4].any()
    assert differs.mean() < 1e-3
    assert len(np.unique(codes["cpu"])) > 4, "pictures of one code say nothing"


def test_codes_in_bf16_mostly_agree(codes) -> None:
    agreement = float((codes["cpu"] == codes["torch.bfloat16"]).mean())
    print(f"bf16 codes that equal float32's: {agreement:.2%}")
    assert agreement > 0.9
