"""Every benchmark runs, in small, and ends with its JSON line."""

import json
import subprocess
from pathlib import Path

import pytest

from tests.launcher import ENVIRONMENT, PYTHON, free_port

HERE = Path(__file__).parent
TINY = [
    path.stem
    for path in sorted(HERE.glob("*.py"))
    if not path.stem.startswith("test_") and "--tiny" in path.read_text()
]
KEYS = {
    "convert": {"time_ratio_copy", "link_seconds", "peak_private_bytes", "max_abs_diff"},
    "data": {"build_ratio_vs_orjson", "tokenize_direct_ratio", "tokens_per_second"},
    "formats": {"rate_ratio", "private_bytes", "equal"},
    "generate": {
        "generation_ratio",
        "generation_ratio_sorted",
        "shared_image_ratio",
        "batch_equal",
    },
    "gpu_encode": {"reading_per_second", "vbpe_per_second", "gap_to_floor"},
    "gpu_train": {"cases"},
    "lmms_task": {"accuracy"},
    "lora": {
        "accuracy_full",
        "accuracy_lora",
        "checkpoint_ratio",
        "memory_ratio",
        "step_time_ratio",
    },
    "loss": {"full", "ours"},
    "plan": {"worst_error", "cases"},
    "positions": {"raw", "running_32", "anchor_32", "running_128", "anchor_128"},
    "train": {"overhead_fraction", "loss_ours"},
    "vbpe": {"train_ratio", "train_ratio_alpha", "encode_ratio", "growth_slope", "bytes_per_cell"},
}
REHEARSALS = {
    "gpu_encode": "--size tiny --images 16 --device cpu --num_workers 1",
    "gpu_train": "--size tiny --device cpu --stages 1 --sequence_lengths 2048 --steps 1 "
    "--warmup_steps 1 --phase_steps 1",
}


@pytest.mark.parametrize(
    "name",
    [
        *TINY,
        *(pytest.param(name, marks=pytest.mark.slow) for name in REHEARSALS),
    ],
)
def test_it_ends_with_its_json_line(name: str, tmp_path: Path) -> None:
    words = REHEARSALS.get(name, "--tiny").split()
    environment = {**ENVIRONMENT, "MASTER_PORT": str(free_port()), "TMPDIR": str(tmp_path)}
    environment["BEINGVL_WARM_CHILDREN"] = "1"  # times and memory are not looked at
    done = subprocess.run(
        [*PYTHON, "-m", f"tests.benchmarks.{name}", *words],
        env=environment,
        cwd=HERE.parents[1],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found.keys() >= KEYS.get(name, set())
    assert found.get("max_abs_diff", 0) == 0
    assert found.get("equal", True)
    assert not any("error" in case for case in found.get("cases", {}).values()), found["cases"]
