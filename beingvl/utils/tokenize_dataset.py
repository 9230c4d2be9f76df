"""Being-VL-0.5's name for `beingvl tokenize`; also a script that needs no installation.

Without --dataset_name the data set is called MODE_STEM, as there: pt_train of `--mode pt
--json_path train.json`.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    from beingvl.commands.main import main
    from beingvl.commands.tokenize import with_published_name

    sys.exit(main(["tokenize", *with_published_name(sys.argv[1:])]))
