"""Being-VL-0.5's name for `beingvl train-vbpe`; it also runs as a script, without installation."""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    from beingvl.commands.main import main

    sys.exit(main(["train-vbpe", *sys.argv[1:]]))
