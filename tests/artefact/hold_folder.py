"""Owns a folder until it is killed; with --turn for a moment.

hold_folder FOLDER [GROUP | --turn]
"""

import sys
import time
from pathlib import Path

from beingvl.artefact import owner
from beingvl.errors import InputError

if __name__ == "__main__":
    folder, group = Path(sys.argv[1]), (sys.argv[2:] or [None])[0]
    if group == "--turn":
        with owner.in_turn(folder):
            sys.exit(0)
    owner.BEAT_SECONDS, owner.PATIENCE_SECONDS = 0.2, 0.5
    try:
        with owner.owned(folder, group):
            print("owned", flush=True)
            time.sleep(600)
    except InputError as error:
        print(error, flush=True)
        sys.exit(2)
