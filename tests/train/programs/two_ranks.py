"""Two ranks in one process, of which the second stands still in the end; a stall ends the process.

two_ranks FOLDER STALL_TIMEOUT_SECONDS
"""

import sys
import time
from pathlib import Path

from beingvl.train.phases import Phases

if __name__ == "__main__":
    folder, timeout = Path(sys.argv[1]), float(sys.argv[2])
    with Phases(folder, 0, 2, timeout) as waiting, Phases(folder, 1, 2, timeout) as working:
        for phase in ("communication", "forward", "check"):
            waiting.enter(7, phase)
            working.enter(7, phase)
        waiting.enter(7, "communication")  # the second of this step
        for _ in range(8):  # batches, twice the timeout, none longer than a quarter of it
            time.sleep(timeout / 4)
            working.advance()
        print("still waiting", flush=True)
        time.sleep(60)
