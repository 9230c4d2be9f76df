"""One small run for all tests of this folder; those that change files copy what they change."""

from pathlib import Path

import pytest

from tests.inference.small_run import write_run


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("run"))
