"""`python -m beingvl COMMAND …`, the same as the console script `beingvl`."""

import sys

from beingvl.commands.main import main

sys.exit(main())
