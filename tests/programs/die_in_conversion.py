"""`beingvl ARGV…` that dies after the weights of a conversion are written."""

import os
import sys

from beingvl.commands.main import main
from beingvl.model import convert_llama

convert_llama.generation_config = lambda *_: os._exit(9)
main(sys.argv[1:])
