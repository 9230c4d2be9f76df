"""How tests are shared between workers (`pytest -n 3 --dist loadfile`): by file, because a file's
tests use the same inputs; and those first that take longest, of which those of Slurm and of hosts,
which mostly wait, begin one after the other. And one small run for inference, evaluation and
reports; tests that change its files copy them.
"""

from pathlib import Path

import pytest

from tests.inference.small_run import write_run

HERE = Path(__file__).parent
LONGEST = (
    "launch/test_slurm.py",
    "train/test_zero_stages.py",
    "train/test_extras.py",
    "launch/test_two_hosts.py",
    "train/test_failures.py",
    "train/test_train_stage.py",
    "test_whole_line.py",
    "faults/test_launchers.py",
    "launch/test_start_training.py",
    "benchmarks/test_tiny.py",
)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not hasattr(config, "workerinput"):  # xdist's
        return
    rank = {place: number for number, place in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.relative_to(HERE).as_posix(), len(LONGEST)))


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("run"))
