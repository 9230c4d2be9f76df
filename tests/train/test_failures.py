"""When things go wrong: values that are not finite, leaks, a full disk, lost and stalled ranks,
kills at any moment.
"""

import random
import resource
import shutil
import signal
from collections import Counter
from pathlib import Path

import pytest
from safetensors.torch import load_file

from beingvl.artefact.manifest import read_manifest, verify_folder
from beingvl.data.arrow_shards import ShardReader
from beingvl.data.stage_data import data_of
from beingvl.stage.stage_config import load_stage_config
from beingvl.train.checkpoint_folders import complete_checkpoints, step_of
from beingvl.train.metrics import SpikeDetector, read_metrics
from tests.launcher import (
    PYTHON,
    log_of,
    rank_processes,
    run,
    run_alone,
    run_each,
    start,
    wait_for_step,
)
from tests.train.conftest import STALL_SECONDS
from tests.train.planted import poison
from tests.train.programs import program, run_program
from tests.train.storm import FAULTS, Disk, Storm, assert_same_weights, kill, stop


def token_that_comes_thrice_in_a_row(work: Path) -> tuple[int, list[int]]:
    """A token which the first step does not hold and later three steps in a row do; with all
    steps that hold it until then.
    """
    shards = ShardReader(work / "shards")
    data = data_of(load_stage_config(work / "all.json"), shards)
    seen = [
        set(data.micro_batch(step, 0, 0, 1, 4).input_ids.tolist()) for step in range(data.num_steps)
    ]
    for token in range(shards.layout.num_text):
        holds = [token in tokens for tokens in seen]
        third = next(
            (step for step in range(2, len(holds)) if all(holds[step - 2 : step + 1])), None
        )
        if third and not holds[0] and not holds[third - 3]:
            return token, [step + 1 for step in range(third + 1) if holds[step]]
    raise AssertionError("no such token")


@pytest.mark.parametrize(
    "stage", [pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow), 3]
)
def test_steps_that_are_not_finite_are_skipped_counted_and_named_then_the_run_stops(
    work, stage: int
) -> None:
    """Two bad steps in a row go by, the third ends the run with the last good state."""
    token, bad_steps = token_that_comes_thrice_in_a_row(work)
    model, output = poison(work / "base", work / f"poisoned-{stage}", token), work / f"nan-{stage}"
    settings = [
        f"zero_optimization.stage={stage}",
        "beingvl.max_skipped_steps=3",
        "beingvl.checkpoint_every_steps=0",
    ]
    done = run_alone(work, output, "--set", *settings, model=model)
    rows = read_metrics(output)
    assert [row["step"] for row in rows if row["skipped"]] == bad_steps and rows[-1][
        "step"
    ] == bad_steps[-1]
    assert all(bool(row.get("sample_ids")) == bool(row["skipped"]) for row in rows)
    assert done.returncode == 1, done.stderr[-2000:]
    assert (
        "3 steps in a row" in done.stderr
        and "samples are in metrics.jsonl" in done.stderr
        and "looks like a bug" not in done.stderr
    )
    (saved,) = complete_checkpoints(output)
    assert step_of(saved) == bad_steps[-1] - 3
    verify_folder(saved)
    saved_tensors = load_file(saved / "rank-00000-of-00001.safetensors")
    assert all(
        bool(tensor.isfinite().all())
        for name, tensor in saved_tensors.items()
        if name != "model.embed_tokens.text_rows.master"
    )


def test_a_run_whose_last_step_is_not_finite_ends_with_the_state_before_it(work) -> None:
    token, bad_steps = token_that_comes_thrice_in_a_row(work)
    model, output = poison(work / "base", work / "poisoned-last", token), work / "nan-last"
    settings = [
        f"beingvl.max_steps={bad_steps[0]}",
        "beingvl.checkpoint_every_steps=0",
        "beingvl.background_save=true",
    ]
    done = run_alone(work, output, "--set", *settings, model=model)
    assert done.returncode == 0, done.stderr[-2000:]
    assert [row["skipped"] for row in read_metrics(output)] == [0] * (bad_steps[0] - 1) + [1]
    assert [step_of(path) for path in complete_checkpoints(output)] == [bad_steps[0] - 1]
    assert read_manifest(output / "final").counts["step"] == bad_steps[0] - 1


def test_a_run_without_one_good_step_saves_nothing_and_says_so(work) -> None:
    data = data_of(load_stage_config(work / "all.json"), ShardReader(work / "shards"))
    token = int(data.micro_batch(0, 0, 0, 1, 4).input_ids.min())
    model, output = poison(work / "base", work / "poisoned-first", token), work / "nan-first"
    done = run_alone(work, output, "--set", "beingvl.max_steps=1", model=model)
    assert done.returncode == 1, done.stderr[-2000:]
    assert "1 steps in a row" in done.stderr and "there was no good one before" in done.stderr
    assert not complete_checkpoints(output) and not (output / "final").exists()


def test_a_signal_in_a_skipped_step_saves_the_state_before_it_at_once(work) -> None:
    """Two more such steps follow, of which the second would end the run."""
    token, bad_steps = token_that_comes_thrice_in_a_row(work)
    model, output = poison(work / "base", work / "poisoned-stop", token), work / "nan-stop"
    words = [
        "train",
        "--deepspeed_config",
        str(work / "all.json"),
        "--model",
        str(model),
        "--data",
        str(work / "shards"),
    ]
    words += [
        "--output",
        str(output),
        "--set",
        "beingvl.max_skipped_steps=3",
        "beingvl.background_save=true",
    ]
    words.append("beingvl.checkpoint_every_steps=0")
    done = run_program("stop_in_step", bad_steps[-3], *words)
    assert done.returncode == 85, done.stderr[-2000:]
    assert f"stopped by a signal after step {bad_steps[-3]}" in done.stdout
    assert [step_of(path) for path in complete_checkpoints(output)] == [bad_steps[-3] - 1]


@pytest.mark.parametrize(("stage", "num_ranks"), [(1, 1), (3, 2)])
def test_the_freezer_catches_a_leaked_row(work, stage, num_ranks) -> None:
    """Every rank says so, also one whose own part is as it was; and nobody does before the leak."""
    for done in run_each([program("leak", work, stage)] * num_ranks):
        caught = (
            "all in order\ncaught: the frozen parameter model.layers.3.mlp.up_proj.weight changed"
        )
        assert caught in done.stdout, done.stdout + done.stderr[-3000:]


def test_whole_runs_find_what_is_planted(work) -> None:
    """The training command itself: a leak into a frozen tensor, seen when a signal in the second
    step makes it save; a trained tensor without gradient; a loss spike; and a signal that comes
    during a save, after which no step is begun. One process, because starting one takes longer.
    """
    done = run_program("planted_runs", work)
    codes = [line for line in done.stdout.splitlines() if ": exit code " in line]
    assert codes == [
        "whole-leak: exit code 1",
        "whole-cut: exit code 1",
        "whole-spike: exit code 85",
    ], done.stderr[-3000:]
    leak, cut = [line for line in done.stderr.splitlines() if "error:" in line]
    assert (
        "the frozen parameter model.layers.3.mlp.up_proj.weight changed during "
        "training (1 did); nothing is saved" in leak
    )
    assert (
        "model.layers.1.mlp.down_proj.weight is declared trained but got no gradient "
        "in the first step" in cut
    )
    for name, num_steps in (("whole-leak", 2), ("whole-cut", 0)):
        assert len(read_metrics(work / name)) == num_steps
        assert not (work / name / "checkpoints").exists() and not (work / name / "final").exists()
    rows = read_metrics(work / "whole-spike")
    assert [(row["step"], row["spike"]) for row in rows] == [(10, 0), (20, 0), (25, 1)]
    data = data_of(
        load_stage_config(work / "all.json", ["beingvl.epochs=6"]), ShardReader(work / "shards")
    )
    assert rows[-1]["sample_ids"] == list(data.micro_batch(24, 0, 0, 1, 4).sample_ids)
    assert "step 25: loss" in done.stdout and "its samples are in metrics.jsonl" in done.stdout
    assert [step_of(path) for path in complete_checkpoints(work / "whole-spike")] == [28]
    assert "stopped by a signal after step 28" in done.stdout


def test_hosts_without_a_common_output_folder_end_together(work, whole_run) -> None:
    """Rank 1's output folder is another than rank 0's, as on a disk that hosts do not share."""
    base = [
        *PYTHON,
        "-m",
        "beingvl",
        "train",
        "--model",
        str(work / "base"),
        "--data",
        str(work / "shards"),
    ]
    base += ["--deepspeed_config", str(work / "all.json"), "--output"]
    unfinished = work / "unfinished"
    shutil.copytree(whole_run / "checkpoints", unfinished / "checkpoints")
    short = ["--set", "beingvl.stall_timeout_seconds=8"]
    blind = run_each([[*base, str(unfinished), *short], [*base, str(work / "elsewhere"), *short]])
    assert [done.returncode for done in blind] == [1, 1], blind
    for done in blind:
        assert (
            "rank 1 cannot see" in done.stderr
            and "all hosts need the same output folder" in done.stderr
        ), done.stderr


def test_a_full_disk_leaves_the_previous_checkpoint_and_the_run_goes_on_from_it(
    work, whole_run
) -> None:
    """The file size limit of one rank falls below a checkpoint's size while it runs."""
    output = work / "full-disk"
    launcher = start(2, work / "all.json", work / "base", work / "shards", output)
    wait_for_step(launcher, output, 4)
    for process in rank_processes(launcher).values():
        process.rlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))
    assert launcher.wait(timeout=120) == 1, log_of(output)
    assert "could not be written" in log_of(
        output
    ) and "earlier checkpoints are as they were" in log_of(output)
    assert complete_checkpoints(output)
    for folder in (output / "checkpoints").iterdir():
        verify_folder(folder)
    assert run(2, work / "all.json", work / "base", work / "shards", output) == 0, log_of(output)
    assert_same_weights(output, whole_run)


@pytest.mark.parametrize("what", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stalled"])
def test_a_lost_rank_ends_the_others_and_is_named(work, what: signal.Signals) -> None:
    output = work / f"lost-{what.name}"
    launcher = start(2, work / "all.json", work / "base", work / "shards", output)
    wait_for_step(launcher, output, 2)
    ranks = rank_processes(launcher)
    ranks[1].send_signal(what)
    ranks[0].wait(timeout=STALL_SECONDS + 60)  # a busy machine may take that long
    if what == signal.SIGSTOP:
        ranks[1].kill()
    assert launcher.wait(timeout=60) != 0
    named = [line for line in log_of(output).splitlines() if "rank 1 (process" in line]
    assert named and "step " in named[0] and "phase " in named[0] and "sign of life" in named[0], (
        log_of(output)[-3000:]
    )


def test_the_fall_of_the_first_steps_hides_no_spike_a_hundred_steps_later() -> None:
    detector = SpikeDetector()
    losses = [
        *(5.7 - 0.25 * step for step in range(20)),
        *(0.7 + 0.01 * (step % 3) for step in range(80)),
        1.5,
        0.7,
    ]
    assert [step for step, loss in enumerate(losses) if detector.add(loss)] == [100]


def test_spikes_are_told_from_noise() -> None:
    noise = random.Random(0)
    detector = SpikeDetector()
    assert not any(detector.add(3.0 - step / 200 + noise.gauss(0, 0.05)) for step in range(200))
    assert detector.add(4.0) and detector.add(4.0)
    assert not detector.add(2.0)


def test_a_small_resume_storm(work, whole_run) -> None:
    storm = Storm(work, whole_run, work / "storm", seed=0)
    storm.run([kill, stop, kill])
    assert storm.num_interrupted >= 2


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_ten_runs_in_a_storm(work, whole_run, tmp_path, seed: int) -> None:
    """Kills, stops, second starts, and disks that are full or fail, at random moments."""
    counts: Counter[str] = Counter()
    for number in range(10):
        with Disk(tmp_path / f"run-{number}") as disk:
            storm = Storm(work, whole_run, disk.folder, 10 * seed + number, disk)
            faults = storm.moments.choices(FAULTS, k=storm.moments.randint(1, 4))
            storm.run(faults)
            counts += Counter(fault.__name__ for fault in faults)
            counts["interrupted"] += storm.num_interrupted
    print(f"seed {seed}: {dict(counts)}")
