"""Start a training stage on the hosts of a hostfile, through DeepSpeed's launcher.

    launch        read the hostfile; check its hosts (check_hosts.py); write the variables that
                  remote ranks need where DeepSpeed reads them (environment.py); run `deepspeed`
    Run           what is started where: the command line, and how to find its ranks again
    run_ranks     runs the launcher in its own session; signals reach only this run's ranks

DeepSpeed's launcher itself, when signalled, kills every DeepSpeed run on all hosts.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from beingvl.artefact.files import make_folder
from beingvl.artefact.manifest import read_manifest
from beingvl.errors import InputError
from beingvl.launch.check_hosts import Wanted, check_hosts, hosts_of, run_on, ssh_options
from beingvl.launch.environment import (
    environment_file,
    remote_environment,
    shown,
    users_files,
    without_passed_secrets,
)
from beingvl.launch.host_probe import count_devices
from beingvl.launch.hostfile import Host, is_this_machine_alone
from beingvl.model.start_model import find_start_model
from beingvl.train.failures import EXIT_REQUEUE
from beingvl.train.launchers import RUN_VARIABLE

TRAINER = "beingvl.train.train_stage"


def launch(
    hostfile: Path | str,
    trainer: Mapping[str, Any],
    *,
    num_ranks: int | None = None,
    master_addr: str | None = None,
    master_port: int = 29500,
    no_preflight: bool = False,
    dry_run: bool = False,
) -> int:
    """Train a stage on the hosts of `hostfile`; returns the launcher's exit code, 85 if a signal
    stopped the ranks after a step.

    `trainer` holds the arguments of `beingvl.train` by name: deepspeed_config, model, data, output,
    and optionally log_dir, overrides (a list of KEY=VALUE) and others. If localhost is the only
    host, no ssh is needed; the number of ranks is `num_ranks`, else all GPUs, else the slots.
    `dry_run` prints the command and starts nothing. Raises InputError that names the problem and
    the host.
    """
    hosts = hosts_of(hostfile, num_ranks)
    model = find_start_model(Path(trainer["model"]))
    if model.is_dir():  # this machine may not have it
        read_manifest(model, "model")
    folders = {str(model): "model", str(trainer["data"]): "shards"}
    if trainer.get("validation_data"):
        folders[str(trainer["validation_data"])] = "shards"
    wanted = Wanted(
        master_port,
        folders,
        trainer["output"],
        trainer["deepspeed_config"],
        trainer.get("overrides", ()),
    )
    address = "127.0.0.1" if is_this_machine_alone(hosts) else master_addr
    if not dry_run and (not no_preflight or not address):
        answers = _must_be_ready(hosts, wanted, only_reachable=no_preflight)
        address = address or find_master_address(hosts, answers)
    words = trainer_words(trainer)
    run = Run(Path(hostfile), hosts, TRAINER, words, address or "ADDRESS_OF_RANK_0", master_port)
    if run.is_alone:
        device = count_devices()["device"]
        print(f"this machine alone: {hosts[0].slots} ranks, each on a {device}", flush=True)
    if dry_run:
        variables = shown(remote_environment(run.environment, users_files()))
        print(f"# the ranks' variables\n{variables}# the command\n{shlex.join(run.command)}")
        return 0
    output = Path(trainer["output"])
    is_new = not output.exists()
    make_folder(output)
    named = {**run.environment, RUN_VARIABLE: uuid.uuid4().hex}
    try:
        with counted_signals() as signals, environment_file(output, named) as environment:
            return run_ranks(run, environment, signals)
    finally:
        if is_new:  # rmdir succeeds if it is still empty, because the ranks did not start
            with suppress(OSError):
                output.rmdir()


def trainer_words(trainer: Mapping[str, Any]) -> list[str]:
    """The trainer's command line, from its options by name."""
    words: list[str] = []
    for name, value in trainer.items():
        if value is True:
            words.append(f"--{name}")
        elif isinstance(value, (list, tuple)):
            words += ["--set", *map(str, value)] if value else []  # the overrides
        elif value is not None and value is not False:
            words += [f"--{name}", str(value)]
    return words


def _must_be_ready(hosts: Sequence[Host], wanted: Wanted, only_reachable: bool) -> dict[str, dict]:
    answers, findings = check_hosts(hosts, wanted)
    red = [
        f"{row.host}: {row.check}: {row.seen} ({row.remedy})"
        for row in findings
        if row.remedy and (not only_reachable or row.check in ("reachable", "starts python"))
    ]
    if red:
        raise InputError("; ".join(red))
    return answers


def find_master_address(hosts: Sequence[Host], answers: Mapping[str, Mapping[str, Any]]) -> str:
    """Rank 0's address as others see it, taken from the ssh connections of the check."""
    first = answers[hosts[0].name]["server_address"]
    if first and not first.startswith("127.") and first != "::1":
        return first
    for host in hosts[1:]:  # rank 0 runs on this machine: the others saw our address
        if address := answers[host.name]["client_address"]:
            return address
    raise InputError(
        f"the address of {hosts[0].name} for the other hosts is unknown; give --master_addr"
    )


@dataclass(frozen=True)
class Run:
    """A module that DeepSpeed starts on each host, once per slot."""

    hostfile: Path
    hosts: Sequence[Host]
    module: str
    words: Sequence[str]
    address: str
    port: int

    @property
    def is_alone(self) -> bool:
        return is_this_machine_alone(self.hosts)

    @property
    def environment(self) -> dict[str, str]:
        """The launcher's environment. On this machine alone, CPU ranks share its cores."""
        environment = {**os.environ, "PDSH_SSH_ARGS_APPEND": shlex.join(ssh_options())}
        found = count_devices()
        if self.is_alone and found["device"] != "GPU":
            environment["DS_ACCELERATOR"] = "cpu"
            threads = -(-found["num_devices"] // self.hosts[0].slots)
            environment["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS") or str(threads)
        return environment if self.is_alone else without_passed_secrets(environment)

    @property
    def command(self) -> list[str]:
        """The `deepspeed` command line. Raises InputError if a program it needs is missing."""
        places = f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}"
        launcher = shutil.which("deepspeed", path=places)
        if launcher is None:
            raise InputError(
                f"no `deepspeed` beside {sys.executable} nor in PATH; install beingvl's "
                "dependencies"
            )
        words = list(self.words)
        # any hostfile, even with localhost alone, makes the launcher use ssh; without the option it
        # would read /job/hostfile
        if self.is_alone:
            where = ["--hostfile", os.devnull, *self._devices_here()]
        elif shutil.which("pdsh") is None:
            raise InputError(
                "`pdsh` is not installed here, DeepSpeed starts other hosts with it; install "
                "the package pdsh"
            )
        else:
            # with one host DeepSpeed would run on this machine, whatever the host's name; its ssh
            # check ignores ssh options
            where = ["--hostfile", str(self.hostfile), "--force_multi", "--no_ssh_check"]
            where += ["--master_addr", self.address]
            _refuse_words(Path.cwd(), Path(sys.executable))
            words = [for_remote_shell(word) for word in words]
        where += ["--master_port", str(self.port)]
        return [launcher, "--quiet", *where, "--module", self.module, *words]

    def _devices_here(self) -> list[str]:
        """With --num_gpus DeepSpeed ignores CUDA_VISIBLE_DEVICES and would use others' GPUs."""
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        if not visible or self.environment.get("DS_ACCELERATOR") == "cpu":
            return ["--num_gpus", str(self.hosts[0].slots)]
        numbers = [number.strip() for number in visible.split(",")]
        if not all(number.isdecimal() for number in numbers):
            raise InputError(
                f"CUDA_VISIBLE_DEVICES is {visible!r}, but DeepSpeed takes numbers only; write "
                "those of `nvidia-smi -L`"
            )
        return ["--include", f"localhost:{','.join(numbers[: self.hosts[0].slots])}"]

    def signal_ranks(self, name: str) -> bool:
        """Signal the ranks over ssh, or on this machine; False if no rank was found.

        USR1 goes to one host only: if one rank is asked to stop, all stop, and a second signal
        could hit a rank that is just ending.
        """
        words = ["pkill", f"-{name}", "-f", "--", rank_pattern(self.module, self.words)]
        if self.is_alone:
            return subprocess.run(words).returncode == 0
        is_found = False
        for host in self.hosts:
            is_found |= run_on(host.name, shlex.join(words), seconds=20).returncode == 0
            if is_found and name == "USR1":
                break
        return is_found


def _refuse_words(*paths: Path) -> None:
    """Raises InputError for paths that the remote shell would change: DeepSpeed does not quote the
    working folder and the interpreter.
    """
    for path in paths:
        if found := re.search(r"[\s;&|<>()$`\\\"'*?\[\]{}#~!%]", str(path)):
            raise InputError(
                f"{str(path)!r} has the character {found[0]!r}, which the shells of the other "
                "hosts would not take as part of a name; start from a link to it with a plain name"
            )


def rank_pattern(module: str, words: Sequence[str]) -> str:
    """A regular expression for pkill that matches this run's ranks, but neither launchers nor the
    shell that runs pkill.
    """
    tail = re.escape(" ".join(words))
    pattern = f"[{module[0]}]{re.escape(module[1:])} --local_rank=[0-9]+ {tail}$"
    return pattern.replace("\\ ", " ")


def for_remote_shell(word: str) -> str:
    """Quote a word so that it arrives unchanged after DeepSpeed's quoting and the remote shell.
    DeepSpeed wraps words with spaces in double quotes and escapes double quotes inside.
    """
    if " " in word:
        return re.sub(r"([\\$`])", r"\\\1", word)
    return shlex.quote(word)


@contextmanager
def counted_signals() -> Iterator[list[int]]:
    """Collect SIGINT, SIGTERM, SIGUSR1 and SIGHUP in a list instead of being killed by them."""
    signals: list[int] = []

    def on_signal(number: int, frame: object) -> None:
        signals.append(number)
        what = "end now"
        if len(signals) == 1:
            what = "stop after the running step; a second signal kills them"
        print(f"beingvl launch: the ranks are asked to {what}", file=sys.stderr, flush=True)

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in numbers}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:  # as under nohup
            signal.signal(number, on_signal)
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run_ranks(run: Run, environment: Mapping[str, str], signals: list[int]) -> int:
    """Run the launcher until it ends or a second signal arrives; returns its exit code.

    A signal kills a rank that has not yet installed its handlers: nothing is lost, and the exit
    code is 85 all the same.
    """
    launcher = subprocess.Popen(run.command, env=environment, start_new_session=True)
    end = _end_of(launcher.pid, environment[RUN_VARIABLE])
    with _ended_with_this_process(end):
        is_told = False
        while launcher.poll() is None and len(signals) < 2:
            if signals and not is_told:  # repeat until a rank exists
                is_told = run.signal_ranks("USR1")
            with suppress(subprocess.TimeoutExpired):
                launcher.wait(timeout=0.5)
        if len(signals) > 1:
            run.signal_ranks("KILL")
        is_left = subprocess.run(["sh", "-c", end], stderr=subprocess.DEVNULL).returncode == 0
        code = launcher.wait()
    if is_told and code and len(signals) == 1:
        return EXIT_REQUEUE
    # DeepSpeed's launcher exits with 0 if its pdsh was killed
    return exit_code_of(code) or int(is_left)


def _end_of(group: int, run_name: str) -> str:
    """Shell commands that kill what a launcher leaves on this machine: its process group, and its
    pdsh's ssh connections, which have their own sessions (exit code 0 if there were any). Ranks on
    other hosts end with their connections.
    """
    return f"kill -KILL -{group}; pkill -KILL -f '[{RUN_VARIABLE[0]}]{RUN_VARIABLE[1:]}={run_name}'"


@contextmanager
def _ended_with_this_process(end: str) -> Iterator[None]:
    """Run the shell commands `end` if this process is killed inside the `with` block: a shell waits
    on a pipe whose other end only this process holds.
    """
    words = ["sh", "-c", f"read _ || {{ {end}; }}"]
    guard = subprocess.Popen(words, stdin=subprocess.PIPE, start_new_session=True)
    try:
        yield
    finally:
        guard.communicate(b"\n")


def exit_code_of(code: int) -> int:
    """The exit code as a shell would report it: 128 + the signal that ended a process.

    `code` is Python's, negative for a signal. DeepSpeed's launcher passes that on, and it arrives
    as 256 - the signal. 255 means that an ssh connection failed.
    """
    if 256 - signal.NSIG < code < 255:
        code -= 256
    return code if code >= 0 else 128 - code
