"""A rewrite of weights that dies in its last tensor: die_in_rewrite SOURCE TARGET"""

import os
import sys

import torch

from beingvl.model.rewrite_weights import rewrite_weights

replace = {"embed": lambda: torch.zeros(10, 4).bfloat16(), "head": lambda: os._exit(9)}
rewrite_weights(*sys.argv[1:3], replace)
