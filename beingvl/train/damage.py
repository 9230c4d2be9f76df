"""Damage check at start: a thread compares the files with their manifests while the engine is built
from them.

One rank hashes each file of a checkpoint. One rank per host hashes each file of the start model,
because every host may have its own copy.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from beingvl.errors import InputError
from beingvl.model.weight_files import WeightFolder, verify_weights
from beingvl.train.agreement import Gather
from beingvl.train.checkpoint import read_state, refuse_damaged
from beingvl.train.ranks import Ranks


@contextmanager
def compared_meanwhile(
    model: Path,
    checkpoint: Path | None,
    ranks: Ranks,
    gather: Gather,
    advance: Callable[[], object],
) -> Iterator[None]:
    """Compare the start model's weights, and a checkpoint, while the `with` block reads them.

    All ranks call together; `advance` is called for every chunk of bytes. Raises InputError at the
    end of the block, on all ranks, if a file is not as it was written.
    """
    hosts = gather(socket.gethostname())
    here = [rank for rank, host in enumerate(hosts) if host == hosts[ranks.rank]]
    weights = WeightFolder(model)

    def hear(block: memoryview) -> None:
        advance()

    def compare() -> None:
        verify_weights(weights, list(weights.files)[here.index(ranks.rank) :: len(here)], hear)
        if checkpoint:
            mine = read_state(checkpoint).files[ranks.rank :: ranks.num_ranks]
            refuse_damaged(checkpoint, mine, hear)

    with ThreadPoolExecutor(1, thread_name_prefix="compare") as pool:
        compared = pool.submit(compare)
        yield
        problem = compared.exception()
    if found := [other for other in gather(problem and str(problem)) if other]:
        raise InputError(found[0])
