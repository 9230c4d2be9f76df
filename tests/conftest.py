"""One small run for inference, evaluation and reports; tests that change files copy them."""

from pathlib import Path

import pytest

from tests.inference.small_run import write_run


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("run"))
