"""`beingvl ARGUMENTS…`, which gets a signal in its NUMBERth step.

stop_in_step NUMBER ARGUMENTS…
"""

import os
import signal
import sys

from beingvl.commands.main import main
from beingvl.train.engine import TrainingEngine

step, number, steps = TrainingEngine.step, int(sys.argv[1]), []


def stopping_step(self, learning_rate):
    result = step(self, learning_rate)
    steps.extend([result] if result else [])
    if result and len(steps) == number:
        os.kill(os.getpid(), signal.SIGTERM)
    return result


if __name__ == "__main__":
    TrainingEngine.step = stopping_step
    sys.exit(main(sys.argv[2:]))
