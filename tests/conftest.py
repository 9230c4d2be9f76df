"""How tests are shared between workers (`pytest -n 2 --dist loadgroup`): by file, because a file's
tests use the same inputs; and those first that take longest. And one small run for inference,
evaluation and reports; tests that change its files copy them.
"""

from pathlib import Path

import pytest

from tests.inference.small_run import write_run

HERE = Path(__file__).parent
LONGEST = (
    "launch/test_slurm.py",
    "launch/test_two_hosts.py",
    "test_whole_line.py",
    "train/test_failures.py",
    "train/test_extras.py",
    "train/test_train_stage.py",
    "train/test_zero_stages.py",
    "launch/test_start_training.py",
    "benchmarks/test_tiny.py",
)
TOGETHER = {"launch/test_slurm.py": "root", "launch/test_two_hosts.py": "root"}  # they mostly wait


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("dist", "no") == "no" and not hasattr(config, "workerinput"):
        return
    places = [item.path.relative_to(HERE).as_posix() for item in items]
    for item, place in zip(items, places, strict=True):
        item.add_marker(pytest.mark.xdist_group(TOGETHER.get(place, place)))
    rank = {place: number for number, place in enumerate(LONGEST)}
    order = sorted(range(len(items)), key=lambda at: rank.get(places[at], len(LONGEST)))
    items[:] = [items[at] for at in order]


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("run"))
