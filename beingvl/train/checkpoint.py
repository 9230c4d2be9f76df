"""Checkpoints: everything that training changes, in slices, without pickles.

    checkpoints/step-00000120/
        rank-00000-of-00002.safetensors    this rank's slices: NAME.master, NAME.exp_avg,
                                           NAME.exp_avg_sq (float32)
        probe.safetensors                  one sample and the model's logits for it
                                           (train/probe.py)
        state.json                         step, applied steps, run identity, shapes and slice sizes
        manifest.json                      commit marker; rank 0 writes it last, when every rank
                                           has written

Frozen weights are not stored: they are read again from the stage's start model, whose hash is part
of the run identity. A slice is a range of the flattened parameter, so a run with a different number
of ranks, or a different ZeRO stage, reads different ranges of the same files.

    parameter of 7 elements, saved by 2 ranks:  rank 0 [0 1 2 3]   rank 1 [4 5 6]
    read by 3 ranks:                            rank 0 [0 1 2]     rank 1 [3 4 5]    rank 2 [6]
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from beingvl.artefact.files import to_json, write_atomically
from beingvl.artefact.hashes import HashedFile
from beingvl.artefact.manifest import (
    MANIFEST_FILE,
    difference_of_file,
    read_manifest,
    write_manifest,
)
from beingvl.errors import InputError
from beingvl.json_file import read_object
from beingvl.model.weight_files import make_header
from beingvl.train.checkpoint_folders import complete_checkpoints, delete_checkpoint
from beingvl.train.failures import SaveError
from beingvl.train.partitions import STATE_KEYS

STATE_FILE = "state.json"
FLUSH_BYTES = 1 << 28  # bytes written between two fsyncs: one part of the phase "save"


@dataclass(frozen=True)
class CheckpointState:
    """`state.json`. Of `step` optimizer steps, `num_applied_steps` changed weights.

    `parameters`: trained name -> {"shape": […], "spans": [[start, stop] per rank], "adam_steps":
    n}.
    """

    step: int
    num_applied_steps: int
    num_ranks: int
    identity: dict[str, Any]
    parameters: dict[str, dict[str, Any]]

    @property
    def files(self) -> list[str]:
        """Names of all ranks' files."""
        return [rank_file(rank, self.num_ranks) for rank in range(self.num_ranks)]


def rank_file(rank: int, num_ranks: int) -> str:
    return f"rank-{rank:05d}-of-{num_ranks:05d}.safetensors"


class CheckpointWriter:
    """Writes checkpoints, all ranks together: `begin`, then `commit` when every rank `is_written`.

    begin    waits for the previous checkpoint; a thread writes this rank's slices
    commit   waits for the thread; rank 0 writes the rest and the manifest

    `gather` gives every rank's value to all (and is the barrier). If one rank cannot write, all
    raise SaveError, and the unfinished checkpoint is removed to free its space.
    """

    def __init__(
        self,
        rank: int,
        gather: Callable[[Any], list[Any]],
        advance: Callable[[], object] = lambda: None,
    ) -> None:
        """`advance` is called, from a thread, for every `FLUSH_BYTES`, or slice, written."""
        self._rank, self._gather, self._advance = rank, gather, advance
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._begun: _BegunCheckpoint | None = None

    def begin(
        self,
        folder: Path,
        state: CheckpointState,
        slices: Iterable[tuple[str, torch.Tensor]],
        write_more: Callable[[Path], None],
    ) -> None:
        """`slices`: (`NAME.KEY`, this rank's flat float32 slice), ordered by `parameters`, then
        STATE_KEYS.

        A thread takes them one by one; their data must not change until `commit`. Rank 0 calls
        `write_more` for the rest. Leftovers of a killed run's checkpoint are removed first.
        """
        self.commit()
        self._together(folder, lambda: _start_empty(folder) if self._rank == 0 else None)
        path = folder / rank_file(self._rank, state.num_ranks)
        written = self._pool.submit(_write_slices, path, self._sizes(state), slices, self._advance)
        self._begun = _BegunCheckpoint(folder, state, write_more, written)

    def _sizes(self, state: CheckpointState) -> dict[str, int]:
        """Slice -> its number of elements, on this rank."""
        spans = {
            name: parameter["spans"][self._rank] for name, parameter in state.parameters.items()
        }
        return {
            f"{name}.{key}": stop - start
            for name, (start, stop) in spans.items()
            for key in STATE_KEYS
        }

    @property
    def is_written(self) -> bool:
        """Whether there is a checkpoint to commit whose slices this rank has written."""
        return self._begun is not None and self._begun.slices.done()

    def commit(self) -> None:
        """Finish the checkpoint that was begun, if any. All ranks call together."""
        begun, self._begun = self._begun, None
        if begun is None:
            return
        hashes = dict(self._together(begun.folder, begun.slices.result))
        self._together(begun.folder, lambda: begun.finish(hashes) if self._rank == 0 else None)

    def _together(self, folder: Path, work: Callable[[], Any]) -> list[Any]:
        try:
            result, problem = work(), None
        except (OSError, SafetensorError) as error:
            result, problem = None, f"rank {self._rank}: {error}"
        answers = self._gather((result, problem))
        problems = [problem for _, problem in answers if problem]
        if problems:
            if self._rank == 0:
                shutil.rmtree(folder, ignore_errors=True)
            raise SaveError(
                f"{folder} could not be written ({problems[0]}); earlier checkpoints are as they "
                "were, start again"
            )
        return [result for result, _ in answers]


@dataclass(frozen=True)
class _BegunCheckpoint:
    """`slices`: future of (name, hash) of this rank's file."""

    folder: Path
    state: CheckpointState
    write_more: Callable[[Path], None]
    slices: Future[tuple[str, str]]

    def finish(self, hashes: Mapping[str, str]) -> None:
        self.write_more(self.folder)
        write_atomically(self.folder / STATE_FILE, to_json(asdict(self.state)))
        counts = {"step": self.state.step, "ranks": self.state.num_ranks}
        write_manifest(
            self.folder, "checkpoint", counts, self.state.identity["lineage"], known_hashes=hashes
        )


def _write_slices(
    path: Path,
    sizes: Mapping[str, int],
    slices: Iterable[tuple[str, torch.Tensor]],
    advance: Callable[[], object],
) -> tuple[str, str]:
    """Write one rank's file of float32 slices, flushed before it is renamed: (name, hash)."""
    temporary = path.with_suffix(".tmp")
    num_unflushed = 0
    with open(temporary, "wb") as file:
        hashed = HashedFile(file)
        hashed.write(make_header({name: ("F32", [size], 4 * size) for name, size in sizes.items()}))
        for (name, tensor), (expected, size) in zip(slices, sizes.items(), strict=True):
            assert (name, tensor.dtype, tensor.numel()) == (expected, torch.float32, size), name
            data = memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy())
            for start in range(0, len(data), FLUSH_BYTES):
                num_unflushed += hashed.write(data[start : start + FLUSH_BYTES])
                if num_unflushed >= FLUSH_BYTES:
                    file.flush()
                    os.fsync(file.fileno())
                    num_unflushed = 0
                advance()
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    return path.name, hashed.hash


def _start_empty(folder: Path) -> None:
    delete_checkpoint(folder)
    folder.mkdir(parents=True)


def read_state(folder: Path) -> CheckpointState:
    """`state.json` of a finished checkpoint."""
    refuse_damaged(folder, [STATE_FILE])
    try:
        state = CheckpointState(**read_object(folder / STATE_FILE))
        listed = read_manifest(folder).files
        if not 1 <= state.num_ranks <= len(listed):
            raise ValueError(f"it names {state.num_ranks} ranks")
        if not all(isinstance(state.identity[key], kind) for key, kind in _IDENTITY):
            raise ValueError("its identity is not that of a run")
        for name, parameter in state.parameters.items():
            _check_parameter(name, parameter, state.num_ranks)
        num_bytes = sum(4 * math.prod(one["shape"]) for one in state.parameters.values())
        if num_bytes > sum(int(entry["bytes"]) for entry in listed.values()):
            raise ValueError(f"its parameters take {num_bytes} bytes, more than all files")
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise _damaged(folder, STATE_FILE, str(error)) from error
    return state


_IDENTITY = (("start_model", str), ("lineage", dict))


def _check_parameter(name: str, parameter: dict[str, Any], num_ranks: int) -> None:
    """Raises ValueError, TypeError or KeyError unless the entry is as `CheckpointState` says."""
    sizes = [*parameter["shape"], parameter["adam_steps"]]
    sizes += [edge for start, stop in parameter["spans"] for edge in (start, stop)]
    if len(parameter["spans"]) != num_ranks or not all(type(n) is int and n >= 0 for n in sizes):
        raise ValueError(f"its entry {name!r} is impossible")


def refuse_damaged(
    folder: Path, names: Iterable[str], watch: Callable[[memoryview], object] = lambda block: None
) -> None:
    """Compare files of a checkpoint with its manifest. Raises InputError for the first one that is
    not as it was written; `watch` is called with every block.
    """
    manifest = read_manifest(folder, "checkpoint")
    for name in names:
        if found := difference_of_file(folder, name, manifest, watch):
            raise _damaged(folder, name, f"it {found}")


def _damaged(folder: Path, name: str, found: str) -> InputError:
    """The error for a damaged file of a checkpoint; it names the next older checkpoint, if any."""
    finished = complete_checkpoints(folder.parent.parent)
    older = [other.name for other in finished if other.name < folder.name]
    what = "to start again, since there is no older one"
    if older:
        what = f"to continue from {older[-1]}, the next older one"
    return InputError(f"{folder / name} is missing or damaged: {found}; remove {folder} {what}")


class StateReader:
    """The saved slices of a checkpoint. Raises InputError if one is missing or damaged."""

    def __init__(self, folder: Path, state: CheckpointState | None = None) -> None:
        self._folder, self.state = folder, state or read_state(folder)
        listed = read_manifest(folder, "checkpoint").files
        self._stack = ExitStack()
        self._files = []
        for rank in range(self.state.num_ranks):
            name = rank_file(rank, self.state.num_ranks)
            path, expected = folder / name, listed.get(name, {}).get("bytes")
            found = path.stat().st_size if path.is_file() else 0
            if found != expected:
                what = f"it has {found} bytes, {MANIFEST_FILE} says {expected}"
                raise _damaged(folder, name, what)
            try:
                file = safe_open(path, framework="pt")
                self._files.append(self._stack.enter_context(file))
            except SafetensorError as error:
                raise _damaged(folder, name, str(error)) from error

    def __enter__(self) -> StateReader:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def fetch(self, name: str, key: str, start: int, stop: int) -> torch.Tensor:
        """Elements start … stop of a flattened parameter, float32; `key`: one of STATE_KEYS."""
        flat, reached = torch.empty(stop - start), start
        spans = self.state.parameters[name]["spans"]
        for rank, (first, last) in enumerate(spans):
            high = min(stop, last)
            if first <= reached < high:
                try:
                    piece = self._files[rank].get_slice(f"{name}.{key}")
                    flat[reached - start : high - start] = piece[reached - first : high - first]
                except (SafetensorError, RuntimeError, TypeError) as error:
                    raise _damaged(self._folder, rank_file(rank, len(spans)), str(error)) from error
                reached = high
        if reached < stop:
            what = f"its spans {spans} of {name} do not give the elements {start} … {stop}"
            raise _damaged(self._folder, STATE_FILE, what)
        return flat

    def master(self, name: str) -> torch.Tensor:
        """A trained parameter's float32 weights, whole and in its shape."""
        shape = self.state.parameters[name]["shape"]
        return self.fetch(name, "master", 0, torch.Size(shape).numel()).view(shape)
