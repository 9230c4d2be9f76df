"""`beingvl ARGV… --help`; fails when that imports something heavy."""

import sys

from beingvl.commands.main import main

HEAVY = {"torch", "transformers", "numba", "deepspeed", "pyarrow", "PIL", "matplotlib"}
try:
    main([*sys.argv[1:], "--help"])
finally:
    assert not HEAVY & set(sys.modules), HEAVY & set(sys.modules)
