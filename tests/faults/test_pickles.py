"""A few bytes of a pickle ask for gigabytes, or nest without end."""

import pickle
import subprocess
import sys

import pytest

from beingvl.errors import InputError
from beingvl.vbpe import published
from beingvl.vbpe.published import read_published_pickle


def doubled(times: int) -> object:
    """Nested tuples that a few hundred bytes hold, and that take 2^times words to print."""
    value: object = (1, 2)
    for _ in range(times):
        value = (value, value)
    return [value]


@pytest.mark.parametrize(
    "data",
    [
        b"\x80\x04]r\xff\xff\xff\x7f.",  # a place in the memo of 34 GB
        b"]p2000000000\n.",
        b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x7f].",  # a frame of 2^63 bytes
        b"]" + b"\x85" * 100_000 + b"a.",
        pickle.dumps(doubled(60)),
    ],
    ids=["memo", "text memo", "frame", "deep", "doubled"],
)
def test_a_small_pickle_that_asks_for_much_is_refused(tmp_path, data) -> None:
    (path := tmp_path / "vbpe.pkl").write_bytes(data)
    program = (
        "import resource, sys; from beingvl.errors import InputError\n"
        "from beingvl.vbpe.published import read_published_pickle\n"
        "resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))\n"
        "try: read_published_pickle(sys.argv[1])\n"
        "except InputError as error: said = str(error)\n"
        "sys.exit(0 if len(said) < 300 and 'MemoryError' not in said else said)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(path)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_file_larger_than_any_vocabulary_is_not_read(tmp_path, monkeypatch) -> None:
    (path := tmp_path / "vbpe.pkl").write_bytes(pickle.dumps([((1, 2), 3)] * 100))
    monkeypatch.setattr(published, "MAX_PICKLE_BYTES", 100)
    with pytest.raises(InputError, match=r"bytes, expected at most 100"):
        read_published_pickle(path)
