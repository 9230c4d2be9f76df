"""[6] Train one stage: start model + shards + stage JSON -> checkpoints and final/.

Started by a launcher on every rank, for example
  deepspeed --num_gpus 2 --module beingvl.train.train_stage --deepspeed_config
  ds_configs/stage1.json \\
            --model base/ --data shards/ --output stage-1/ [--set beingvl.epochs=1 …]
or alone, as a world of one rank, with `beingvl train`.

Started again with the same arguments it resumes from the newest complete checkpoint; a finished
stage is left alone. SIGTERM, SIGUSR1 and SIGINT end it after the running step with a checkpoint and
exit code 85 ("requeue me"); while it starts up or saves there is nothing more to save, and it ends
before the next step. When training cannot go on (values that are not finite, a lost rank, a full
disk) the exit code is 1 and the last checkpoint stays valid.

--replay STEP trains nothing: it rebuilds that step's batch, prints its samples and computes its
loss again.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from blake3 import blake3

from beingvl.artefact.manifest import is_complete, join_lineages, read_manifest
from beingvl.data.arrow_shards import ShardReader
from beingvl.data.loader import TrainingData
from beingvl.data.stage_data import data_of
from beingvl.errors import InputError
from beingvl.model.param_groups import format_plan
from beingvl.model.start_model import find_start_model
from beingvl.stage.stage_config import StageConfig, load_stage_config
from beingvl.train.checkpoint import (
    StateReader,
    agree_on_newest,
    check_identity,
    complete_checkpoints,
)
from beingvl.train.engine import (
    TrainingEngine,
    build_engine,
    start_distributed,
    stop_distributed,
    swap_folders,
)
from beingvl.train.failures import EXIT_REQUEUE, StallError, TrainingError
from beingvl.train.flops import peak_flops
from beingvl.train.hf_folder import write_hf_folder
from beingvl.train.loop import Progress, num_steps_of, train
from beingvl.train.memory import device_bytes
from beingvl.train.metrics import MetricsWriter, peak_memory_bytes, refuse_missing_wandb
from beingvl.train.phases import RANKS, REPLAY_RANKS, Phases
from beingvl.train.probe import Probe, compare_logits, load_probe
from beingvl.train.ranks import gather_objects
from beingvl.train.replay import replay
from beingvl.train.saver import Saver
from beingvl.train.stage_run import Stage, find_moments, run_identity
from beingvl.train.validation import validator

LONGEST_PATIENCE_SECONDS = 60  # after which NFS, by its default, asks its server again
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


def run(args: argparse.Namespace) -> int:
    stop_requested = _catch_signals()

    config = load_stage_config(args.deepspeed_config, args.set)
    refuse_missing_wandb()
    model = find_start_model(args.model)
    model_manifest, shards = read_manifest(model, "model"), ShardReader(args.data)
    inputs = {str(model): model_manifest.lineage, str(args.data): shards.manifest.lineage}
    if bool(args.validation_data) != bool(config.beingvl.validation_every_steps):
        raise InputError(
            "--validation_data and beingvl.validation_every_steps belong together: give "
            "both or none"
        )
    validation = ShardReader(args.validation_data) if args.validation_data else None
    if validation:
        inputs[str(args.validation_data)] = validation.manifest.lineage
    moments = find_moments(args.model) if args.carry_moments else None
    identity = run_identity(config, model_manifest, shards.manifest, join_lineages(inputs))
    if moments:
        identity["moments"] = read_manifest(moments, "checkpoint").content_hash

    is_replay = args.replay is not None
    rank, num_ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    # the heartbeats of a run are not those of who looks at it
    beats = REPLAY_RANKS if is_replay else RANKS
    phases = Phases(args.output, rank, num_ranks, config.beingvl.stall_timeout_seconds, beats)
    with nullcontext() if is_replay and num_ranks == 1 else phases:
        ranks = start_distributed(config.beingvl.deterministic)
        stage = Stage(
            args.output,
            args.log_dir,
            config,
            model,
            shards,
            validation,
            moments,
            identity,
            ranks,
            phases,
        )
        try:
            if is_replay:
                exit_code = _together(
                    stage, lambda stage: _replay(stage, args.replay), replay_step=args.replay
                )
            else:
                exit_code = train_together(stage, stop_requested)
        except (TrainingError, InputError) as error:
            if args.debug:
                raise
            print(f"beingvl train: error: rank {rank}: {error}", file=sys.stderr, flush=True)
            return _leave(2 if isinstance(error, InputError) else 1, num_ranks)
        stop_distributed()
    if exit_code == 0 and not is_replay and rank == 0 and not is_complete(args.output / "final"):
        write_final(stage)
    _ignore_signals()
    return _leave(exit_code, num_ranks)


def train_together(stage: Stage, stop_requested: Callable[[], bool]) -> int:
    """Build, resume, train, unless the stage is finished; all ranks call together. Returns the
    exit code.
    """

    def work(stage: Stage) -> int:
        if _is_finished(stage):
            return 0
        if any(gather_objects(stop_requested(), stage.ranks.num_ranks)):
            if stage.ranks.rank == 0:
                print(
                    "stopped by a signal before the model was loaded; start the same command again",
                    flush=True,
                )
            return EXIT_REQUEUE
        return 0 if _run_loop(stage, stop_requested) else EXIT_REQUEUE

    return _together(stage, work)


def _together(stage: Stage, work: Callable[[Stage], int], **asked: object) -> int:
    """`work(stage)`, when all ranks were given the same, with folders on NVMe for this run alone.

    Raises StallError when a collective fails because another rank is gone.
    """
    try:
        refuse_different_inputs(
            gather_objects({**inputs_of(stage), **asked}, stage.ranks.num_ranks)
        )
        with swap_folders(
            stage.config, _run_name(stage), stage.ranks, stage.phases.advance
        ) as config:
            return work(replace(stage, config=config))
    except Exception as error:
        place = stage.phases.where()
        if _is_collective_failure(error):
            raise StallError(
                f"a collective failed at step and phase of {place}: "
                f"{stage.phases.find_lost_ranks()}"
            ) from error
        if not isinstance(error, (TrainingError, InputError)):
            print(f"failed at {place}", file=sys.stderr, flush=True)
        raise


def _run_name(stage: Stage) -> str:
    """No other run that goes on now has it, and this one has it again when it is started again."""
    return blake3(f"{stage.phases.folder.resolve()}".encode()).hexdigest(16)


def inputs_of(stage: Stage) -> dict[str, Any]:
    """All that ranks must have been given alike: beside the run's identity what changes no
    result, but when ranks meet.
    """
    validation = stage.validation and stage.validation.manifest.content_hash
    return {
        **asdict(stage.config.beingvl),
        **stage.config.deepspeed,
        **stage.identity,
        "validation set": validation,
    }


def refuse_different_inputs(inputs: list[dict[str, Any]]) -> None:
    """Raises InputError when a rank has other inputs (`inputs_of`, one a rank) than rank 0:
    names all of the first such rank.
    """
    first, *others = inputs
    for rank, given in enumerate(others, 1):
        different = [
            f"another {key} ({given.get(key)!r}, not {first.get(key)!r})"
            for key in {**first, **given}
            if first.get(key) != given.get(key)
        ]
        if different:
            raise InputError(
                f"rank {rank} was given {', '.join(different)} than rank 0; every host must "
                "read the same files"
            )


def _is_finished(stage: Stage) -> bool:
    """Whether `final/` is there, as rank 0 sees it. Raises InputError, on all ranks, when it is
    another run's.
    """
    final, ranks = stage.output / "final", stage.ranks
    sees_it = ranks.rank == 0 and is_complete(final)
    identity = read_manifest(final, "model").details.get("identity", {}) if sees_it else None
    found = gather_objects(identity, ranks.num_ranks)[0]
    if found is None:
        return False
    check_identity(final, found, stage.identity)
    if ranks.rank == 0:
        print(f"{final} is finished already: nothing to do", flush=True)
    return True


def _newest_checkpoint(stage: Stage, before_step: int | None = None) -> Path | None:
    """What all ranks go on from; see `agree_on_newest`."""
    patience = min(LONGEST_PATIENCE_SECONDS, stage.config.beingvl.stall_timeout_seconds / 2)
    return agree_on_newest(
        stage.output,
        partial(gather_objects, num_ranks=stage.ranks.num_ranks),
        patience,
        before_step,
    )


def write_final(stage: Stage) -> None:
    """`final/` from the last checkpoint, by one rank; no other may wait for it, since a slow
    disk outlasts the stall timeout.
    """
    final = stage.output / "final"
    write_hf_folder(stage.model, complete_checkpoints(stage.output)[-1], final)
    print(
        f"{final} is finished: a stock Hugging Face folder, the start model of the next stage",
        flush=True,
    )


def _is_collective_failure(error: BaseException) -> bool:
    """Whether another rank is the reason: NCCL has an exception for it, gloo raises RuntimeError
    with its source file.
    """
    return isinstance(error, torch.distributed.DistError) or (
        isinstance(error, RuntimeError) and "gloo" in str(error)
    )


def _run_loop(stage: Stage, stop_requested: Callable[[], bool]) -> bool:
    config, ranks = stage.config, stage.ranks
    data = data_of(config, stage.shards)
    probe = Probe.of_shards(stage.shards)
    engine, progress, adam_steps = _build_or_resume(stage, probe, _newest_checkpoint(stage))
    if ranks.rank == 0:
        plan = format_plan(engine.plan, config.beingvl.trainable)
        (stage.output / "plan.txt").write_text(plan + "\n")
        print(f"{plan}\n{_describe(data, config, engine)}", flush=True)
    saver = Saver(
        stage,
        engine,
        probe,
        {name: steps - progress.num_applied_steps for name, steps in adam_steps.items()},
    )
    num_steps = num_steps_of(data, config)
    peak = peak_flops(ranks.device)
    writer = MetricsWriter(
        stage.output,
        ranks.rank,
        ranks.num_ranks,
        progress.step,
        num_steps,
        config.beingvl.tensorboard,
        stage.log_folder,
        peak and peak * ranks.num_ranks,
    )
    with writer as metrics:
        validate = validator(engine, stage.validation, config, metrics, stop_requested)
        finished = train(
            engine, data, config, progress, metrics, stage.phases, saver, validate, stop_requested
        )
    if ranks.rank == 0:
        print(f"{_memory_report(engine)}\n{writer.describe_time()}", flush=True)
    if ranks.rank == 0 and not finished:
        print(
            f"stopped by a signal after step {progress.step}; start the same command again "
            "to go on",
            flush=True,
        )
    return finished


def _memory_report(engine: TrainingEngine) -> str:
    """What was predicted (as `beingvl plan` does) beside what this rank really used."""
    predicted, device = engine.predicted_memory(), engine.ranks.device
    of_process = " of the whole process, libraries included" if device.type == "cpu" else ""
    amount = sum(predicted.values()) if device.type == "cpu" else device_bytes(predicted)
    return (
        f"memory of rank 0: predicted {amount / 1e9:.2f} GB, peak "
        f"{peak_memory_bytes(device) / 1e9:.2f} GB{of_process}"
    )


def _replay(stage: Stage, step: int) -> int:
    """Show the samples of a step and compute its loss with the nearest weights before it."""
    data = data_of(stage.config, stage.shards)
    if not 1 <= step <= num_steps_of(data, stage.config):
        raise InputError(
            f"--replay {step}: this run has the steps 1 … {num_steps_of(data, stage.config)}"
        )
    engine, progress, _ = _build_or_resume(
        stage, Probe.of_shards(stage.shards), _newest_checkpoint(stage, before_step=step)
    )
    replay(engine, data, stage.config, stage.model, stage.output, step, progress.step)
    return 0


def _describe(data: TrainingData, config: StageConfig, engine: TrainingEngine) -> str:
    num_steps = num_steps_of(data, config)
    shares = ", ".join(
        f"{name} {share.samples:,} samples ({share.share_of_samples:.2%}), "
        f"{share.tokens:,} tokens ({share.share_of_tokens:.2%})"
        for name, share in data.realised_shares(num_steps).items()
    )
    return (
        f"{num_steps} steps of {config.sequences_per_step} sequences: "
        f"{engine.ranks.num_ranks} ranks x "
        f"{config.micro_batch_size} (micro-batch) x {engine.accumulation_steps} "
        "(accumulation); packing "
        f"{data.plan.efficiency:.1%} full; sources: {shares}"
    )


def _build_or_resume(
    stage: Stage, probe: Probe, checkpoint: Path | None
) -> tuple[TrainingEngine, Progress, dict[str, int]]:
    """The engine with the start model's weights, or with those of a checkpoint.

    The third value says of every trained parameter how many updates its moments have behind them.
    """
    build = partial(
        build_engine,
        stage.model,
        stage.shards.layout,
        stage.config,
        stage.ranks,
        advance=stage.phases.advance,
    )
    source = checkpoint or stage.moments
    if source is None:
        engine = build()
        return engine, Progress(), dict.fromkeys(engine.trained_shapes, 0)
    with StateReader(source) as reader:
        if checkpoint:
            check_identity(source, reader.state.identity, stage.identity)
        adam_steps = {name: entry["adam_steps"] for name, entry in reader.state.parameters.items()}
        engine = build(adam_steps)
        adam_steps = {name: adam_steps.get(name, 0) for name in engine.trained_shapes}
        surviving = (
            None if checkpoint else [name for name in adam_steps if name in reader.state.parameters]
        )
        engine.load_state(reader.fetch, adam_steps, only_moments_of=surviving)
    progress = (
        Progress(step=reader.state.step, num_applied_steps=reader.state.num_applied_steps)
        if checkpoint
        else Progress()
    )
    if checkpoint:
        _check_probe(source, engine, probe)
    if stage.ranks.rank == 0:
        print(
            f"{'resumed' if checkpoint else 'optimizer moments carried over'} from {source}",
            flush=True,
        )
    return engine, progress, adam_steps


def _check_probe(checkpoint: Path, engine: TrainingEngine, probe: Probe) -> None:
    """Raises TrainingError when the restored model does not give the logits that the checkpoint
    stored.
    """
    _, stored = load_probe(checkpoint)
    comparison = compare_logits(
        stored, engine.logits(probe.input_ids, probe.positions), engine.dtype
    )
    if not comparison.matches:
        raise TrainingError(
            f"{checkpoint} was read, but {comparison.describe()}; remove the folder to "
            "resume from an older one"
        )


def _catch_signals() -> Callable[[], bool]:
    """From now on a signal only asks to stop; the loop stops after the running step."""
    received: list[int] = []
    for number in STOP_SIGNALS:
        signal.signal(number, lambda number, frame: received.append(number))
    return lambda: bool(received)


def _leave(exit_code: int, num_ranks: int) -> int:
    """With several ranks the process ends here, everything being written and closed, without
    Python's teardown: there a thread of the process group that wants the interpreter back aborts
    it now and then, and a finished run would count as failed.
    """
    if num_ranks == 1:
        return exit_code
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)


def _ignore_signals() -> None:
    """At its end Python puts default handlers back, and a second signal would kill a rank on its
    way out.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


if __name__ == "__main__":
    from beingvl.commands.main import main

    sys.exit(main(["train", *sys.argv[1:]]))
