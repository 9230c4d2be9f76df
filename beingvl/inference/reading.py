"""Loads a stock model's weights: dtype, device, and no progress bars in log files."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

from beingvl.artefact.manifest import verify_small_files
from beingvl.artefact.progress import progress
from beingvl.errors import InputError
from beingvl.images.vqgan import usable_device
from beingvl.model.start_model import read_config
from beingvl.model.weight_files import WeightFolder, verify_weights

DTYPES = ("float32", "bfloat16", "float16")


def as_dtype(torch_dtype: str | torch.dtype) -> torch.dtype:
    name = str(torch_dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise InputError(f"torch_dtype is {name!r}, expected one of {list(DTYPES)}")
    return getattr(torch, name)


def dtype_of(
    folder: Path, torch_dtype: str | torch.dtype | None, device: torch.device
) -> torch.dtype:
    """`torch_dtype`; by default float32 on a CPU, and the checkpoint's own dtype on a GPU."""
    if torch_dtype is None and device.type != "cpu":
        config = read_config(folder)
        torch_dtype = config.get("dtype") or config.get("torch_dtype")
    return as_dtype(torch_dtype or "float32")


def own_device(device: str | torch.device | None = None) -> torch.device:
    """`device`, else the one that "auto" selects."""
    return usable_device(device or "auto")


def read_model(
    folder: Path, dtype: torch.dtype, device: torch.device, **options: Any
) -> PreTrainedModel:
    """A stock model, frozen and in evaluation mode; without a progress bar in log files.

    All is compared with the folder's manifest, if it has one; the weights by a thread meanwhile.
    Raises InputError if a file differs.
    """
    verify_small_files(folder)
    weights = WeightFolder(folder)  # also checks that the index names no file outside
    was_enabled = logging.is_progress_bar_enabled()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    try:
        with (
            progress(name=f"load {folder}", unit="model", total=1, leave=False),
            ThreadPoolExecutor(1, thread_name_prefix="compare") as pool,
        ):
            compared = pool.submit(verify_weights, weights, weights.files)
            model = AutoModelForCausalLM.from_pretrained(
                folder, dtype=dtype, trust_remote_code=False, **options
            ).to(device)
            compared.result()
    finally:
        if was_enabled:
            logging.enable_progress_bar()
    return model.eval().requires_grad_(False)
