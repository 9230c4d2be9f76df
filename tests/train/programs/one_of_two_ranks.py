"""Rank 0 of two, the other of which never comes. Its own heartbeats cannot be written, so that in
the files it looks as silent as rank 1 is.

one_of_two_ranks FOLDER STALL_TIMEOUT_SECONDS
"""

import sys
import time
from pathlib import Path

from beingvl.train.phases import Phases

if __name__ == "__main__":
    (Path(sys.argv[1]) / "ranks" / "rank-00000.json").mkdir(parents=True)
    with Phases(Path(sys.argv[1]), 0, 2, float(sys.argv[2])):
        time.sleep(60)
