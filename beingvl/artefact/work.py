"""How a step makes its output in parts: start, make this rank's parts, join them, reuse the result.

A step describes itself as `Work`: its parts and how to join them. `run_in_parts` does the rest, for
all steps:

    1. a finished output of the same request is reused, of a different request refused
    2. this rank makes its parts, here or in worker processes; existing parts are kept
    3. the rank that finds all parts finished joins them and, last, writes the manifest

The result is bit-identical for any ranks, workers and kills (parts.py says how).
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from pathlib import Path

from beingvl.artefact.files import to_json
from beingvl.artefact.hashes import PREFIX, hash_bytes
from beingvl.artefact.manifest import already_made, is_complete, start_folder
from beingvl.artefact.owner import OWNER, in_turn, owned
from beingvl.artefact.parts import FOLDER, OvertakenError, Parts, remove_parts
from beingvl.artefact.progress import progress
from beingvl.artefact.ranks import RankOf
from beingvl.artefact.request import Request
from beingvl.errors import InputError


class Work:
    """One step's work. Worker processes get a pickled copy and call `prepare` once.

    kind           the artefact's kind, as in its manifest
    output         the folder to write
    unit           what progress counts: "image", "row", "B"
    parts_folder   name of the folder of parts inside `output`
    cheap          whether unfinished parts of a different request are removed, not refused
    """

    kind: str
    output: Path
    unit: str
    parts_folder = FOLDER
    cheap = False

    @property
    def num_parts(self) -> int:
        """Number of parts; a function of the input alone."""
        raise NotImplementedError

    def size_of_part(self, number: int) -> int:
        """Size of part `number`, in units."""
        raise NotImplementedError

    def request(self) -> Request:
        """Everything that determines the result; stored in the manifest's details. May be slow."""
        raise NotImplementedError

    def request_of_parts(self) -> Request:
        """Everything that determines the parts' bytes; must be fast. Parts of a different request
        are refused, or removed if they are `cheap`.
        """
        raise NotImplementedError

    def prepare(self) -> None:
        """Open what the parts need; called once in each process that makes parts."""

    def write_part(self, number: int, folder: Path, advance: Callable[[int], object]) -> None:
        """Write the files of part `number` to `folder`; call `advance` with the units done."""
        raise NotImplementedError

    def join(self, parts: Parts) -> None:
        """Join all parts in `output` and write its manifest."""
        raise NotImplementedError

    def is_finished(self) -> bool:
        return is_complete(self.output)

    def check_finished(self) -> None:
        """Raises InputError if the finished output was made with a different request."""
        already_made(self.output, self.kind, self.request())

    def start_over(self) -> None:
        """Remove the finished output: `--overwrite`."""
        start_folder(self.output, self.kind)


def run_in_parts(
    work: Work, rank: RankOf, num_workers: int = 0, overwrite: bool = False, name: str = "parts"
) -> None:
    """Make this rank's share of `work` and, if it is the last rank, join the whole.

    Parts are made in `num_workers` processes, or in this process if that is 0. `name` labels the
    progress bar. Raises InputError for an output of a different request, and OwnedError if another
    process is making something else there.
    """
    if overwrite and rank.num_ranks > 1:  # a late rank would remove what other ranks have made
        raise InputError(
            f"--overwrite is for one rank, found {rank.num_ranks}; remove {work.output} before "
            "you start them"
        )
    request = work.request_of_parts()
    # Processes that make the same may join; one that starts over is alone.
    group = None if overwrite else hash_bytes(to_json(request).encode()).removeprefix(PREFIX)
    with owned(work.output, group, f".{work.parts_folder.removesuffix(FOLDER)}{OWNER[1:]}"):
        _make_together(work, request, rank, num_workers, overwrite, name)


def _make_together(
    work: Work, request: Request, rank: RankOf, num_workers: int, overwrite: bool, name: str
) -> None:
    with in_turn(work.output):
        if overwrite:
            work.start_over()
            remove_parts(work.output, work.parts_folder)
        is_finished = work.is_finished()
        if is_finished:  # a run may have been killed between writing the manifest and this
            remove_parts(work.output, work.parts_folder)
        else:
            parts = Parts(work.output, request, work.parts_folder, work.cheap)
            mine = [n for n in parts.missing(work.num_parts) if n % rank.num_ranks == rank.rank]
    if is_finished:  # outside our turn, because comparing all inputs may be slow
        work.check_finished()
        return
    with suppress(OvertakenError):
        _make_parts(work, parts, mine, num_workers, name)
    with in_turn(work.output):
        if is_finished := work.is_finished():
            parts.remove()  # this rank may have added one while another removed them
        elif missing := parts.missing(work.num_parts):
            print(
                f"rank {rank.rank} of {rank.num_ranks} has finished its parts; {len(missing)} of "
                f"{work.num_parts} are still missing"
            )
        else:
            work.join(parts)
            parts.remove()
    if is_finished:  # by another run, which may have joined the same parts differently
        work.check_finished()


def _make_parts(work: Work, parts: Parts, mine: list[int], num_workers: int, name: str) -> None:
    total = sum(map(work.size_of_part, mine))
    with progress(name=name, unit=work.unit, total=total) as bar:

        def advance(units: int) -> None:
            bar.update(units)
            parts.show_life()

        if num_workers and mine:
            with worker_processes(num_workers, _prepare, work, parts) as pool:
                for future in as_completed([pool.submit(_write_in_process, n) for n in mine]):
                    bar.update(future.result())
        elif mine:
            work.prepare()
            for number in mine:
                with parts.writing(number) as folder:
                    work.write_part(number, folder, advance)


# ---- worker processes ----


@contextmanager
def worker_processes(
    num_workers: int, prepare: Callable[..., None], *arguments: object
) -> Iterator[ProcessPoolExecutor]:
    """A pool of spawned processes; each calls `prepare(*arguments)` once and dies with its parent.

    Leaving the block with an error cancels waiting tasks.
    """
    pool = ProcessPoolExecutor(
        num_workers,
        multiprocessing.get_context("spawn"),
        initializer=_start_process,
        initargs=(prepare, arguments),
    )
    try:
        yield pool
    except BrokenProcessPool as error:
        raise killed_worker("no word of it") from error
    finally:
        pool.shutdown(cancel_futures=True)


def killed_worker(found: str) -> InputError:
    """The error for a worker process that ended without an exception; `found` is what we know."""
    return InputError(
        f"a worker process was killed ({found}), most likely by the kernel when memory ran out; "
        "nothing finished is lost: start the same command again with fewer --num_workers, or with "
        "more memory"
    )


def _start_process(prepare: Callable[..., None], arguments: Sequence[object]) -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:  # without it, a worker waits for tasks forever if its parent is killed
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
    prepare(*arguments)
    gc.freeze()  # so that the collector does not scan all imported objects again and again


_work: Work  # this worker process's
_parts: Parts


def _prepare(work: Work, parts: Parts) -> None:
    global _work, _parts
    _work, _parts = work, parts
    work.prepare()


def _write_in_process(number: int) -> int:
    """Write a part; returns the units done."""
    done = 0

    def advance(units: int) -> None:
        nonlocal done
        done += units
        _parts.show_life()

    with _parts.writing(number) as folder:
        _work.write_part(number, folder, advance)
    return done
