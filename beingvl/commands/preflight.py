"""Ask every host of a hostfile whether a run can start there, before it starts.

    beingvl preflight --hostfile hostfiles/hostfile-1 --config ds_configs/stage1.json --model base/

Asks each host over ssh, all at once: is it there; do its versions, code, clock, model and data
equal the first host's; has it the devices that its slots promise; is there disk space, also where
the stage offloads to; is rank 0's port free. Then checks the stage's JSON, that its mixture and
the model's template fit the data, and measures an all-reduce through the real launcher. Prints a
table; exit code 1 when a row is red.
"""

from __future__ import annotations

import argparse

from beingvl.commands.options import add_overrides, options_of
from beingvl.commands.parser import FILE


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--hostfile", type=FILE, required=True, help="NAME slots=NUMBER, one line per host")
    stage = "the stage's JSON (ds_configs/): it must be accepted, and equal on every host"
    add("--config", dest="stage", help=stage)
    add_overrides(parser)
    add("--model", help="start model; every host must see the same")
    add("--data", help="shard folder; every host must see the same")
    add("--output", help="stage folder that will be written; its disk must have room")
    add("--master_port", type=int, default=29500, help="rank 0's port")
    add("--seconds", type=float, default=5.0, help="seconds to measure the all-reduce; 0 skips it")


def run(args: argparse.Namespace) -> int:
    # deepspeed is imported here, so that --help is instant.
    from beingvl.launch.check_hosts import format_findings
    from beingvl.launch.preflight import preflight

    findings = preflight(**options_of(args))
    print(format_findings(findings))
    return 1 if any(finding.remedy for finding in findings) else 0
