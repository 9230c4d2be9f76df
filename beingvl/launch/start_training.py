"""Start a training stage on the hosts of a hostfile, through DeepSpeed's launcher.

    beingvl launch --hostfile hostfiles/hostfile-1 [--dry_run] -- --deepspeed_config
    ds_configs/stage1.json --model base/ …

What follows `--` goes to the trainer. In order: read the hostfile; ask its hosts what `beingvl
preflight` asks (all but the all-reduce); write the variables that remote ranks need where DeepSpeed
reads them; run `deepspeed`; take that file away. A hostfile whose only host is localhost needs no
ssh: its GPUs are counted, and where there is none its slots are CPU ranks.

The first SIGINT, SIGTERM or SIGHUP asks the ranks of this run alone to stop after the running step
(exit code 85); the second kills them. DeepSpeed's launcher itself, when signalled, kills every
DeepSpeed run on all hosts.
"""

from __future__ import annotations

import argparse
import importlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from beingvl.errors import InputError
from beingvl.launch.environment import (
    environment_file,
    format_environment,
    remote_environment,
    users_files,
)
from beingvl.launch.host_probe import count_devices
from beingvl.launch.hostfile import Host, is_this_machine_alone, read_hostfile
from beingvl.launch.preflight import Finding, Wanted, check_hosts, ranks_here, run_on, ssh_options
from beingvl.model.start_model import find_start_model
from beingvl.train.failures import EXIT_REQUEUE

TRAINER = "beingvl.train.train_stage"


def run(args: argparse.Namespace) -> int:
    hosts = read_hostfile(args.hostfile)
    alone = is_this_machine_alone(hosts)
    if alone:
        hosts = [Host(hosts[0].name, _prepare_ranks_here(hosts[0], args.num_ranks))]
    elif args.num_ranks is not None:
        raise InputError(
            f"--num_ranks is for this machine alone; {args.hostfile} names {len(hosts)} "
            "hosts: change their slots"
        )
    if not 0 < args.master_port < 1 << 16:
        raise InputError(f"--master_port is {args.master_port}, expected 1 to 65535")
    trainer = args.trainer[1:] if args.trainer[:1] == ["--"] else args.trainer
    address = "127.0.0.1" if alone else args.master_addr
    wanted = _wanted(args.module, args.master_port, trainer)
    if not (args.no_preflight or args.dry_run) or (not address and not args.dry_run):
        answers = _must_be_ready(hosts, wanted, is_quick=args.no_preflight)
        address = address or find_master_address(hosts, answers)
    command = deepspeed_command(hosts, alone, args, address or "ADDRESS_OF_RANK_0", trainer)
    passed = remote_environment(os.environ, users_files())
    if args.dry_run:
        print(
            f"# the ranks' variables\n{format_environment(passed)}# the "
            f"command\n{shlex.join(command)}"
        )
        return 0
    os.environ["PDSH_SSH_ARGS_APPEND"] = shlex.join(ssh_options())
    place = Path(wanted.output or ".")
    place.mkdir(parents=True, exist_ok=True)
    with (
        counted_signals() as signals,
        environment_file(place / f".deepspeed_env.{os.getpid()}", passed),
    ):
        return _run_until_done(
            command, [] if alone else hosts, rank_pattern(args.module, trainer), signals
        )


def _prepare_ranks_here(host: Host, num_ranks: int | None) -> int:
    """How many ranks this machine alone takes; without a GPU they become CPU ranks that share
    the cores.
    """
    found = count_devices()
    ranks = ranks_here(host, num_ranks, found)
    if found["device"] != "GPU":
        os.environ["DS_ACCELERATOR"] = "cpu"
        if not os.environ.get("OMP_NUM_THREADS"):
            os.environ["OMP_NUM_THREADS"] = str(-(-found["num_devices"] // ranks))
    print(
        f"this machine alone: {ranks} ranks on {found['num_devices']} "
        f"{found['device']}s (no hostfile for DeepSpeed)",
        flush=True,
    )
    return ranks


def _wanted(module: str, port: int, trainer: Sequence[str]) -> Wanted:
    """What the trainer's own arguments ask of the hosts."""
    if module != TRAINER:
        return Wanted(port)
    parser = argparse.ArgumentParser(prog="beingvl launch … --")
    importlib.import_module("beingvl.commands.train").add_arguments(parser)
    words = parser.parse_args(list(trainer))
    folders = {str(find_start_model(words.model)): "model", str(words.data): "shards"}
    return Wanted(port, folders, str(words.output), str(words.deepspeed_config), tuple(words.set))


def _must_be_ready(hosts: Sequence[Host], wanted: Wanted, is_quick: bool) -> dict[str, dict]:
    """Raises InputError that names what is wrong on which host. `is_quick`: only that hosts
    answer.
    """
    answers, findings = check_hosts(hosts, wanted)
    red = [row for row in findings if row.remedy]
    if is_quick:
        red = [row for row in red if row.check in ("reachable", "starts python")]
    if red:
        raise InputError("; ".join(_in_words(row) for row in red))
    return answers


def _in_words(row: Finding) -> str:
    return f"{row.host}: {row.check}: {row.seen} ({row.remedy})"


def find_master_address(hosts: Sequence[Host], answers: dict[str, dict]) -> str:
    """Rank 0's address as the other hosts see it, from the addresses of the ssh connections that
    asked them.
    """
    first = answers[hosts[0].name]["server_address"]
    if first and not first.startswith("127.") and first != "::1":
        return first
    for host in hosts[1:]:  # this machine is rank 0's: the others saw where we came from
        if address := answers[host.name]["client_address"]:
            return address
    raise InputError(
        f"the address of {hosts[0].name} for the other hosts is unknown; give --master_addr"
    )


def deepspeed_command(
    hosts: Sequence[Host],
    alone: bool,
    args: argparse.Namespace,
    address: str,
    trainer: Sequence[str],
) -> list[str]:
    """The `deepspeed` command line."""
    launcher = shutil.which(
        "deepspeed", path=f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}"
    )
    if launcher is None:
        raise InputError(
            f"no `deepspeed` beside {sys.executable} nor in PATH; install beingvl's dependencies"
        )
    # a hostfile, even of localhost alone, makes the launcher use ssh; without one it would take
    # /job/hostfile
    if alone:
        where = ["--hostfile", os.devnull, *_devices_here(hosts[0].slots)]
    else:
        if shutil.which("pdsh") is None:
            raise InputError(
                "`pdsh` is not installed here, DeepSpeed starts other hosts with it; install "
                "the package pdsh"
            )
        # with one host DeepSpeed would run here instead, whatever the name; its ssh check knows
        # nothing of ssh options
        where = [
            "--hostfile",
            str(args.hostfile),
            "--force_multi",
            "--no_ssh_check",
            "--master_addr",
            address,
        ]
        trainer = [for_remote_shell(word) for word in trainer]
    return [
        launcher,
        *where,
        "--master_port",
        str(args.master_port),
        "--module",
        args.module,
        *trainer,
    ]


def _devices_here(num_ranks: int) -> list[str]:
    """DeepSpeed ignores CUDA_VISIBLE_DEVICES beside --num_gpus, and would take other people's
    GPUs.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if not visible or os.environ.get("DS_ACCELERATOR") == "cpu":
        return ["--num_gpus", str(num_ranks)]
    numbers = [number.strip() for number in visible.split(",")]
    if not all(number.isdecimal() for number in numbers):
        raise InputError(
            f"CUDA_VISIBLE_DEVICES is {visible!r}, but DeepSpeed takes numbers only; write "
            "those of `nvidia-smi -L`"
        )
    return ["--include", f"localhost:{','.join(numbers[:num_ranks])}"]


def for_remote_shell(word: str) -> str:
    """A word that comes back as it is behind DeepSpeed's quoting, which puts words with spaces
    between double quotes and escapes those in them, and the remote shell.
    """
    if " " in word:
        return re.sub(r"([\\$`])", r"\\\1", word)
    return shlex.quote(word)


@contextmanager
def counted_signals() -> Iterator[list[int]]:
    """Collects SIGINT, SIGTERM, SIGUSR1 and SIGHUP in a list, instead of dying of them."""
    signals: list[int] = []

    def on_signal(number: int, frame: object) -> None:
        signals.append(number)
        what = (
            "stop after the running step; once more kills them" if len(signals) == 1 else "end now"
        )
        print(f"beingvl launch: the ranks are asked to {what}", file=sys.stderr, flush=True)

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
    before = {
        number: signal.getsignal(number)
        for number in numbers
        if signal.getsignal(number) is not signal.SIG_IGN
    }  # nohup
    for number in before:
        signal.signal(number, on_signal)
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _run_until_done(
    command: list[str], hosts: Sequence[Host], pattern: str, signals: list[int]
) -> int:
    """Run the launcher in a session of its own, so that signals come to us and reach this run's
    ranks only.

    A rank that is asked before it listens dies of it: nothing is lost, and the exit code is 85 all
    the same.
    """
    launcher = subprocess.Popen(command, start_new_session=True)
    is_told = False
    while launcher.poll() is None and len(signals) < 2:
        if signals and not is_told:  # asked until there is a rank to ask
            is_told = signal_ranks(hosts, "USR1", pattern)
        with suppress(subprocess.TimeoutExpired):
            launcher.wait(timeout=0.5)
    if len(signals) > 1:
        signal_ranks(hosts, "KILL", pattern)
        with suppress(ProcessLookupError):
            os.killpg(launcher.pid, signal.SIGKILL)
    code = launcher.wait()
    if is_told and code and len(signals) == 1:
        return EXIT_REQUEUE
    return code if code >= 0 else 128 - code


def rank_pattern(module: str, trainer: Sequence[str]) -> str:
    """A regular expression for pkill that this run's ranks match, and neither launchers nor the
    pkill's own shell.
    """
    tail = " ".join(trainer)
    return (
        f"[{module[0]}]{re.escape(module[1:])} --local_rank=[0-9]+ {re.escape(tail)}".replace(
            "\\ ", " "
        )
        + "$"
    )


def signal_ranks(hosts: Sequence[Host], name: str, pattern: str) -> bool:
    """Signal the ranks on the given hosts over ssh, or here when there is no host; False when no
    rank was found.

    USR1 goes to one host only: one rank's wish to stop is everybody's, and a second one could meet
    a rank that is just leaving.
    """
    words = ["pkill", f"-{name}", "-f", "--", pattern]
    if not hosts:
        return subprocess.run(words).returncode == 0
    is_found = False
    for host in hosts:
        is_found |= run_on(host.name, shlex.join(words), seconds=20).returncode == 0
        if is_found and name == "USR1":
            break
    return is_found


if __name__ == "__main__":
    from beingvl.commands.main import main

    sys.exit(main(["launch", *sys.argv[1:]]))
