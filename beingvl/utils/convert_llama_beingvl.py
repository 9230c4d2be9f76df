"""Being-VL-0.5's name for `beingvl convert`; also a script that needs no installation."""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    from beingvl.commands.main import main

    sys.exit(main(["convert", *sys.argv[1:]]))
