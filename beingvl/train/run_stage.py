"""The work of a stage, all ranks together. Importing this file loads torch and DeepSpeed.

train_together     do all ranks have the same inputs, is the stage already finished; then
    _build_or_resume   engine with the start model's weights, or a checkpoint's  (engine.py)
    loop.train         every step, and saving                                    (loop.py)
write_final        rank 0 alone: start model + last checkpoint                   (hf_folder.py)
replay_together    one step's samples and loss                                   (replay.py)
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from blake3 import blake3

from beingvl.artefact.files import to_json, write_atomically
from beingvl.artefact.manifest import is_complete
from beingvl.artefact.owner import shared
from beingvl.artefact.request import Request
from beingvl.data.loader import TrainingData
from beingvl.data.stage_data import data_of
from beingvl.errors import InputError
from beingvl.model.param_groups import format_plan
from beingvl.stage.stage_config import as_written
from beingvl.train import loop
from beingvl.train.adapter_folder import write_adapter_folder
from beingvl.train.agreement import (
    Gather,
    check_identity,
    is_finished,
    newest_checkpoint,
    refuse_different_inputs,
)
from beingvl.train.checkpoint import CheckpointState, StateReader, read_state
from beingvl.train.checkpoint_folders import CHECKPOINTS, complete_checkpoints
from beingvl.train.damage import compared_meanwhile
from beingvl.train.engine import TrainingEngine, build_engine, start_distributed, stop_distributed
from beingvl.train.failures import StallError, TrainingError
from beingvl.train.flops import peak_flops
from beingvl.train.hf_folder import write_hf_folder
from beingvl.train.memory import device_bytes
from beingvl.train.metrics import (
    STAGE_FILE,
    MetricsWriter,
    peak_memory_bytes,
    refuse_missing_wandb,
)
from beingvl.train.nvme import swap_folders
from beingvl.train.phases import Phases
from beingvl.train.probe import Probe, compare_logits, load_probe
from beingvl.train.ranks import Ranks, gather_objects
from beingvl.train.replay import replay
from beingvl.train.saver import Saver
from beingvl.train.stage_run import Stage
from beingvl.train.validation import validator

__all__ = [
    "replay_together",
    "start_distributed",
    "stop_distributed",
    "train_together",
    "write_final",
]


def train_together(
    stage: Stage,
    ranks: Ranks,
    phases: Phases,
    stop_requested: Callable[[], bool],
    owner: str | None = None,
) -> bool:
    """Build, resume, train, unless the stage is finished. False if it was stopped before the end.

    `owner`: rank 0's ownership of the output folder; from here on all ranks share it.
    """
    refuse_missing_wandb()
    with ExitStack() as stack:
        stage, gather = stack.enter_context(_together(stage, ranks, phases))
        owner = gather(owner)[0]
        if owner and ranks.rank:
            stack.enter_context(shared(stage.output, owner))
        if is_finished(stage, ranks.rank, gather):
            return True
        if any(gather(stop_requested())):
            _say(ranks, "stopped by a signal before the model was loaded; start the same command")
            return False
        checkpoint = newest_checkpoint(stage.output, gather, phases.stall_timeout_seconds)
        return _train(stage, ranks, phases, checkpoint, stop_requested)


def replay_together(stage: Stage, ranks: Ranks, phases: Phases, step: int) -> bool:
    """Print a step's samples, and its loss with the nearest weights before it. Returns False."""
    with _together(stage, ranks, phases, replayed_step=step) as (stage, gather):
        data = data_of(stage.config, stage.shards, phases.advance)
        num_steps = loop.num_steps_of(data, stage.config)
        if not 1 <= step <= num_steps:
            raise InputError(f"--replay {step}: this run has the steps 1 … {num_steps}")
        checkpoint = newest_checkpoint(stage.output, gather, phases.stall_timeout_seconds, step)
        probe = Probe.of_shards(stage.shards)
        engine, progress, _ = _build_or_resume(stage, ranks, phases, probe, checkpoint)
        replay(engine, data, stage.model, stage.output, step, progress.step)
    return False


def write_final(stage: Stage) -> None:
    """Write `final/`. No other rank may wait here: a slow disk can exceed the stall timeout."""
    final = stage.output / "final"
    if is_complete(final):
        return
    checkpoints = complete_checkpoints(stage.output)
    if not checkpoints:
        raise InputError(
            f"{stage.output / CHECKPOINTS} holds no finished checkpoint, so {final} cannot be "
            "written; who removed it? start the same command again"
        )
    check_identity(checkpoints[-1], read_state(checkpoints[-1]).identity, stage.identity)
    what = "a stock Hugging Face folder, the start model of the next stage"
    if any(rule.lora for rule in stage.config.beingvl.trainable):
        is_alone = stage.config.beingvl.final == "adapter"
        adapter = final if is_alone else stage.output / "adapter"
        write_adapter_folder(stage.model, checkpoints[-1], adapter)
        print(f"{adapter} is finished: adapters for PEFT, on {stage.model}", flush=True)
        if is_alone:
            return
    write_hf_folder(stage.model, checkpoints[-1], final, shards=stage.shards.manifest)
    print(f"{final} is finished: {what}", flush=True)


@contextmanager
def _together(
    stage: Stage, ranks: Ranks, phases: Phases, **asked: object
) -> Iterator[tuple[Stage, Gather]]:
    """The stage, with NVMe folders of its own, and a function that gathers a value of each rank.

    Raises InputError unless all ranks have the same inputs, StallError when a collective fails
    because another rank is gone.
    """
    # unique among the runs that are running now, and the same again at this run's next start
    run_name = blake3(f"{phases.folder.resolve()}".encode()).hexdigest(16)
    gather = partial(gather_objects, num_ranks=ranks.num_ranks)
    try:
        refuse_different_inputs(Request(stage.inputs | asked), gather)
        with swap_folders(stage.config, run_name, ranks, phases.allow) as config:
            yield replace(stage, config=config), gather
    except Exception as error:
        place = phases.where()
        if _is_collective_failure(error):
            raise StallError(
                f"a collective failed at step and phase of {place}: {phases.find_lost_ranks()}"
            ) from error
        if not isinstance(error, (TrainingError, InputError)):
            print(f"failed at {place}", file=sys.stderr, flush=True)
        raise


def _is_collective_failure(error: BaseException) -> bool:
    """NCCL has its own exception for a lost rank; gloo's RuntimeError names its source file."""
    return isinstance(error, torch.distributed.DistError) or (
        isinstance(error, RuntimeError) and "gloo" in str(error)
    )


def _train(
    stage: Stage,
    ranks: Ranks,
    phases: Phases,
    checkpoint: Path | None,
    stop_requested: Callable[[], bool],
) -> bool:
    """Train from `checkpoint`, or from the start, to the end. False if it was stopped before."""
    config, output = stage.config, stage.output
    before = peak_memory_bytes(ranks.device)
    data = data_of(config, stage.shards, phases.advance)
    probe = Probe.of_shards(stage.shards)
    engine, progress, carried_steps = _build_or_resume(stage, ranks, phases, probe, checkpoint)
    if ranks.rank == 0:
        plan = format_plan(engine.plan, config.beingvl.trainable)
        (output / "plan.txt").write_text(plan + "\n")
        as_run = config.deepspeed | {"beingvl": as_written(config.beingvl)}
        write_atomically(output / STAGE_FILE, to_json(as_run))
        print(f"{plan}\n{_describe(data, engine)}", flush=True)
    saver = Saver(stage, engine, probe, carried_steps)
    num_steps, peak = loop.num_steps_of(data, config), peak_flops(ranks.device)
    board = stage.log_folder if config.beingvl.tensorboard else None
    writer = MetricsWriter(
        output, ranks, progress.step, num_steps, board, peak and peak * ranks.num_ranks
    )
    with writer as metrics:
        validate = validator(engine, stage.validation, metrics, stop_requested)
        finished = loop.train(
            engine, data, config, progress, metrics, phases, saver, validate, stop_requested
        )
    if ranks.rank == 0:
        print(f"{_memory_report(engine, before)}\n{writer.describe_time()}", flush=True)
    if not finished:
        _say(ranks, f"stopped by a signal after step {progress.step}; start the same command")
    return finished


def _say(ranks: Ranks, stopped: str) -> None:
    if ranks.rank == 0:
        print(f"{stopped} again to continue", flush=True)


def _build_or_resume(
    stage: Stage, ranks: Ranks, phases: Phases, probe: Probe, checkpoint: Path | None
) -> tuple[TrainingEngine, loop.Progress, dict[str, int]]:
    """The engine, with the start model's weights or a checkpoint's; the progress; and, for every
    trained parameter, how many updates its moments had seen when the stage began.
    """
    progress, source = loop.Progress(), checkpoint or stage.moments
    state = read_state(source) if source else None
    saved = {name: entry["adam_steps"] for name, entry in state.parameters.items()} if state else {}
    if checkpoint and state:
        check_identity(checkpoint, state.identity, stage.identity)
        progress = loop.Progress(state.step, state.num_applied_steps)
    gather = partial(gather_objects, num_ranks=ranks.num_ranks)
    with compared_meanwhile(stage.model, source, ranks, gather, phases.advance):
        layout, config = stage.shards.layout, stage.config
        engine = build_engine(stage.model, layout, config, ranks, saved, advance=phases.advance)
        adam_steps = {name: saved.get(name, 0) for name in engine.trained_shapes}
        if source and state:
            surviving = None if checkpoint else _surviving(engine, state)
            with StateReader(source, state) as reader:
                engine.load_state(reader.fetch, adam_steps, only_moments_of=surviving)
    if checkpoint:
        _check_probe(checkpoint, engine, probe)
    if source and ranks.rank == 0:
        what = "resumed" if checkpoint else "optimizer moments carried over"
        print(f"{what} from {source}", flush=True)
    before = {name: steps - progress.num_applied_steps for name, steps in adam_steps.items()}
    return engine, progress, before


def _surviving(engine: TrainingEngine, state: CheckpointState) -> list[str]:
    """Trained parameters that have moments from an earlier stage. Raises InputError for adapters
    whose rank was different there.
    """
    names = [name for name in engine.trained_shapes if name in state.parameters]
    for name in names:
        before, now = state.parameters[name]["shape"], list(engine.trained_shapes[name])
        if before != now:
            raise InputError(
                f"--carry_moments: {name} was {before} in the stage before and is {now} here; "
                "give both stages adapters of the same rank"
            )
    return names


def _check_probe(checkpoint: Path, engine: TrainingEngine, probe: Probe) -> None:
    """Raises TrainingError if the restored model does not reproduce the checkpoint's logits."""
    _, stored = load_probe(checkpoint)
    found = engine.logits(probe)
    comparison = compare_logits(stored, found, engine.dtype)
    if not comparison.matches:
        raise TrainingError(
            f"{checkpoint} was read, but {comparison.describe()}; remove the folder to resume "
            "from an older one"
        )


def _describe(data: TrainingData, engine: TrainingEngine) -> str:
    config, ranks = engine.config, engine.ranks
    num_steps = loop.num_steps_of(data, config)
    shares = ", ".join(
        f"{name} {share.samples:,} samples ({share.share_of_samples:.2%}), "
        f"{share.tokens:,} tokens ({share.share_of_tokens:.2%})"
        for name, share in data.realised_shares(num_steps).items()
    )
    return (
        f"{num_steps} steps of {config.sequences_per_step} sequences: {ranks.num_ranks} ranks x "
        f"{config.micro_batch_size} (micro-batch) x {engine.accumulation_steps} (accumulation); "
        f"packing {data.plan.efficiency:.1%} full; sources: {shares}"
    )


def _memory_report(engine: TrainingEngine, before: int) -> str:
    """Predicted memory (as `beingvl plan` predicts it) next to what this rank used; on a CPU, not
    counting the `before` bytes of the libraries.
    """
    predicted, device = engine.predicted_memory(), engine.ranks.device
    is_cpu, used = device.type == "cpu", peak_memory_bytes(device) - before
    amount = sum(predicted.values()) if is_cpu else device_bytes(predicted)
    report = f"memory of rank 0: predicted {amount / 1e9:.2f} GB, used {used / 1e9:.2f} GB"
    if is_cpu:
        report += (
            f" (freed blocks that the C library keeps included), libraries {before / 1e9:.2f} GB"
        )
    return report
