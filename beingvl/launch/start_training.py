"""Start a training stage on the hosts of a hostfile, through DeepSpeed's launcher.

    beingvl launch --hostfile hostfiles/hostfile-1 [--dry_run] -- --deepspeed_config ds_configs/stage1.json --model base/ …

What follows `--` goes to the trainer. In order: read the hostfile; ask its hosts what `beingvl preflight` asks (all but the
all-reduce); write the variables that remote ranks need where DeepSpeed reads them; run `deepspeed`; take that file away. A
hostfile whose only host is localhost needs no ssh: its GPUs are counted, and where there is none its slots are CPU ranks.

The first SIGINT, SIGTERM or SIGHUP asks the ranks of this run alone to stop after the running step (exit code 85); the second
kills them. DeepSpeed's launcher itself, when signalled, kills every DeepSpeed run on all hosts.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from beingvl.errors import InputError
from beingvl.launch.environment import environment_file, format_environment, remote_environment
from beingvl.launch.host_probe import count_devices
from beingvl.launch.hostfile import THIS_MACHINE, Host, is_this_machine_alone, read_hostfile
from beingvl.launch.preflight import Finding, Wanted, check_hosts, run_on, ssh_options

TRAINER = "beingvl.train.train_stage"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--hostfile", type=Path, required=True, help="NAME slots=NUMBER, one line a host; the first is rank 0's")
    parser.add_argument("--num_ranks", type=int, help="on this machine alone: ranks, instead of all GPUs or the hostfile's slots")
    parser.add_argument("--master_addr", help="rank 0's address (default: the one by which ssh reached the first host)")
    parser.add_argument("--master_port", type=int, default=29500, help="rank 0's port; each run on a host needs its own")
    parser.add_argument("--module", default=TRAINER, help=argparse.SUPPRESS)
    parser.add_argument("--no_preflight", action="store_true", help="start without asking the hosts first")
    parser.add_argument("--dry_run", action="store_true", help="print the command and the ranks' variables; start nothing")
    parser.add_argument("trainer", nargs=argparse.REMAINDER, help="-- and the trainer's arguments")


def run(args: argparse.Namespace) -> int:
    hosts = read_hostfile(args.hostfile)
    alone = is_this_machine_alone(hosts)
    if alone:
        hosts = [Host(hosts[0].name, _ranks_here(hosts[0], args.num_ranks))]
    elif args.num_ranks:
        raise InputError(f"--num_ranks is for this machine alone; {args.hostfile} names {len(hosts)} hosts: change their slots")
    trainer = args.trainer[1:] if args.trainer[:1] == ["--"] else args.trainer
    address = "127.0.0.1" if alone else args.master_addr
    if not (args.no_preflight or args.dry_run) or (not address and not args.dry_run):
        answers = _must_be_ready(hosts, _wanted(args.master_port, trainer), is_quick=args.no_preflight)
        address = address or find_master_address(hosts, answers)
    command = deepspeed_command(hosts, alone, args, address or "ADDRESS_OF_RANK_0", trainer)
    passed = remote_environment(os.environ, (Path.cwd(), Path.home()))
    if args.dry_run:
        print(f"# the ranks' variables\n{format_environment(passed)}# the command\n{shlex.join(command)}")
        return 0
    os.environ["PDSH_SSH_ARGS_APPEND"] = shlex.join(ssh_options())
    place = Path(_value_of(trainer, "--output") or ".")
    place.mkdir(parents=True, exist_ok=True)
    with environment_file(place / f".deepspeed_env.{os.getpid()}", passed):
        return _run_until_done(command, hosts, alone, args.module, trainer)


def _ranks_here(host: Host, num_ranks: int | None) -> int:
    """Ranks on this machine alone; without a GPU it also makes them CPU ranks that share the cores."""
    found = count_devices()
    if found["device"] == "GPU":
        if num_ranks and num_ranks > found["num_devices"]:
            raise InputError(f"{num_ranks} ranks asked for, this machine has {found['num_devices']} GPUs; ask for fewer")
        if not num_ranks and host.name not in THIS_MACHINE and host.slots > found["num_devices"]:
            raise InputError(f"{host.name} has slots={host.slots} but {found['num_devices']} GPUs; lower its slots")
        return num_ranks or (found["num_devices"] if host.name in THIS_MACHINE else host.slots)
    ranks = num_ranks or host.slots
    os.environ["DS_ACCELERATOR"] = "cpu"
    if not os.environ.get("OMP_NUM_THREADS"):
        os.environ["OMP_NUM_THREADS"] = str(-(-found["num_devices"] // ranks))
    return ranks


def _value_of(words: Sequence[str], option: str) -> str | None:
    for number, word in enumerate(words):
        if word == option and number + 1 < len(words):
            return words[number + 1]
        if word.startswith(option + "="):
            return word.partition("=")[2]
    return None


def _wanted(port: int, trainer: Sequence[str]) -> Wanted:
    from beingvl.train.train_stage import find_start_model

    model, data = _value_of(trainer, "--model"), _value_of(trainer, "--data")
    folders = {**({str(find_start_model(Path(model))): "model"} if model else {}), **({data: "shards"} if data else {})}
    return Wanted(port, folders, _value_of(trainer, "--output"))


def _must_be_ready(hosts: Sequence[Host], wanted: Wanted, is_quick: bool) -> dict[str, dict]:
    """Raises InputError that names what is wrong on which host. `is_quick`: only that hosts answer."""
    answers, findings = check_hosts(hosts, wanted)
    local = is_this_machine_alone(hosts)
    red = [row for row in findings if row.remedy and not (local and row.check == "slots")]
    if is_quick:
        red = [row for row in red if row.check in ("reachable", "starts python")]
    if red:
        raise InputError("; ".join(_in_words(row) for row in red))
    return answers


def _in_words(row: Finding) -> str:
    return f"{row.host}: {row.check}: {row.seen} ({row.remedy})"


def find_master_address(hosts: Sequence[Host], answers: dict[str, dict]) -> str:
    """Rank 0's address as the other hosts see it, from the addresses of the ssh connections that asked them."""
    first = answers[hosts[0].name]["server_address"]
    if first and not first.startswith("127.") and first != "::1":
        return first
    for host in hosts[1:]:  # this machine is rank 0's: the others saw where we came from
        if address := answers[host.name]["client_address"]:
            return address
    raise InputError(f"the address of {hosts[0].name} for the other hosts is unknown; give --master_addr")


def deepspeed_command(
    hosts: Sequence[Host], alone: bool, args: argparse.Namespace, address: str, trainer: Sequence[str]
) -> list[str]:
    """The `deepspeed` command line."""
    launcher = shutil.which("deepspeed", path=f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}")
    if launcher is None:
        raise InputError(f"no `deepspeed` beside {sys.executable} nor in PATH; install beingvl's dependencies")
    if alone:  # a hostfile, even of localhost alone, makes the launcher use ssh; without one it would take /job/hostfile
        where = ["--hostfile", os.devnull, "--num_gpus", str(hosts[0].slots)]
    else:
        if shutil.which("pdsh") is None:
            raise InputError("`pdsh` is not installed here, DeepSpeed starts other hosts with it; install the package pdsh")
        # with one host DeepSpeed would run here instead, whatever the name; its ssh check knows nothing of ssh options
        where = ["--hostfile", str(args.hostfile), "--force_multi", "--no_ssh_check", "--master_addr", address]
    return [launcher, *where, "--master_port", str(args.master_port), "--module", args.module, *trainer]


def _run_until_done(command: list[str], hosts: Sequence[Host], alone: bool, module: str, trainer: Sequence[str]) -> int:
    """Run the launcher in a session of its own, so that signals come to us and reach this run's ranks only."""
    launcher = subprocess.Popen(command, start_new_session=True)
    pattern = rank_pattern(module, trainer)
    asked: list[int] = []

    def on_signal(number: int, frame: object) -> None:
        asked.append(number)
        name = "USR1" if len(asked) == 1 else "KILL"
        what = "stop after the running step; once more kills them" if name == "USR1" else "end now"
        print(f"beingvl launch: the ranks are asked to {what}", file=sys.stderr, flush=True)
        signal_ranks([] if alone else hosts, name, pattern)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup
            signal.signal(number, on_signal)
    code = launcher.wait()
    return code if code >= 0 else 128 - code


def rank_pattern(module: str, trainer: Sequence[str]) -> str:
    """A regular expression for pkill that this run's ranks match, and neither launchers nor the pkill's own shell."""
    tail = " ".join(trainer)
    return f"[{module[0]}]{re.escape(module[1:])} --local_rank=[0-9]+ {re.escape(tail)}".replace("\\ ", " ") + "$"


def signal_ranks(hosts: Sequence[Host], name: str, pattern: str) -> None:
    """Signal the ranks on the given hosts over ssh, or here when there is no host.

    USR1 goes to one host only: one rank's wish to stop is everybody's, and a second one could meet a rank that is just leaving.
    """
    words = ["pkill", f"-{name}", "-f", "--", pattern]
    if not hosts:
        subprocess.run(words)
    for host in hosts:
        if run_on(host.name, shlex.join(words), seconds=20).returncode == 0 and name == "USR1":
            return


if __name__ == "__main__":
    from beingvl.cli import main

    sys.exit(main(["launch", *sys.argv[1:]]))
