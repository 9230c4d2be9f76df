"""Two hosts that write into one folder of a network disk: sshfs, whose errors and caches are its
own. One host is this machine under another name, with a mount of its own.
"""

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from beingvl.artefact.manifest import verify_folder
from beingvl.artefact.owner import LEASE_SECONDS, OWNER
from tests.faults.test_two_runs import inputs_of
from tests.launch.two_hosts import require
from tests.launcher import ENVIRONMENT, free_port, log_of, start
from tests.tiny import stage_fields, write_inputs

pytestmark = [pytest.mark.slow, pytest.mark.needs_root]

HOLD = Path(__file__).parents[1] / "artefact" / "hold_folder.py"
OTHER_HOST = ["unshare", "--uts", "sh", "-c", 'hostname other && exec "$@"', "sh"]


@pytest.fixture(scope="module")
def disks(tmp_path_factory) -> Iterator[tuple[Path, Path]]:
    """Two mounts of one folder."""
    require("sshd", "ssh", "sshfs")
    folder, port = tmp_path_factory.mktemp("network"), free_port()
    for name in ("host", "key"):
        words = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)]
        subprocess.run(words, check=True)
    Path("/run/sshd").mkdir(exist_ok=True)
    settings = {
        "Port": port,
        "ListenAddress": "127.0.0.1",
        "HostKey": folder / "host",
        "AuthorizedKeysFile": folder / "key.pub",
        "StrictModes": "no",
        "PidFile": "none",
        "Subsystem": "sftp internal-sftp",
    }
    text = "".join(f"{name} {value}\n" for name, value in settings.items())
    (folder / "sshd_config").write_text(text)
    with ExitStack() as stack:
        server = subprocess.Popen(["/usr/sbin/sshd", "-D", "-e", "-f", folder / "sshd_config"])
        stack.callback(server.wait)
        stack.callback(server.terminate)
        (folder / "store").mkdir()
        options = f"port={port},IdentityFile={folder / 'key'},StrictHostKeyChecking=no"
        options += ",UserKnownHostsFile=/dev/null"
        for name in ("one", "two"):
            (folder / name).mkdir()
            words = ["sshfs", f"root@127.0.0.1:{folder / 'store'}", str(folder / name)]
            deadline = time.monotonic() + 30  # sshd may still be starting
            while subprocess.run([*words, "-o", options]).returncode:
                assert time.monotonic() < deadline
                time.sleep(0.2)
            stack.callback(subprocess.run, ["umount", "--lazy", str(folder / name)], check=True)
        yield folder / "one", folder / "two"


def hold(folder: Path, other_host: bool) -> subprocess.Popen[str]:
    words = [*(OTHER_HOST if other_host else []), sys.executable, str(HOLD), str(folder)]
    return subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT)


def said(process: subprocess.Popen[str]) -> str:
    """Its answer; the question before it is asked when the owner seems to be on another host."""
    assert process.stdout
    return next((line for line in process.stdout if "is it still alive?" not in line), "").strip()


def end(*processes: subprocess.Popen[str]) -> None:
    for process in processes:
        process.kill()
        process.wait()


def test_one_of_six_starts_on_two_hosts_owns_the_folder(disks) -> None:
    for number in range(5):
        folders = [disk / f"race-{number}" for disk in disks] * 3
        started = [hold(folder, folder.parent == disks[1]) for folder in folders]
        found = [said(process) for process in started]
        assert found.count("owned") == 1, found
        assert all("is in use by" in line for line in found if line != "owned"), found
        index = found.index("owned")
        end(*started)
        again = hold(folders[index], folders[index].parent == disks[1])  # the same host sees it die
        began = time.monotonic()
        assert said(again) == "owned" and time.monotonic() - began < LEASE_SECONDS / 2
        end(again)


def test_the_folder_of_a_host_that_died_is_taken_after_a_while(disks) -> None:
    first = hold(disks[1] / "left", True)
    assert said(first) == "owned"
    end(first)
    began = time.monotonic()
    second = hold(disks[0] / "left", False)
    assert said(second) == "owned" and time.monotonic() - began > LEASE_SECONDS / 2
    end(second)


def test_of_two_trainings_on_two_mounts_one_wins(disks, tmp_path) -> None:
    work = write_inputs(tmp_path / "work", all=stage_fields(epochs=8))
    outputs = [disk / "out" for disk in disks]
    started = [
        start(2, *inputs_of(work, output), f"beingvl.seed={seed}")
        for seed, output in enumerate(outputs)
    ]
    codes = [launcher.wait(timeout=300) for launcher in started]
    assert sorted(codes) == [0, 2], log_of(outputs[0])[-3000:]  # the log of both
    won = codes.index(0)
    assert verify_folder(outputs[won] / "final").details["identity"]["seed"] == won
    assert not (outputs[won] / OWNER).exists()
