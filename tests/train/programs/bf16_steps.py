"""Three steps in bf16 under every ZeRO stage, of which the second is not a number.

bf16_steps WORK
"""

import math
import sys
from pathlib import Path

import torch

from beingvl.data.arrow_shards import ShardReader
from beingvl.data.stage_data import data_of
from beingvl.model.extended_vocab import stored_slice
from beingvl.model.weight_files import WeightFolder
from beingvl.stage.stage_config import load_stage_config
from beingvl.train.engine import build_engine, start_distributed

work = Path(sys.argv[1])
base, shards = work / "base", ShardReader(work / "shards")
layout, weights = shards.layout, WeightFolder(base)


def state_of(engine):
    held = {name: engine._partitions.held_weights(name).clone() for name in engine.trained_shapes}
    return {**held, **dict(engine.local_state(copy=True))}


def step(engine, factor):
    batch = data_of(engine.config, shards).micro_batch(0, 0, 0, 1, 1)
    for micro_step in range(engine.accumulation_steps):
        engine.backward(engine.forward(batch).mean() * factor)
        result = engine.step(1e-2 if micro_step == engine.accumulation_steps - 1 else None)
    return result


def check(engine, stage):
    rotary = engine.model.causal_lm.model.rotary_emb
    assert rotary.inv_freq.dtype == torch.float32
    assert torch.equal(rotary.inv_freq, 1 / 10000 ** (torch.arange(0, 8, 2) / 8)), rotary.inv_freq
    for name in engine.trained_shapes:
        stored, rows = stored_slice(name, layout.num_text)
        ((_, _, master),) = engine._partitions.read([name], ["master"])
        assert engine._partitions.held_weights(name).dtype == torch.bfloat16
        assert master.dtype == torch.float32
        expected = weights[stored][rows].reshape(-1).bfloat16().float()
        assert torch.equal(master, expected), (stage, name)
    assert step(engine, 1.0).applied
    before = state_of(engine)
    result = step(engine, float("nan"))
    assert not result.applied and not math.isfinite(result.gradient_norm), (stage, result)
    after = state_of(engine)
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items()), stage
    assert step(engine, 1.0).applied
    stayed = [
        name for name, tensor in state_of(engine).items() if torch.equal(tensor, before[name])
    ]
    assert not stayed, (stage, stayed)


def main() -> None:
    ranks = start_distributed()
    for stage in (1, 2, 3):
        settings = ["bf16.enabled=true", f"zero_optimization.stage={stage}"]
        config = load_stage_config(work / "all.json", settings)
        engine = build_engine(base, layout, config, ranks)
        check(engine, stage)
    # stage 3 allocates them when it is built, whatever goes through them
    buckets = engine._engine.optimizer.ipg_buckets.values()
    num_trained = sum(map(math.prod, engine.trained_shapes.values()))
    assert sum(bucket.buffer.numel() for bucket in buckets) == num_trained
    print("fine")


if __name__ == "__main__":
    main()
