"""The paper's ablation: the jobs it prints, its table, and a tiny run of a part of it."""

import json
import shlex
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from beingvl.stage.stage_config import load_stage_config
from scripts.ablation_table import main as write_table
from tests.launcher import ENVIRONMENT, free_port

REPOSITORY = Path(__file__).parents[1]


def ablation(*words: str, **environment: str) -> str:
    done = subprocess.run(
        ["bash", "scripts/ablation.sh", *words],
        cwd=REPOSITORY,
        env=ENVIRONMENT | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def test_full_size_prints_jobs_of_equally_many_steps() -> None:
    steps, mixtures = Counter(), {}
    for line in ablation("--full_size", STEPS="3000", SEEDS="4").splitlines()[1:]:
        job = shlex.split(line.removeprefix("JOB=$(").removesuffix(")"))
        given = dict(word.split("=", 1) for word in job[: job.index("sbatch")])
        overrides = [job[at + 1] for at, word in enumerate(job) if word == "--set"]
        config = load_stage_config(REPOSITORY / given["DS_CONFIG"], overrides)
        cell, stage = given["OUTPUT_DIR"].split("/")[-2:]
        steps[cell] += config.beingvl.max_steps
        mixtures[cell, stage] = len(config.beingvl.trainable), config.beingvl.mixture
        assert config.beingvl.seed == 4 and config.sequences_per_step == 32
        assert given["DATA_PATH"] == "$SHARDS-" + cell.split("-")[0]
    assert len(steps) == 12 and set(steps.values()) == {3000}
    foundation = {cell: rows["foundation"] for cell, (_, rows) in mixtures.items()}
    assert mixtures["raw-both", "stage-1"][0] == 2 and foundation["raw-both", "stage-1"] == 0.8
    assert mixtures["raw-curriculum", "stage-1"][0] == 1
    assert [foundation["raw-curriculum", f"stage-{n}"] for n in (1, 2, 3)] == [0.8, 0.4, 0.15]
    assert mixtures["raw-progressive", "stage-1"][0] == 2
    assert foundation["raw-single", "stage-1"] == foundation["raw-progressive", "stage-2"] == 0.45


def test_the_table_has_means_and_spreads(tmp_path, capsys) -> None:
    for seed, accuracy in enumerate((0.7, 0.8)):
        folder = tmp_path / f"seed-{seed}/anchor-single/eval"
        folder.mkdir(parents=True)
        of_kinds = {kind: {"accuracy": accuracy} for kind in ("perception", "reasoning")}
        (folder / "scores.json").write_text(json.dumps({"categories": of_kinds}))
    write_table(tmp_path)
    cells = [
        "single stage",
        "not run",
        "not run",
        "75.0 ± 10.0 / 75.0 ± 10.0 (2)".replace(" ±", "\xa0±").replace("± ", "±\xa0"),
        "71.2 / 62.3",
    ]
    printed = capsys.readouterr().out
    assert "| " + " | ".join(cells) + " |" in printed and "order:" not in printed
    assert f"<tr><td>{'</td><td>'.join(cells)}</td></tr>" in (tmp_path / "index.html").read_text()


def test_the_table_says_where_the_order_is_not_the_papers(tmp_path, capsys) -> None:
    regimes = ("both", "curriculum", "progressive", "single")
    found = {"raw": (4, 3, 3, 1), "anchor": (2, 4, 3, 1), "running": (2, 2, 2, 2)}
    for codes, accuracies in found.items():
        for regime, accuracy in zip(regimes, accuracies, strict=True):
            folder = tmp_path / f"seed-0/{codes}-{regime}/eval"
            folder.mkdir(parents=True)
            of_kinds = {kind: {"accuracy": accuracy / 10} for kind in ("perception", "reasoning")}
            (folder / "scores.json").write_text(json.dumps({"categories": of_kinds}))
    write_table(tmp_path)
    printed = capsys.readouterr().out
    assert (
        "raw codes: the same order (seeds: 1): curriculum and progressive 40.0, curriculum only"
        in printed
    )
    assert (
        "vBPE, anchor: a different order than the paper's (seeds: 1): curriculum only 40.0"
        in printed
    )
    assert "vBPE, running: no difference (seeds: 1): " in printed


@pytest.mark.slow
def test_a_tiny_run_of_two_cells_goes_on_where_it_was(tmp_path) -> None:
    chosen = {"STEPS": "3", "SEEDS": "1", "CODES": "raw anchor", "REGIMES": "curriculum single"}
    given = {**chosen, "RUN": str(tmp_path), "MASTER_PORT": str(free_port())}
    python = str(Path(sys.executable).resolve())  # what .venv was made from
    said = [ablation(**given, PYTHON=python).splitlines() for _ in range(2)]
    assert sum("finished" in line for line in said[1]) > sum("finished" in line for line in said[0])
    assert said[0][-5:-1] == said[1][-5:-1] and said[0][-2].count("(1)") == 2
