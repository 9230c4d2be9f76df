"""Several training runs in one process per rank, because starting a process takes longer than
training a tiny model.

    python -m tests.train.run_stages JOBS.json      with RANK, WORLD_SIZE … in the environment,
                                                    as a launcher sets them

JOBS.json: a list of {config, model, data, output, set} and perhaps moments; each leaves what
`beingvl train` leaves, and of every rank how much memory it took at its peak above what it had
before (`added_bytes`).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.launcher import ENVIRONMENT, SPAWN_RANKS, free_port

ADDED_BYTES = "added-bytes-{:05d}"


def main() -> None:
    from beingvl.artefact.manifest import read_manifest
    from beingvl.data.arrow_shards import ShardReader
    from beingvl.stage.stage_config import load_stage_config
    from beingvl.train.engine import start_distributed, stop_distributed
    from beingvl.train.phases import Phases
    from beingvl.train.run_stage import train_together, write_final
    from beingvl.train.stage_run import Stage, run_identity

    ranks = start_distributed()
    for job in json.loads(Path(sys.argv[-1]).read_text()):
        config = load_stage_config(job["config"], job["set"])
        model = Path(job["model"])
        shards = ShardReader(job["data"], model)
        identity = run_identity(config, read_manifest(model), shards.manifest, {})
        output = Path(job["output"])
        before = restart_peak()
        with Phases(output, ranks.rank, ranks.num_ranks, 120) as phases:
            moments = Path(job["moments"]) if "moments" in job else None
            logs = output / "tensorboard"
            stage = Stage(output, logs, config, model, shards, None, moments, identity, note="")
            assert train_together(stage, ranks, phases, lambda: False)
        if ranks.rank == 0:
            write_final(stage)
        (output / ADDED_BYTES.format(ranks.rank)).write_text(str(peak_bytes() - before))
    stop_distributed()
    os._exit(0)  # as a training run of several ranks ends


def restart_peak() -> int:
    """From now on the kernel keeps a new peak of this process's resident memory; returns what
    that memory is now, in bytes.
    """
    Path("/proc/self/clear_refs").write_text("5")
    return peak_bytes()


def peak_bytes() -> int:
    (line,) = [
        line
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith("VmHWM")
    ]
    return int(line.split()[1]) * 1024


def added_bytes(output: Path, num_ranks: int) -> list[int]:
    """Peak of each rank during the run that left `output`, above what the rank had before."""
    return [int((output / ADDED_BYTES.format(rank)).read_text()) for rank in range(num_ranks)]


def run_stages(num_ranks: int, jobs: list[dict], folder: Path, **variables: str) -> None:
    """Start `num_ranks` processes that do all jobs one after another; raises AssertionError with
    the log when one fails.
    """
    path = folder / f"jobs-{num_ranks}.json"
    path.write_text(json.dumps(jobs, default=str))
    words = [
        sys.executable,
        str(SPAWN_RANKS),
        str(num_ranks),
        str(free_port()),
        "tests.train.run_stages",
        str(path),
    ]
    environment, where = {**ENVIRONMENT, **variables}, Path(__file__).parents[2]
    done = subprocess.run(
        words, env=environment, cwd=where, capture_output=True, text=True, timeout=540
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]


if __name__ == "__main__":
    assert os.environ["RANK"]
    main()
