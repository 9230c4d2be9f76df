"""Two hosts on one machine: network namespaces joined by a veth pair, an sshd in each. Needs
root and the packages below.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

PACKAGES = {
    "sshd": "openssh-server",
    "sshfs": "sshfs",
    "ssh": "openssh-client",
    "pdsh": "pdsh",
    "ip": "iproute2",
    "pkill": "procps",
    "slurmctld": "slurm-wlm",
    "munged": "munge",
}
SBIN = "/usr/sbin:/sbin"


def require(*programs: str) -> None:
    """Raises AssertionError that names the apt packages to install: these tests fail, they do
    not skip.
    """
    missing = [
        name for name in programs if shutil.which(name, path=f"{os.environ['PATH']}:{SBIN}") is None
    ]
    packages = " ".join(sorted({PACKAGES[name] for name in missing}))
    assert not missing, (
        f"the programs {', '.join(missing)} are missing; install them with: apt-get "
        f"install {packages}"
    )
    assert os.geteuid() == 0, "network namespaces, sshd and Slurm's daemons need root"


@dataclass
class TwoHosts:
    """Names are addresses; commands run on the first host."""

    names: tuple[str, str]
    namespaces: tuple[str, str]
    environment: Mapping[str, str]
    folder: Path

    def start(self, words: list[object], **variables: object) -> subprocess.Popen:
        command = ["ip", "netns", "exec", self.namespaces[0], *[str(word) for word in words]]
        environment = {
            **self.environment,
            **{name: str(value) for name, value in variables.items()},
        }
        return subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def run(self, words: list[object], **variables: object) -> tuple[int, str]:
        process = self.start(words, **variables)
        shown, _ = process.communicate(timeout=240)
        return process.returncode, shown

    def hostfile(self, slots: tuple[int, int] = (1, 1)) -> Path:
        path = self.folder / f"hostfile-{slots[0]}-{slots[1]}"
        path.write_text(
            "".join(
                f"{name} slots={count}\n" for name, count in zip(self.names, slots, strict=True)
            )
        )
        return path

    def processes(self, host: int) -> list[psutil.Process]:
        shown = subprocess.run(
            ["ip", "netns", "pids", self.namespaces[host]],
            capture_output=True,
            text=True,
            check=True,
        )
        found = []
        for word in shown.stdout.split():
            try:
                process = psutil.Process(int(word))
                if process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except psutil.NoSuchProcess:
                continue
        return found

    def training_processes(self) -> list[str]:
        """Command lines of python and pdsh on both hosts: what must not be left behind."""
        lines = []
        for host in (0, 1):
            for process in self.processes(host):
                try:
                    line = " ".join(process.cmdline())
                except psutil.NoSuchProcess:
                    continue
                if "python" in line or line.startswith("pdsh"):
                    lines.append(line)
        return lines

    def wait_until_nothing_runs(self, seconds: float = 30) -> None:
        deadline = time.monotonic() + seconds
        while self.training_processes():
            assert time.monotonic() < deadline, f"left behind: {self.training_processes()}"
            time.sleep(0.2)

    def silence(self, host: int) -> None:
        """From now on the host neither hears nor answers."""
        subprocess.run(
            ["ip", "-n", self.namespaces[host], "link", "set", "bvl0", "down"], check=True
        )

    def reconnect(self, host: int) -> None:
        subprocess.run(["ip", "-n", self.namespaces[host], "link", "set", "bvl0", "up"], check=True)


@contextmanager
def two_hosts(folder: Path, environment: Mapping[str, str]) -> Iterator[TwoHosts]:
    """Build, yield, and take everything away again."""
    require("ip", "sshd", "ssh", "pdsh", "pkill")
    tag = str(os.getpid())
    spaces, names = (f"bvl{tag}a", f"bvl{tag}b"), ("10.231.77.1", "10.231.77.2")
    _make_keys(folder)
    ssh = (
        f"-i {folder}/key -p 2231 -o StrictHostKeyChecking=no -o "
        "UserKnownHostsFile=/dev/null -o LogLevel=ERROR"
    )
    servers = []
    try:
        for number, space in enumerate(spaces):
            _ip("netns", "add", space)
            _ip("-n", space, "link", "set", "lo", "up")
            if number == 0:
                _ip("-n", space, "link", "add", "bvl0", "type", "veth", "peer", "name", "bvl1")
            else:
                _ip("-n", spaces[0], "link", "set", "bvl1", "netns", space)
                _ip("-n", space, "link", "set", "bvl1", "name", "bvl0")
        for space, name in zip(spaces, names, strict=True):
            _ip("-n", space, "addr", "add", f"{name}/24", "dev", "bvl0")
            _ip("-n", space, "link", "set", "bvl0", "up")
            command = [
                "ip",
                "netns",
                "exec",
                space,
                shutil.which("sshd", path=SBIN) or "sshd",
                "-D",
                "-e",
                "-f",
                f"{folder}/sshd_config",
            ]
            with open(folder / f"sshd-{name}.log", "w") as log:
                servers.append(subprocess.Popen(command, stdout=log, stderr=log))
        hosts = TwoHosts(
            names,
            spaces,
            {**environment, "PDSH_SSH_ARGS_APPEND": ssh, "GLOO_SOCKET_IFNAME": "bvl0"},
            folder,
        )
        _wait_for_ssh(hosts, ssh)
        yield hosts
    finally:
        _take_away(spaces, servers)


def _ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True)
    assert done.returncode == 0, f"ip {' '.join(words)}: {done.stderr}"


def _make_keys(folder: Path) -> None:
    for name in ("key", "host_key"):
        subprocess.run(
            ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", f"{folder}/{name}"], check=True
        )
    (folder / "authorized_keys").write_bytes((folder / "key.pub").read_bytes())
    Path("/run/sshd").mkdir(exist_ok=True)
    lines = [
        "Port 2231",
        f"HostKey {folder}/host_key",
        f"AuthorizedKeysFile {folder}/authorized_keys",
        "PidFile none",
    ]
    lines += [
        "StrictModes no",
        "UsePAM no",
        "PasswordAuthentication no",
        "PermitRootLogin prohibit-password",
    ]
    (folder / "sshd_config").write_text("\n".join([*lines, "MaxStartups 100", ""]))


def _wait_for_ssh(hosts: TwoHosts, options: str) -> None:
    deadline = time.monotonic() + 20
    for name in hosts.names:
        while hosts.run(["ssh", *options.split(), "-o", "BatchMode=yes", name, "true"])[0] != 0:
            assert time.monotonic() < deadline, "".join(
                path.read_text() for path in hosts.folder.glob("sshd-*.log")
            )
            time.sleep(0.2)


def _take_away(spaces: tuple[str, str], servers: list[subprocess.Popen]) -> None:
    for server in servers:
        server.terminate()
    for space in spaces:
        shown = subprocess.run(
            ["ip", "netns", "pids", space], capture_output=True, text=True
        ).stdout
        for word in shown.split():
            try:
                os.kill(int(word), signal.SIGKILL)
            except ProcessLookupError:
                continue
        subprocess.run(["ip", "netns", "delete", space], capture_output=True)
    for server in servers:
        server.wait(timeout=10)
