"""Disks that are full or cannot be written, where a library writes."""

import errno
import os
import resource
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from beingvl.data.shard_columns import ShardFacts
from beingvl.data.shard_writer import finish_shards
from beingvl.version import __version__
from tests.tiny import LAYOUT

REPOSITORY = Path(__file__).parents[2]


def test_a_disk_that_is_full_when_numpy_writes_says_so(tmp_path) -> None:
    numbers = np.arange(5000)
    facts = ShardFacts("blake3:0", 1, 1, ["a"], numbers * 0, numbers, numbers.astype(np.uint64))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, before[1]))
    try:
        with pytest.raises(OSError) as raised:
            finish_shards(tmp_path, {"a.arrow": facts}, LAYOUT, {}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert raised.value.errno == errno.EFBIG


@pytest.mark.needs_root
@pytest.mark.parametrize("mode", [None, 0o777])
def test_kernels_compile_where_neither_installation_nor_home_can_be_written(tmp_path, mode) -> None:
    """A folder that others may write to is not used: kernels on disk are pickles."""
    call = "from beingvl.vbpe.kernels import step_parts; print(*step_parts(8193))"
    read_only = 'mount --bind "$0" "$0" && mount -o remount,ro,bind "$0" && exec "$@"'
    command = ["unshare", "-m", "sh", "-c", read_only, REPOSITORY, sys.executable, "-c", call]
    environment = {**os.environ, "HOME": "/dev/null", "TMPDIR": str(tmp_path)}
    own = f"beingvl-{__version__}-kernels-{os.getuid()}"
    if mode:
        (tmp_path / own).mkdir()
        (tmp_path / own).chmod(mode)
    done = subprocess.run(
        command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["1", "1"]
    (cache,) = {path.parent.parent for path in tmp_path.rglob("*.nbi")}
    assert (cache.name == own) is (mode is None)
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700
