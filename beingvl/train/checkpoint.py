"""Checkpoints: what training changes, in slices, without pickles.

    checkpoints/step-00000120/
        rank-00000-of-00002.safetensors    this rank's slices: NAME.master, NAME.exp_avg, NAME.exp_avg_sq (float32)
        probe.safetensors                  one sample and the logits the model had for it (train/probe.py)
        state.json                         step, applied steps, run identity, shapes and slice sizes
        manifest.json                      commit marker, written last, by rank 0, when every rank has written

Frozen weights are not in it: they are re-read from the stage's start model, whose hash is part of the run identity. A slice is
a range of the flattened parameter, so another number of ranks reads other ranges of the same files.

    parameter of 7 elements, 2 ranks -> slices of 4:  rank 0 [0 1 2 3]   rank 1 [4 5 6 pad]
    read by 3 ranks -> slices of 3:                   rank 0 [0 1 2]     rank 1 [3 4 5]    rank 2 [6 pad pad]
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from beingvl.errors import InputError
from beingvl.manifest import hash_file, is_complete, read_manifest, start_folder, to_json, write_atomically, write_manifest

CHECKPOINTS = "checkpoints"
STATE_FILE = "state.json"


@dataclass(frozen=True)
class CheckpointState:
    """`state.json`. `step` optimizer steps are done, `num_applied_steps` of them changed weights; `identity` names the run.

    `parameters`: trained name -> {"shape": […], "slice_elements": n}.
    """

    step: int
    num_applied_steps: int
    num_ranks: int
    identity: dict[str, Any]
    parameters: dict[str, dict[str, Any]]


def checkpoint_folder(output: Path, step: int) -> Path:
    return output / CHECKPOINTS / f"step-{step:08d}"


def complete_checkpoints(output: Path) -> list[Path]:
    """Finished checkpoints of a stage folder, oldest first."""
    return sorted(path for path in (output / CHECKPOINTS).glob("step-*") if is_complete(path))


def rank_file(rank: int, num_ranks: int) -> str:
    return f"rank-{rank:05d}-of-{num_ranks:05d}.safetensors"


def write_checkpoint(
    folder: Path,
    state: CheckpointState,
    tensors: Mapping[str, torch.Tensor],
    rank: int,
    gather: Callable[[Any], list[Any]],
    write_more: Callable[[Path], None],
) -> None:
    """Write one checkpoint, all ranks together. `gather` hands every rank's value to all (and is the barrier).

    Rank 0 calls `write_more` with the folder for what belongs to it beside the slices.
    """
    if rank == 0:
        start_folder(folder)
    gather(None)
    path = folder / rank_file(rank, state.num_ranks)
    temporary = path.with_suffix(".tmp")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary)
    temporary.replace(path)
    hashes = dict(gather((path.name, hash_file(path))))
    if rank == 0:
        write_more(folder)
        write_atomically(folder / STATE_FILE, to_json(asdict(state)))
        lineage = state.identity["lineage"]
        write_manifest(folder, "checkpoint", {"step": state.step, "ranks": state.num_ranks}, lineage, known_hashes=hashes)
    gather(None)


def delete_old_checkpoints(output: Path, keep_last: int) -> None:
    """Keep the newest `keep_last` finished checkpoints; a deleted one stops being complete first."""
    for folder in complete_checkpoints(output)[:-keep_last]:
        start_folder(folder)
        shutil.rmtree(folder)


def read_state(folder: Path) -> CheckpointState:
    """`state.json` of a finished checkpoint."""
    read_manifest(folder, "checkpoint")
    try:
        return CheckpointState(**json.loads((folder / STATE_FILE).read_text()))
    except (OSError, json.JSONDecodeError, TypeError) as error:
        raise InputError(f"{folder / STATE_FILE} is damaged ({error}); remove the folder to resume from an older one") from error


def check_identity(folder: Path, found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Raises InputError that names what differs when a checkpoint is of another run than the one asked for."""
    for key in {**found, **expected}:
        if found.get(key) != expected.get(key):
            raise InputError(
                f"{folder} belongs to another run: its {key} is {found.get(key)!r}, this run's is {expected.get(key)!r}; "
                "give another --output, or remove the folder to start this stage anew"
            )


def read_local_state(
    folder: Path, state: CheckpointState, rank: int, slice_elements: Mapping[str, int]
) -> dict[str, torch.Tensor]:
    """The slices that `rank` needs, when each parameter is cut into slices of `slice_elements` now."""
    tensors = {}
    with ExitStack() as stack:
        files = _open_rank_files(folder, state, stack)
        for name, elements in slice_elements.items():
            for key in ("master", "exp_avg", "exp_avg_sq"):
                flat = torch.zeros(elements)
                for start, piece in _pieces(files, state, name, key, rank * elements, (rank + 1) * elements):
                    flat[start : start + piece.numel()] = piece
                tensors[f"{name}.{key}"] = flat
    return tensors


def read_master(folder: Path, state: CheckpointState, name: str) -> torch.Tensor:
    """A trained parameter's float32 weights, whole, in its own shape."""
    shape = state.parameters[name]["shape"]
    flat = torch.empty(torch.Size(shape).numel())
    with ExitStack() as stack:
        files = _open_rank_files(folder, state, stack)
        for start, piece in _pieces(files, state, name, "master", 0, flat.numel()):
            flat[start : start + piece.numel()] = piece
    return flat.view(shape)


def _open_rank_files(folder: Path, state: CheckpointState, stack: ExitStack) -> list[Any]:
    names = [rank_file(rank, state.num_ranks) for rank in range(state.num_ranks)]
    for name in names:
        if not (folder / name).is_file():
            raise InputError(f"{folder / name} is missing; remove the folder to resume from an older checkpoint")
    return [stack.enter_context(safe_open(folder / name, framework="pt")) for name in names]


def _pieces(
    files: list[Any], state: CheckpointState, name: str, key: str, start: int, stop: int
) -> Iterator[tuple[int, torch.Tensor]]:
    """(offset in start … stop, elements) for every stored slice that overlaps the flat range; padding is left out."""
    elements = state.parameters[name]["slice_elements"]
    stop = min(stop, torch.Size(state.parameters[name]["shape"]).numel())
    for rank, file in enumerate(files):
        first, last = max(start, rank * elements), min(stop, (rank + 1) * elements)
        if first < last:
            yield first - start, file.get_slice(f"{name}.{key}")[first - rank * elements : last - rank * elements]
