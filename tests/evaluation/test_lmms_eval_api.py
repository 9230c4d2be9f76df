"""lmms-eval, through its model of OpenAI's API, gets from `serve --api` what `evaluate` says."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.benchmarks.lmms_task import by_evaluate, by_lmms_eval, yes_or_no_rows
from tests.environments import own_environment
from tests.launcher import ENVIRONMENT, PYTHON, free_port

NEEDED = ("datasets", "evaluate", "loguru", "python-dotenv", "pytablewriter", "jsonlines")


@pytest.mark.slow
def test_lmms_eval_asks_the_api(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own_environment(tmp_path / "venv", "--no-deps", "lmms-eval")  # which wants CUDA's torch
    python = own_environment(tmp_path / "venv", *NEEDED, "tenacity")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    rows, port = yes_or_no_rows(run_folder, 12), free_port()
    words = ["serve", "--api", f"--model={run_folder / 'stage-3' / 'final'}", f"--port={port}"]
    words += [f"--vbpe={run_folder / 'vbpe'}", "--device=cpu", "--max_new_tokens=16"]
    server = subprocess.Popen(
        [*PYTHON, "-m", "beingvl", *words], env=ENVIRONMENT, stdout=subprocess.PIPE, text=True
    )
    try:
        assert server.stdout is not None and "http" in server.stdout.readline()
        api = f"model=stage-3/final,base_url=http://127.0.0.1:{port}/v1,api_key=none,timeout=300"
        _, their_answers = by_lmms_eval(python, 1, run_folder, rows, tmp_path, api)
    finally:
        server.terminate()
        server.wait(30)
    _, our_answers = by_evaluate(run_folder, rows, tmp_path)
    # Scores say nothing here: a random model answers neither yes nor no.
    assert [answer.strip() for answer in their_answers] == [one.strip() for one in our_answers]
