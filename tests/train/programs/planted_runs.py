"""The training command with something planted, three times.

planted_runs WORK
"""

import os
import signal
import sys

from beingvl.commands.main import main
from beingvl.train import run_stage
from beingvl.train.engine import TrainingEngine
from tests.train.planted import cut_gradient

LEAKED = "model.layers.3.mlp.up_proj.weight"
work = sys.argv[1]
build, forward = run_stage.build_engine, TrainingEngine.forward
step, local_state = TrainingEngine.step, TrainingEngine.local_state
step_calls, forward_calls = [], []


def run(name, config, *settings):
    words = ["--deepspeed_config", f"{work}/{config}.json", "--model", f"{work}/base"]
    words += ["--data", f"{work}/shards", "--output", f"{work}/{name}", "--set", *settings]
    print(f"{name}: exit code {main(['train', *words])}", flush=True)


def leaking_step(self, learning_rate):
    step_calls.append(learning_rate)
    if len(step_calls) == self.accumulation_steps + 1:  # the second step, which is the last
        os.kill(os.getpid(), signal.SIGTERM)
    result = step(self, learning_rate)
    if result:
        self._partitions.held_weights(LEAKED).view(-1)[:32] += 1e-6
    return result


def spiking_forward(self, batch):
    forward_calls.append(batch)
    is_spike = -(-len(forward_calls) // self.accumulation_steps) == 25
    return forward(self, batch) * (3 if is_spike else 1)


def state_during_a_signal(self, copy=False):
    os.kill(os.getpid(), signal.SIGUSR1)
    return local_state(self, copy)


if __name__ == "__main__":
    TrainingEngine.step = leaking_step
    run("whole-leak", "rows", "beingvl.checkpoint_every_steps=0")
    TrainingEngine.step = step

    run_stage.build_engine = lambda *args, **kwargs: cut_gradient(build(*args, **kwargs))
    run("whole-cut", "all", "zero_optimization.stage=2")
    run_stage.build_engine = build

    TrainingEngine.forward = spiking_forward
    TrainingEngine.local_state = state_during_a_signal
    often = ["beingvl.log_every_steps=10", "beingvl.checkpoint_every_steps=28"]
    run("whole-spike", "all", "beingvl.epochs=6", *often)
