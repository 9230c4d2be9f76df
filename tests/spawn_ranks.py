"""Start NUM_RANKS processes of a module on this machine with the variables of a rank, as `srun`
does; standard library only.

    python tests/spawn_ranks.py NUM_RANKS PORT MODULE [arguments]

Three imports of DeepSpeed quicker than its launcher, which the tests of launching and of the whole
line go through: ranks are forks of a warm parent (warm_python.py). Like there, the first rank that
fails ends the others, and its exit code is this program's.
"""

import os
import subprocess
import sys
import time

PYTHON = [sys.executable, "-I", "-S", os.path.join(os.path.dirname(__file__), "warm_python.py")]


def main() -> int:
    num_ranks, port, module, *arguments = sys.argv[1:]
    ranks = []
    for rank in range(int(num_ranks)):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": num_ranks}
        environment = {**os.environ, **place, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        words = [*PYTHON, "-u", "-m", module, f"--local_rank={rank}", *arguments]
        ranks.append(subprocess.Popen(words, env=environment))
    while None in (codes := [rank.poll() for rank in ranks]) and not any(codes):
        time.sleep(0.05)
    for rank in ranks:
        rank.terminate()
    last = [rank.wait() for rank in ranks]
    return next((code for code in (*codes, *last) if code), 0) % 256


if __name__ == "__main__":
    sys.exit(main())
