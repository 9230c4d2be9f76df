import socket
from pathlib import Path

import pytest

from beingvl.errors import InputError
from beingvl.launch.hostfile import Host, is_this_machine_alone, read_hostfile

HOSTFILES = Path(__file__).parents[2] / "hostfiles"


def write(tmp_path: Path, text: str) -> Path:
    (tmp_path / "hostfile-7").write_text(text)
    return tmp_path / "hostfile-7"


def test_hosts_in_file_order_comments_and_blank_lines_are_skipped(tmp_path) -> None:
    hosts = read_hostfile(
        write(tmp_path, "# two\n\nworker-2 slots=8\n  10.0.0.1\tslots=4   # the old one\n")
    )
    assert hosts == [Host("worker-2", 8), Host("10.0.0.1", 4)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "a slots=8\nb slot=8\n",
            "hostfile-7, line 2: 'b slot=8' is not a host; expected NAME slots=NUMBER",
        ),
        (
            "a slots=8 max_slots=9\n",
            "line 1: 'a slots=8 max_slots=9' is not a host",
        ),  # DeepSpeed's reader takes it
        ("a slots=8x\n", "line 1: 'a slots=8x' is not a host"),  # and this
        ("a slots = 8\n", "is not a host"),
        ("a\n", "line 1: 'a' is not a host"),
        ("a slots=-1\n", "is not a host"),
        ("a,b slots=2\n", "is not a host"),
        ("a slots=0\n", "line 1: 'a slots=0' has no slot"),
        ("a slots=1\n\na slots=2\n", "line 3: 'a slots=2' names a again, first in line 1"),
        ("localhost slots=1\nb slots=1\n", "line 1: 'localhost' among other hosts"),
        ("# nobody\n", "hostfile-7 names no host"),
        ("\x00\xff slots=1\n", "line 1"),
        (
            "\N{BYTE ORDER MARK}a slots=1\n",
            "line 1: '\\ufeffa slots=1' is not a host; the file begins",
        ),
        ("ubuntu@a slots=1\n", "write its name alone, and its user in ~/.ssh/config"),
        (f"a slots={10**20}\n", "has more slots than a host can have"),
    ],
)
def test_every_complaint_names_file_line_and_text(tmp_path, text: str, message: str) -> None:
    with pytest.raises(InputError, match="hostfile-7") as caught:
        read_hostfile(write(tmp_path, text))
    assert message in str(caught.value)


def test_a_named_but_missing_hostfile_is_an_error(tmp_path) -> None:
    with pytest.raises(InputError, match="hostfile-9 does not exist"):
        read_hostfile(tmp_path / "hostfile-9")


def test_this_machine_alone() -> None:
    assert is_this_machine_alone([Host("localhost", 2)]) and is_this_machine_alone(
        [Host(socket.gethostname(), 8)]
    )
    assert not is_this_machine_alone([Host("worker-1", 8)])
    assert not is_this_machine_alone([Host(socket.gethostname(), 8), Host("worker-1", 8)])


def test_the_shipped_hostfiles_are_read_as_deepspeed_reads_them() -> None:
    from deepspeed.launcher.runner import fetch_hostfile

    for path in sorted(HOSTFILES.iterdir()):
        assert {host.name: host.slots for host in read_hostfile(path)} == fetch_hostfile(
            str(path)
        ), path
    assert is_this_machine_alone(read_hostfile(HOSTFILES / "hostfile-0"))
    assert len(read_hostfile(HOSTFILES / "hostfile-1")) == 2
