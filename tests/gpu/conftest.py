"""Tests of what only a GPU can show; without one every test of this folder skips, here and
nowhere else.

pytest tests/gpu                                    on a machine with a GPU
BEINGVL_TEST_DEVICE=cpu pytest tests/gpu            a rehearsal: all of it that a CPU can run
"""

import os

import pytest
import torch

VARIABLE = "BEINGVL_TEST_DEVICE"


@pytest.fixture(scope="session", autouse=True)
def device() -> torch.device:
    """The device under test; the reference is always this machine's CPU."""
    wanted = os.environ.get(VARIABLE) or ("cuda:0" if torch.cuda.is_available() else None)
    if wanted is None:
        pytest.skip(
            f"torch finds no GPU, so nothing of tests/gpu was tested ({VARIABLE}=cpu rehearses it)"
        )
    return torch.device(wanted)


@pytest.fixture(scope="session")
def cuda(device: torch.device) -> torch.device:
    """For what a CPU cannot even rehearse."""
    if device.type != "cuda":
        pytest.skip(f"it looks at kernels and waits of a GPU, {VARIABLE} is {device}")
    return device
