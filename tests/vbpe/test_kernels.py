import os
import time

from beingvl.vbpe import kernels


def test_kernels_on_disk_that_are_older_than_a_source_are_forgotten(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(kernels, "__file__", str(tmp_path / "kernels.py"))
    (tmp_path / "__pycache__").mkdir()
    stale, fresh = (tmp_path / f"__pycache__/{name}.nbi" for name in ("stale", "fresh"))
    for path, age in ((stale, 20), (tmp_path / "training_kernels.py", 10), (fresh, 0)):
        path.touch()
        os.utime(path, (time.time() - age,) * 2)
    kernels._drop_stale_kernels()
    assert fresh.exists() and not stale.exists()
