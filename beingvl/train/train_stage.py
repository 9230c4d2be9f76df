"""[6] Train one stage: start model + shards + stage JSON -> checkpoints and final/.

Started by a launcher on every rank, for example
  deepspeed --num_gpus 2 --module beingvl.train.train_stage --deepspeed_config ds_configs/stage1.json \\
            --model base/ --data shards/ --output stage-1/ [--set beingvl.epochs=1 …]
or alone, as a world of one rank, with `beingvl train`.

Started again with the same arguments it resumes from the newest complete checkpoint; a finished stage is left alone. SIGTERM,
SIGUSR1 and SIGINT end it after the running step with a checkpoint and exit code 85 ("requeue me").
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from beingvl.data.arrow_shards import ShardReader
    from beingvl.data.loader import TrainingData
    from beingvl.manifest import Manifest
    from beingvl.train.engine import Ranks, TrainingEngine
    from beingvl.train.loop import Progress
    from beingvl.train.probe import Probe
    from beingvl.train.stage_config import StageConfig

EXIT_REQUEUE = 85

# Keys of the block "beingvl" that change neither a sample nor an update, so that a resumed run may change them.
SAME_RESULT = {
    "activation_checkpointing",
    "loss_chunk_tokens",
    "checkpoint_every_steps",
    "keep_last",
    "log_every_steps",
    "tensorboard",
    "max_skipped_steps",
    "stall_timeout_seconds",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--deepspeed_config", type=Path, required=True, help="the stage's JSON (ds_configs/)")
    parser.add_argument("--model", type=Path, required=True, help="start model: base/, or the previous stage's folder")
    parser.add_argument("--data", type=Path, required=True, help="shard folder of build-shards")
    parser.add_argument("--output", type=Path, required=True, help="stage folder: checkpoints/, metrics.jsonl, final/")
    parser.add_argument("--log_dir", type=Path, help="TensorBoard folder (default: OUTPUT/tensorboard)")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="override keys of the JSON")
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)  # DeepSpeed's launcher passes it


def run(args: argparse.Namespace) -> int:
    from beingvl.data.arrow_shards import ShardReader
    from beingvl.manifest import is_complete, join_lineages, read_manifest
    from beingvl.train.stage_config import load_stage_config

    config = load_stage_config(args.deepspeed_config, args.set)
    model = find_start_model(args.model)
    model_manifest, shards = read_manifest(model, "model"), ShardReader(args.data)
    lineage = join_lineages({str(model): model_manifest.lineage, str(args.data): shards.manifest.lineage})
    identity = run_identity(config, model_manifest, shards.manifest, lineage)
    final = args.output / "final"
    if is_complete(final):
        from beingvl.train.checkpoint import check_identity

        check_identity(final, read_manifest(final, "model").details.get("identity", {}), identity)
        print(f"{final} is finished already: nothing to do")
        return 0

    from beingvl.train.checkpoint import complete_checkpoints
    from beingvl.train.engine import start_distributed, stop_distributed
    from beingvl.train.hf_folder import write_hf_folder

    stop_requested = _catch_signals()
    ranks = start_distributed(config.beingvl.stall_timeout_seconds)
    finished = _train(args, config, model, shards, identity, ranks, stop_requested)
    stop_distributed()
    if not finished:
        return EXIT_REQUEUE
    if ranks.rank == 0:
        write_hf_folder(model, complete_checkpoints(args.output)[-1], final)
        print(f"{final} is finished: a stock Hugging Face folder, the start model of the next stage", flush=True)
    return 0


def find_start_model(path: Path) -> Path:
    """A model folder, or the `final/` inside a stage folder."""
    from beingvl.manifest import is_complete

    if not is_complete(path) and (path / "final").is_dir():
        return path / "final"
    return path


def run_identity(config: StageConfig, model: Manifest, shards: Manifest, lineage: dict[str, str]) -> dict[str, Any]:
    """What makes two runs the same run: a checkpoint is only resumed by a run of equal identity."""
    from dataclasses import asdict

    block = {key: value for key, value in asdict(config.beingvl).items() if key not in SAME_RESULT}
    block["trainable"] = list(block["trainable"])
    kept = ("train_batch_size", "optimizer", "gradient_clipping", "bf16")
    return {
        "start_model": model.content_hash,
        "shards": shards.content_hash,
        "lineage": lineage,
        **block,
        **{key: config.deepspeed.get(key) for key in kept},
    }


def _train(
    args: argparse.Namespace,
    config: StageConfig,
    model: Path,
    shards: ShardReader,
    identity: dict[str, Any],
    ranks: Ranks,
    stop_requested: Callable[[], bool],
) -> bool:
    """Build data and engine, resume, run the loop. True when the stage is finished."""
    from beingvl.model.param_groups import format_plan
    from beingvl.train.engine import build_engine
    from beingvl.train.loop import num_steps_of, train
    from beingvl.train.metrics import MetricsWriter
    from beingvl.train.probe import Probe

    args.output.mkdir(parents=True, exist_ok=True)
    data = build_data(config, shards)
    engine = build_engine(model, shards.layout, config, ranks)
    if ranks.rank == 0:
        plan = format_plan(engine.plan, config.beingvl.trainable)
        (args.output / "plan.txt").write_text(plan + "\n")
        print(f"{plan}\n{_describe(data, config, engine)}", flush=True)
    probe = Probe.of_shards(shards)
    progress = _resume(args.output, engine, identity, probe)
    save = _saver(args.output, engine, identity, probe, config.beingvl.keep_last)
    num_steps = num_steps_of(data, config)
    with MetricsWriter(args.output, ranks.rank, progress.step, num_steps, config.beingvl.tensorboard, args.log_dir) as metrics:
        finished = train(engine, data, config, progress, metrics, save, stop_requested)
    if ranks.rank == 0 and not finished:
        print(f"stopped by a signal after step {progress.step}; start the same command again to go on", flush=True)
    return finished


def build_data(config: StageConfig, shards: ShardReader) -> TrainingData:
    """The stage's data: mixture, epochs and packing from its JSON."""
    import numpy as np

    from beingvl.data.loader import TrainingData
    from beingvl.data.mixture import Mixture

    block = config.beingvl
    weights = dict(block.mixture)
    if block.mixture_by == "tokens":  # a share of tokens is a share of samples, divided by their mean length
        for name in [name for name in weights if name in shards.sources]:
            weights[name] /= float(np.mean(shards.lengths[shards.source_of == shards.sources.index(name)]))
    mixture = Mixture(shards.source_of, shards.sources, weights, block.seed)
    num_samples = round(block.epochs * mixture.num_samples)
    return TrainingData(
        shards, mixture, num_samples, block.sequence_length, config.sequences_per_step, block.loss_on, block.packing
    )


def _describe(data: TrainingData, config: StageConfig, engine: TrainingEngine) -> str:
    from beingvl.train.loop import num_steps_of

    shares = ", ".join(f"{name} {share:.1%}" for name, share in data.realised_shares().items())
    return (
        f"{num_steps_of(data, config)} steps of {config.sequences_per_step} sequences: {engine.ranks.num_ranks} ranks x "
        f"{config.micro_batch_size} (micro-batch) x {engine.accumulation_steps} (accumulation); packing "
        f"{data.plan.efficiency:.1%} full; sources: {shares}"
    )


def _resume(output: Path, engine: TrainingEngine, identity: dict[str, Any], probe: Probe) -> Progress:
    """Restore the newest complete checkpoint, if there is one, and see that the model answers its probe as before."""
    from beingvl.train.checkpoint import check_identity, complete_checkpoints, read_local_state, read_state
    from beingvl.train.loop import Progress

    checkpoints = complete_checkpoints(output)
    if not checkpoints:
        return Progress()
    state = read_state(checkpoints[-1])
    check_identity(checkpoints[-1], state.identity, identity)
    slices = {name: engine.partition_numel(name) for name in engine.trained_shapes}
    engine.load_local_state(read_local_state(checkpoints[-1], state, engine.ranks.rank, slices), state.num_applied_steps)
    _check_probe(checkpoints[-1], engine, probe)
    if engine.ranks.rank == 0:
        print(f"resumed from {checkpoints[-1]}", flush=True)
    return Progress(step=state.step, num_applied_steps=state.num_applied_steps)


def _check_probe(checkpoint: Path, engine: TrainingEngine, probe: Probe) -> None:
    """Raises RuntimeError when the restored model does not give the logits that the checkpoint stored."""
    from beingvl.train.probe import compare_logits, load_probe

    _, stored = load_probe(checkpoint)
    comparison = compare_logits(stored, engine.logits(probe.input_ids, probe.positions), engine.dtype)
    if not comparison.matches:
        raise RuntimeError(f"{checkpoint} was read, but {comparison.describe()}; remove the folder to resume from an older one")


def _saver(
    output: Path, engine: TrainingEngine, identity: dict[str, Any], probe: Probe, keep_last: int
) -> Callable[[Progress], None]:
    """The function the loop calls to write a checkpoint."""
    from beingvl.train.checkpoint import CheckpointState, checkpoint_folder, delete_old_checkpoints, write_checkpoint
    from beingvl.train.engine import gather_objects
    from beingvl.train.probe import save_probe

    parameters = {
        name: {"shape": list(shape), "slice_elements": engine.partition_numel(name)}
        for name, shape in engine.trained_shapes.items()
    }
    ranks = engine.ranks

    def save(progress: Progress) -> None:
        engine.check_frozen()
        state = CheckpointState(progress.step, progress.num_applied_steps, ranks.num_ranks, identity, parameters)
        logits = engine.logits(probe.input_ids, probe.positions)
        write_checkpoint(
            checkpoint_folder(output, progress.step),
            state,
            engine.local_state(),
            ranks.rank,
            gather=lambda value: gather_objects(value, ranks.num_ranks),
            write_more=lambda folder: save_probe(folder, probe, logits),
        )
        if ranks.rank == 0:
            delete_old_checkpoints(output, keep_last)

    return save


def _catch_signals() -> Callable[[], bool]:
    """From now on a signal only asks to stop; the loop stops after the running step."""
    import signal

    received: list[int] = []
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, lambda number, frame: received.append(number))
    return lambda: bool(received)


if __name__ == "__main__":
    import sys

    from beingvl.cli import main

    sys.exit(main(["train", *sys.argv[1:]]))
