"""Each argument is a command line of `beingvl`; prints its exit code and the CPU seconds until
then. Fails when one of them imports torch.
"""

import resource
import shlex
import sys

from beingvl.commands.main import main

for line in sys.argv[1:]:
    code = main(shlex.split(line))
    assert "torch" not in sys.modules, line
    used = resource.getrusage(resource.RUSAGE_SELF)
    print(code, used.ru_utime + used.ru_stime)
