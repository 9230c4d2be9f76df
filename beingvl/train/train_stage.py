"""[6] One rank of a training stage, from start to end: `beingvl train` and `python -m
beingvl.train.train_stage`.

    train            the step, as a function
        open_stage          light: reports wrong input at once         (stage_run.py)
        owned               rank 0 keeps other runs from writing here  (artefact/owner.py)
        Phases              heartbeats start: others see this rank     (phases.py)
        train_together      torch, DeepSpeed, and all the work         (run_stage.py)
    as_a_rank        wraps it as a process: signals, error messages, exit code
"""

from __future__ import annotations

import gc
import logging
import os
import resource
import signal
import sys
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

from beingvl.artefact.owner import owned, wait_for_owner
from beingvl.errors import InputError
from beingvl.train.agreement import LONGEST_PATIENCE_SECONDS, is_finished
from beingvl.train.failures import EXIT_REQUEUE, TrainingError
from beingvl.train.launchers import end_with_launcher, run_name
from beingvl.train.phases import RANKS, REPLAY_RANKS, Phases
from beingvl.train.stage_run import Stage, open_stage

LONGEST_IMPORT_SECONDS = 600
LEAST_OPEN_FILES = 64  # with 20 too few, torch's store ends the process without an exception
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


def train(
    model: Path | str,
    data: Path | str,
    output: Path | str,
    *,
    deepspeed_config: Path | str,
    overrides: Sequence[str] = (),
    log_dir: Path | str | None = None,
    validation_data: Path | str | None = None,
    carry_moments: bool = False,
    replay: int | None = None,
    stop_requested: Callable[[], bool] = lambda: False,
) -> Path | None:
    """Train a stage to its end, from its newest checkpoint if there is one.

    This process is one rank; RANK, LOCAL_RANK (its GPU), WORLD_SIZE, MASTER_ADDR and MASTER_PORT in
    the environment say which. Without them it is the only one.

    Args:
        model: start model, or the previous stage's folder.
        data: shard folder.
        output: stage folder; holds checkpoints/, metrics.jsonl and, at the end, final/.
        deepspeed_config: the stage's JSON.
        overrides: KEY=VALUE for keys of the JSON, for example beingvl.epochs=1.
        log_dir: TensorBoard folder; default OUTPUT/tensorboard.
        validation_data: held-out shards for beingvl.validation_every_steps.
        carry_moments: start with the optimizer moments that `model`, a stage folder, ended with.
        replay: train nothing; print this step's samples, and its loss with the weights of the
            nearest checkpoint before it.
        stop_requested: called before each step; True saves a checkpoint and ends the run.

    Returns `final/`, written by rank 0, or None if the run was stopped. Raises InputError for wrong
    input, TrainingError when training cannot continue.
    """
    output = Path(output)
    stage = open_stage(
        Path(model),
        Path(data),
        output,
        Path(deepspeed_config),
        overrides,
        Path(log_dir) if log_dir else None,
        Path(validation_data) if validation_data else None,
        carry_moments,
    )
    _refuse_few_open_files()
    rank, num_ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if stage.note and rank == 0:
        print(stage.note, flush=True)
    # several ranks decide this together, in run_stage
    if num_ranks == 1 and replay is None and is_finished(stage, rank, lambda found: [found]):
        return output / "final"
    # taken before this run reads a checkpoint or removes an earlier run's heartbeats
    with _owned(stage, rank) if replay is None else nullcontext() as owner:
        is_at_its_end = _take_part(stage, rank, num_ranks, owner, replay, stop_requested)
        if is_at_its_end and rank == 0:
            from beingvl.train.run_stage import write_final  # already loaded

            write_final(stage)
    return output / "final" if is_at_its_end else None


def _refuse_few_open_files() -> None:
    """The shard reader has already raised the limit as far as it can."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit < LEAST_OPEN_FILES:
        raise InputError(
            f"a process may open {limit} files here, and training needs {LEAST_OPEN_FILES}; allow "
            "more (`ulimit -n 65536`) and start the same command again"
        )


@contextmanager
def _owned(stage: Stage, rank: int) -> Iterator[str | None]:
    """Take the output folder for this run: rank 0 owns it and yields the group, others wait."""
    run, timeout = run_name(), stage.config.beingvl.stall_timeout_seconds
    if rank == 0:
        with owned(stage.output, f"{run}-{uuid.uuid4().hex}") as group:
            yield group
    else:
        wait_for_owner(stage.output, run, min(LONGEST_PATIENCE_SECONDS, timeout / 2))
        yield None


def _take_part(
    stage: Stage,
    rank: int,
    num_ranks: int,
    owner: str | None,
    replay: int | None,
    stop_requested: Callable[[], bool],
) -> bool:
    """Everything that ranks do together; returns whether the stage is finished."""
    phases = Phases(
        stage.output,
        rank,
        num_ranks,
        stage.config.beingvl.stall_timeout_seconds,
        # a replay must not overwrite the heartbeats of a run
        folder=RANKS if replay is None else REPLAY_RANKS,
        run=run_name(),
    )
    with phases if replay is None or num_ranks > 1 else nullcontext():
        # Imported only here: it takes seconds, on a cold disk minutes, during which no signal may
        # be lost and no rank may count as stalled.
        phases.allow(LONGEST_IMPORT_SECONDS)
        gc.disable()  # garbage collection takes a seventh of the import's time
        try:
            from beingvl.train import run_stage
        finally:
            gc.enable()
        phases.advance()
        ranks = run_stage.start_distributed(stage.config.beingvl.deterministic)
        phases.advance()
        if replay is None:
            is_finished = run_stage.train_together(stage, ranks, phases, stop_requested, owner)
        else:
            is_finished = run_stage.replay_together(stage, ranks, phases, replay)
        run_stage.stop_distributed()
    return is_finished


def as_a_rank(step: Callable[[Callable[[], bool]], bool], debug: bool = False) -> int:
    """Call `step(stop_requested)`, which returns whether it finished; returns the exit code.

    From now on a signal only requests a stop. With several ranks the process ends here, without
    Python's teardown: a thread of the process group that wants the interpreter lock sometimes
    aborts it, and a finished run would count as failed.
    """
    received: list[int] = []
    for number in STOP_SIGNALS:
        signal.signal(number, lambda number, frame: received.append(number))
    num_ranks = int(os.environ.get("WORLD_SIZE", "1"))
    end_with_launcher()
    try:
        exit_code = 0 if step(lambda: bool(received)) else EXIT_REQUEUE
    except (TrainingError, InputError) as error:
        if debug:
            raise
        place = f"rank {os.environ.get('RANK', '0')}: " if num_ranks > 1 else ""
        print(f"beingvl train: error: {place}{error}", file=sys.stderr, flush=True)
        exit_code = 2 if isinstance(error, InputError) else 1
    for number in STOP_SIGNALS:  # during Python's shutdown a second signal would kill the rank
        signal.signal(number, signal.SIG_IGN)
    if num_ranks > 1:
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(exit_code)
    return exit_code


if __name__ == "__main__":
    from beingvl.commands.main import main

    sys.exit(main(["train", *sys.argv[1:]]))
