"""Check on every host of a hostfile that a run can start there, before it starts.

    beingvl preflight --hostfile hostfiles/hostfile-1 --config ds_configs/stage1.json --model base/

Checks all hosts at once over ssh: does it answer; are its versions, code, clock, model and data the
same as the first host's; does it have as many devices as slots; is there enough disk space, also
where the stage offloads to; is rank 0's port free. Then checks the stage's JSON, and that its
mixture and the model's template fit the data, and measures an all-reduce through the real launcher.
Prints a table; the exit code is 1 if a line is red.
"""

from __future__ import annotations

import argparse

from beingvl.commands.options import add_overrides, options_of
from beingvl.commands.parser import FILE


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--hostfile", type=FILE, required=True, help="NAME slots=NUMBER, one line per host")
    stage = "the stage's JSON (ds_configs/): it must be valid, and equal on every host"
    add("--config", dest="stage", help=stage)
    add_overrides(parser)
    add("--model", help="start model; every host must see the same")
    add("--data", help="shard folder; every host must see the same")
    add("--output", help="stage folder to write later; its disk must have enough space")
    add("--master_port", type=int, default=29500, help="rank 0's port")
    add("--seconds", type=float, default=5.0, help="seconds to measure the all-reduce; 0 skips it")


def run(args: argparse.Namespace) -> int:
    # deepspeed is imported here, so that --help is instant.
    from beingvl.launch.check_hosts import format_findings
    from beingvl.launch.preflight import preflight

    findings = preflight(**options_of(args))
    print(format_findings(findings))
    return 1 if any(finding.remedy for finding in findings) else 0
