"""The training command with disks that cannot be offloaded to.

refused_disks WORK
"""

import json
import os
import sys

from beingvl.commands.main import main

if __name__ == "__main__":
    work = sys.argv[1]
    for path, search in (("missing", None), ("/proc", None), (work, "/nowhere")):
        os.environ["PATH"] = search or os.environ["PATH"]
        words = ["--deepspeed_config", f"{work}/all.json", "--model", f"{work}/base"]
        words += ["--data", f"{work}/shards", "--output", f"{work}/refused"]
        offload = json.dumps({"device": "nvme", "nvme_path": path})
        words += ["--set", f"zero_optimization.offload_optimizer={offload}"]
        print("exit code", main(["train", *words]), flush=True)
