"""`beingvl ARGUMENTS…`, with one trained tensor that gets no gradient."""

import sys
from typing import Any

from beingvl.commands.main import main
from beingvl.train import run_stage
from tests.train.planted import cut_gradient

build = run_stage.build_engine


def build_and_cut(*args: Any, **kwargs: Any) -> Any:
    return cut_gradient(build(*args, **kwargs))


if __name__ == "__main__":
    run_stage.build_engine = build_and_cut
    sys.exit(main(sys.argv[1:]))
