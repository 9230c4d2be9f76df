"""One step of a stage, then a leak into a frozen tensor on one rank; says who catches it.

leak WORK ZERO_STAGE
"""

import json
import sys
from pathlib import Path

from beingvl.data.arrow_shards import ShardReader
from beingvl.data.stage_data import data_of
from beingvl.stage.stage_config import load_stage_config
from beingvl.train.engine import build_engine, start_distributed
from beingvl.train.failures import FreezerError

RULES = [{"match": "visual_rows"}, {"match": "layers[:2]"}, {"match": ".*", "train": False}]


def main() -> None:
    work, stage, advanced = Path(sys.argv[1]), sys.argv[2], []
    settings = [f"zero_optimization.stage={stage}", f"beingvl.trainable={json.dumps(RULES)}"]
    config = load_stage_config(work / "all.json", settings)
    shards, ranks = ShardReader(work / "shards"), start_distributed()
    engine = build_engine(
        work / "base", shards.layout, config, ranks, advance=lambda: advanced.append(1)
    )
    num_frozen = len(engine.plan) - len(engine.trained_shapes)
    assert len(advanced) == len(engine.plan) + num_frozen  # loaded; hashed
    engine.check_frozen()
    assert len(advanced) == len(engine.plan) + 2 * num_frozen
    frozen = [planned.name for planned in engine.plan if not planned.is_trained]
    assert not any(engine._parameters[name].requires_grad for name in frozen)
    before = engine.hash_trained()
    batch = data_of(config, shards).micro_batch(0, 0, 0, 1, 4)
    advanced.clear()
    engine.evaluate(batch)
    assert len(advanced) == 1
    for micro_step in range(engine.accumulation_steps):
        engine.backward(engine.forward(batch).mean())
        engine.step(1e-3 if micro_step == engine.accumulation_steps - 1 else None)
    try:
        engine.check_trained(before)
        engine.check_frozen()
        print("all in order")
        if ranks.rank == ranks.num_ranks - 1:  # one row of a frozen matrix, on one rank
            held = engine._partitions.held_weights("model.layers.3.mlp.up_proj.weight")
            held.view(-1)[:32] += 1e-6
        engine.check_frozen()
    except FreezerError as error:
        print("caught:", error)


if __name__ == "__main__":
    main()
