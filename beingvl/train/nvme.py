"""Offload to NVMe: what DeepSpeed 0.19.8 needs in addition to the JSON's keys.

swap_folders     first of all: a folder for each run and rank, and DeepSpeed's compiled op
swap_settings    number and size of the buffers that this model needs
fetch_copies     makes a single CPU rank compute with copies of the weights it reads
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import deepspeed
import torch
from torch.utils.cpp_extension import get_default_build_root

from beingvl.errors import InputError
from beingvl.stage.deepspeed_keys import AHEAD_KEYS, fewest_buffers
from beingvl.stage.stage_config import StageConfig
from beingvl.train.memory import NVME_SUB_GROUP_ELEMENTS, swap_buffers
from beingvl.train.ranks import Ranks, gather_objects

LONGEST_COMPILATION_SECONDS = 3600  # measured: 13 minutes, on two processors with a load of 8
SECONDS_BEFORE_TELLING = 5  # loading a compiled op takes less


@contextlib.contextmanager
def swap_folders(
    config: StageConfig, run: str, ranks: Ranks, allow: Callable[[float], object]
) -> Iterator[StageConfig]:
    """`config` with NVMe folders, if any, of this run and rank alone; removed at the end.

    `run` is a name that no other running run has; leftovers of a killed run of this name are
    removed first. `allow(seconds)` is told how long compiling DeepSpeed's op may take. Raises
    InputError, on all ranks, if one cannot write there or cannot compile the op.
    """
    folders = {
        key: Path(offload["nvme_path"]) / f"beingvl-{run}" / f"rank-{ranks.rank:05d}"
        for key, offload in config.nvme_offloads.items()
    }
    if not folders:
        yield config
        return
    try:
        problem = _why_no_swapping(config, folders, ranks.rank, allow)
        problems = list(filter(None, gather_objects(problem, ranks.num_ranks)))
        if problems:
            raise InputError(f"{config.source}: {problems[0]}")
        zero = dict(config.deepspeed["zero_optimization"])
        for key, folder in folders.items():
            zero[key] = {**zero[key], "nvme_path": str(folder)}
        yield replace(config, deepspeed={**config.deepspeed, "zero_optimization": zero})
    finally:
        for folder in folders.values():
            shutil.rmtree(folder, ignore_errors=True)
            with contextlib.suppress(OSError):
                folder.parent.rmdir()  # by the last rank of this host


def _why_no_swapping(
    config: StageConfig, folders: Mapping[str, Path], rank: int, allow: Callable[[float], object]
) -> str:
    """Why this rank cannot offload, or "". Creates the folders, empty."""
    for key, offload in config.nvme_offloads.items():
        given = f"zero_optimization.{key}.nvme_path {offload['nvme_path']}"
        if not Path(offload["nvme_path"]).is_dir():
            return (
                f"{given} is not a folder on rank {rank}'s host; mount the disk, or give a "
                "different one"
            )
        try:
            shutil.rmtree(folders[key], ignore_errors=True)
            folders[key].mkdir(parents=True)
        except OSError as error:
            return f"{given} cannot be written by rank {rank} ({error.strerror}); give another"
    builder = deepspeed.ops.op_builder.AsyncIOBuilder()
    # It is compiled once per machine; torch waits as long as the lock file of a compilation exists.
    root = os.environ.get("TORCH_EXTENSIONS_DIR", get_default_build_root())
    told = (
        f"rank {rank} compiles DeepSpeed's op for NVMe, which takes minutes, once per machine (if "
        f"an earlier start was killed while compiling, remove its file lock below {root})"
    )
    timer = threading.Timer(SECONDS_BEFORE_TELLING, print, [told], {"file": sys.stderr})
    allow(LONGEST_COMPILATION_SECONDS)
    timer.start()
    try:
        if builder.is_compatible(verbose=False):
            builder.load(verbose=False)
            return ""
        found = "no libaio"
    except Exception as error:  # the compiler may be missing or fail, headers may be too old
        found = (str(error).strip() or type(error).__name__).splitlines()[0]
    finally:
        timer.cancel()
        allow(0)
    return (
        f"offload to NVMe needs an op that DeepSpeed cannot compile for rank {rank} ({found}); "
        "install libaio-dev, g++ and ninja, or offload to the CPU"
    )


def swap_settings(
    config: StageConfig, weights: Mapping[str, torch.Tensor], num_ranks: int
) -> dict[str, Any]:
    """Values for keys that the JSON leaves open, without which DeepSpeed's buffers would be too few
    or too large.

    Raises InputError for a buffer that is smaller than one rank's share of the largest parameter.
    """
    zero, settings = config.deepspeed["zero_optimization"], dict[str, Any]()
    for key, offload in config.nvme_offloads.items():
        if key == "offload_optimizer":
            settings[key] = {"buffer_count": fewest_buffers(offload), **offload}
            settings["sub_group_size"] = zero.get("sub_group_size", NVME_SUB_GROUP_ELEMENTS)
            continue
        shapes = {name: weight.shape for name, weight in weights.items()}
        largest, count = swap_buffers(shapes, num_ranks)
        settings[key] = {"buffer_size": largest, "buffer_count": count, **offload}
        for name in AHEAD_KEYS:
            if name.removeprefix("stage3_") not in zero:
                settings[name] = 0
        if settings[key]["buffer_size"] < largest:
            raise InputError(
                f"{config.source}: zero_optimization.{key}.buffer_size is "
                f"{offload['buffer_size']}, the largest weight's share is {largest} elements on "
                f"{num_ranks} ranks; remove the key"
            )
    return settings


def fetch_copies(parameters: Iterable[Any]) -> None:
    """Make a single CPU rank compute with copies of the weights it fetches, as several ranks and
    GPUs do anyway. DeepSpeed hands it the read buffer itself, which holds a different weight by the
    time of the backward pass.
    """
    for parameter in parameters:

        def fetch(
            params: Iterable[Any],
            fetch: Callable[..., Any] = parameter.all_gather_coalesced,
            **settings: Any,
        ) -> Any:
            params = list(params)
            handle = fetch(params, **settings)
            for fetched in params:
                if fetched.ds_tensor.final_location == "nvme":
                    fetched.data = fetched.data.clone()
            return handle

        parameter.all_gather_coalesced = fetch
