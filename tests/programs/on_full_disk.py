"""`beingvl ARGV…` on a disk that takes no file of more than 3000 bytes."""

import resource
import sys

from beingvl.commands.main import main

resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
sys.exit(main(sys.argv[1:]))
