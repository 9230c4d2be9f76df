"""Validation, replay, carried moments, checkpoints by the clock, Weights & Biases: each in one
rank without a launcher.
"""

import json
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from beingvl.artefact.manifest import read_manifest, write_manifest
from beingvl.commands.main import main
from beingvl.data.arrow_shards import ShardReader
from beingvl.evaluation.results import read_summary
from beingvl.model.weight_files import WeightFolder
from beingvl.stage.stage_config import load_stage_config
from beingvl.train.checkpoint import StateReader
from beingvl.train.checkpoint_folders import complete_checkpoints, step_of
from beingvl.train.metrics import VALIDATION_FILE, MetricsWriter, read_metrics
from beingvl.train.ranks import Ranks
from tests.launcher import ENVIRONMENT, log_of, run, run_alone
from tests.plain_torch import train_plain
from tests.tiny import stage_fields, write_inputs, write_shards
from tests.train.programs import run_program

ALONE = Ranks(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    folder = write_inputs(
        tmp_path_factory.mktemp("extras"), all=stage_fields(checkpoint_every_steps=2, keep_last=9)
    )
    write_shards(folder / "held-out", num_samples=13, seed=9)
    return folder


def train(work: Path, name: str, *more: str, **options: object) -> subprocess.CompletedProcess:
    return run_alone(work, work / name, *more, **options)


@pytest.fixture(scope="module")
def plain_run(work) -> Path:
    extensions = work / "torch-extensions"
    done = train(work, "plain", TORCH_EXTENSIONS_DIR=str(extensions))
    assert done.returncode == 0, done.stderr
    assert not extensions.exists()  # nothing is compiled on CPU ranks
    assert re.search(r"memory of rank 0: predicted .* used .* libraries ", done.stdout)
    assert re.search(r"time of the logged steps: \d", done.stdout)
    return work / "plain"


def test_a_port_that_is_taken_is_named_and_without_a_launcher_none_is_needed(
    work, plain_run
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = train(work, "taken", MASTER_PORT=port)
    assert done.returncode == 2 and f"ranks cannot meet at 127.0.0.1:{port}" in done.stderr, (
        done.stderr
    )
    assert "MASTER_PORT" not in ENVIRONMENT  # as `plain_run` started


def test_validation_counts_every_held_out_sample_once_and_changes_nothing(work, plain_run) -> None:
    settings = ["--set", "beingvl.validation_every_steps=2", "beingvl.log_every_steps=2"]
    done = train(work, "validated", "--validation_data", str(work / "held-out"), *settings)
    assert done.returncode == 0, done.stderr
    expected = dict(WeightFolder(plain_run / "final"))
    for name, tensor in dict(WeightFolder(work / "validated" / "final")).items():
        assert torch.equal(tensor, expected[name]), name
    rows = read_metrics(work / "validated", VALIDATION_FILE)
    assert [row["step"] for row in rows] == [
        row["step"] for row in read_metrics(plain_run) if row["step"] % 2 == 0
    ]
    assert {"validation/loss/source/foundation", "validation/loss/source/reasoning"} <= set(rows[0])
    logged = read_metrics(
        work / "validated"
    )  # validation comes after the line of its step, so its time is in the next one
    assert [row.get("seconds_validation", 0) > 0 for row in logged] == [False] + [True] * (
        len(logged) - 1
    )
    last = rows[-1]
    assert last["step"] == read_metrics(plain_run)[-1]["step"], (
        "the finished model is the one that was validated last"
    )
    assert last["validation/loss"] == pytest.approx(
        stock_loss(work / "validated" / "final", work / "held-out"), rel=1e-5
    )
    assert_evaluate_agrees(work, last)


def assert_evaluate_agrees(work: Path, validation: dict) -> None:
    """`beingvl evaluate --data` on the finished model says what the last validation of its
    training said.
    """
    where = [
        "--model",
        str(work / "validated" / "final"),
        "--data",
        str(work / "held-out"),
        "--output_path",
        str(work / "eval"),
    ]
    assert main(["evaluate", *where, "--device", "cpu"]) == 0
    scores = read_summary(work / "eval")
    for group in ("sources", "kinds"):
        for name, entry in scores[group].items():
            assert entry["loss"] == pytest.approx(
                validation[f"validation/loss/{group[:-1]}/{name}"], rel=1e-6
            )
    assert scores["scores"]["loss"] == pytest.approx(validation["validation/loss"], rel=1e-6)


def stock_loss(model_folder: Path, shards_folder: Path) -> float:
    from transformers import AutoModelForCausalLM

    from beingvl.data.loader import shifted_targets

    model, shards = AutoModelForCausalLM.from_pretrained(model_folder), ShardReader(shards_folder)
    total, count = 0.0, 0
    for index in range(len(shards)):
        targets = torch.from_numpy(shifted_targets(shards[index], shards.layout))
        with torch.no_grad():
            logits = model(torch.from_numpy(shards[index].input_ids.astype("int64"))[None]).logits[
                0
            ]
        total += float(torch.nn.functional.cross_entropy(logits, targets, reduction="sum"))
        count += int((targets >= 0).sum())
    return total / count


def test_validation_needs_both_of_its_halves(work) -> None:
    done = train(work, "half", "--set", "beingvl.validation_every_steps=2")
    assert done.returncode == 2 and "belong together" in done.stderr


def test_replay_shows_the_samples_of_a_step_and_finds_its_loss(work, plain_run) -> None:
    logged = {row["step"]: row["loss"] for row in read_metrics(plain_run)}
    before = sorted(path.name for path in plain_run.rglob("*"))
    done = train(work, "plain", "--replay", "3")  # the checkpoint after step 2 is there
    assert done.returncode == 0, done.stderr
    line = next(line for line in done.stdout.splitlines() if line.startswith("  loss "))
    assert (
        float(line.split()[1]) == pytest.approx(logged[3], rel=1e-5)
        and f"logged {logged[3]:.6f}" in line
    )
    assert (
        "steps too old" not in done.stdout
        and "=> " in done.stdout
        and "image tokens>" in done.stdout
    )
    far = train(work, "plain", "--replay", "4")
    assert "with the weights after step 2, 1 steps too old" in far.stdout
    assert sorted(path.name for path in plain_run.rglob("*")) == before
    assert train(work, "plain", "--replay", "1000").returncode == 2


def test_a_replay_of_several_ranks_gives_up_on_one_that_never_comes(work, plain_run) -> None:
    words = ("--replay", "3", "--set", "beingvl.stall_timeout_seconds=4")
    done = train(work, "plain", *words, RANK="0", WORLD_SIZE="2")
    assert done.returncode == 1 and "no progress for 4 s: rank 1 has not started" in done.stderr, (
        done.stderr
    )
    assert not (plain_run / "ranks").exists()  # these are the run's


@pytest.mark.parametrize(
    "stage", [pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow), 3]
)
def test_moments_of_surviving_tensors_can_be_carried_over(work, plain_run, stage: int) -> None:
    """One more update from carried moments: exp_avg = 0.9 old + 0.1 gradient, so it differs from
    0.1 gradient by 0.9 old.

    Two ranks carry over what one rank had.
    """
    settings = [f"zero_optimization.stage={stage}", "beingvl.max_steps=1"]
    for name, more in (("fresh", []), ("carried", ["--carry_moments"])):
        output = work / f"{name}-{stage}"
        assert (
            run(2, work / "all.json", plain_run, work / "shards", output, *settings, *more) == 0
        ), log_of(output)
        assert ("optimizer moments carried over" in log_of(output)) == (name == "carried")
    old = StateReader(complete_checkpoints(plain_run)[-1])
    fresh, carried = (
        StateReader(complete_checkpoints(work / f"{name}-{stage}")[-1])
        for name in ("fresh", "carried")
    )
    for name, entry in carried.state.parameters.items():
        assert entry["adam_steps"] == old.state.parameters[name]["adam_steps"] + 1
        assert fresh.state.parameters[name]["adam_steps"] == 1
        size = torch.Size(entry["shape"]).numel()
        before, without, found = (
            reader.fetch(name, "exp_avg", 0, size) for reader in (old, fresh, carried)
        )
        torch.testing.assert_close(found, 0.9 * before + without, rtol=1e-4, atol=1e-7)


def test_two_ranks_go_on_where_one_rank_was_and_one_where_two_were(work, plain_run) -> None:
    """Same samples, so the same losses; at the end the same weights and moments, up to rounding.
    Writing in the background.
    """
    output = work / "one-to-two"
    for checkpoint in complete_checkpoints(plain_run):
        if step_of(checkpoint) <= 2:
            shutil.copytree(checkpoint, output / "checkpoints" / checkpoint.name)
    shutil.copy(plain_run / "metrics.jsonl", output)
    settings = ["beingvl.background_save=true", "beingvl.checkpoint_every_steps=1"]
    assert run(2, work / "all.json", work / "base", work / "shards", output, *settings) == 0, (
        log_of(output)
    )
    expected = [row["loss"] for row in read_metrics(plain_run)]
    assert [row["loss"] for row in read_metrics(output)] == pytest.approx(expected, rel=1e-5)
    assert [step_of(path) for path in complete_checkpoints(output)] == list(
        range(2, len(expected) + 1)
    )
    assert_ends_as(output, plain_run, num_ranks=2)
    for folder in (
        *complete_checkpoints(output)[-2:],
        output / "final",
    ):  # as if killed two steps before the end
        (folder / "manifest.json").unlink()
    done = train(work, output.name)
    assert done.returncode == 0 and "resumed from" in done.stdout, done.stderr
    assert [row["loss"] for row in read_metrics(output)] == pytest.approx(expected, rel=1e-5)
    assert_ends_as(output, plain_run, num_ranks=1)


def assert_ends_as(output: Path, reference: Path, num_ranks: int) -> None:
    """The last checkpoint, of `num_ranks` ranks, has the weights and moments of a run of one
    rank.
    """
    with (
        StateReader(complete_checkpoints(output)[-1]) as found,
        StateReader(complete_checkpoints(reference)[-1]) as expected,
    ):
        assert (found.state.num_ranks, expected.state.num_ranks) == (num_ranks, 1)
        for name, entry in expected.state.parameters.items():
            assert found.state.parameters[name]["adam_steps"] == entry["adam_steps"]
            for key in ("master", "exp_avg", "exp_avg_sq"):
                theirs, ours = (
                    reader.fetch(name, key, 0, torch.Size(entry["shape"]).numel())
                    for reader in (expected, found)
                )
                assert (ours - theirs).norm() <= 1e-3 * theirs.norm(), (name, key)


def test_a_truncated_checkpoint_is_one_sentence_with_what_to_do(work, plain_run) -> None:
    shutil.copytree(plain_run / "checkpoints", work / "truncated" / "checkpoints")
    *_, older, newest = complete_checkpoints(work / "truncated")
    path = newest / "rank-00000-of-00001.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    done = train(work, "truncated")
    assert (
        done.returncode == 2
        and "Traceback" not in done.stderr
        and "looks like a bug" not in done.stderr
    )
    (line,) = [line for line in done.stderr.splitlines() if "error:" in line]
    assert (
        f"{path} is missing or damaged" in line
        and f"remove {newest} to continue from {older.name}" in line
    )


def test_moments_of_which_no_tensor_survives_leave_the_start_model_as_it_is(
    work, plain_run
) -> None:
    """The stage before trained nothing that this one trains. Adam's first update moves a weight
    by its rate, after the decay.
    """
    before = work / "nothing-survives"
    shutil.copytree(plain_run, before)
    state = complete_checkpoints(before)[-1] / "state.json"
    state.write_text(json.dumps({**json.loads(state.read_text()), "parameters": {}}))
    write_manifest(state.parent, "checkpoint", {}, read_manifest(state.parent).lineage)
    done = train(
        work, "from-nothing", "--carry_moments", "--set", "beingvl.max_steps=1", model=before
    )
    assert done.returncode == 0 and "optimizer moments carried over" in done.stdout, done.stderr
    with StateReader(complete_checkpoints(work / "from-nothing")[-1]) as reader:
        assert {entry["adam_steps"] for entry in reader.state.parameters.values()} == {1}
    rate, start = (
        read_metrics(work / "from-nothing")[0]["learning_rate"],
        dict(WeightFolder(before / "final")),
    )
    for name, tensor in dict(WeightFolder(work / "from-nothing" / "final")).items():
        assert (tensor - start[name] * (1 - 0.1 * rate)).abs().max() <= 1.01 * rate, name


def test_carried_moments_do_not_hide_that_a_tensor_gets_no_gradient(work, plain_run) -> None:
    """Its moments are not 0, and move it, all the same."""
    places = [
        "--model",
        str(plain_run),
        "--data",
        str(work / "shards"),
        "--output",
        str(work / "cut"),
    ]
    words = [
        "train",
        "--deepspeed_config",
        str(work / "all.json"),
        *places,
        "--carry_moments",
        "--set",
        "beingvl.max_steps=1",
    ]
    done = run_program("cut_gradient", *words)
    assert done.returncode == 1 and "optimizer moments carried over" in done.stdout, done.stderr
    assert (
        "layers.1.mlp.down_proj.weight is declared trained but got no gradient in the first step"
        in done.stderr
    )


def test_carrying_moments_needs_a_stage_folder(work) -> None:
    done = train(work, "nothing-to-carry", "--carry_moments")
    assert done.returncode == 2 and "is not a stage folder with checkpoints" in done.stderr


def test_checkpoints_by_the_clock_and_metrics_for_tensorboard(work) -> None:
    settings = [
        "beingvl.checkpoint_every_steps=0",
        "beingvl.checkpoint_every_minutes=0.0000001",
        "beingvl.keep_every=3",
    ]
    settings += ["beingvl.keep_last=1", "beingvl.max_steps=4", "beingvl.tensorboard=true"]
    assert (
        train(work, "clock", "--set", *settings, "--log_dir", str(work / "clock-logs")).returncode
        == 0
    )
    assert [step_of(path) for path in complete_checkpoints(work / "clock")] == [3, 4]

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events, rows = EventAccumulator(str(work / "clock-logs")).Reload(), read_metrics(work / "clock")
    for tag, name in {
        "loss/all": "loss",
        "loss/source/foundation": "loss/source/foundation",
        "optim/gradient_norm": "gradient_norm",
        "optim/learning_rate": "learning_rate",
        "speed/tokens_per_second": "tokens_per_second",
        "time/seconds_data": "seconds_data",
        "memory/peak_memory_bytes": "peak_memory_bytes",
        "health/skipped": "skipped",
    }.items():
        expected = [(row["step"], pytest.approx(row[name], rel=1e-6)) for row in rows]
        assert [(event.step, event.value) for event in events.Scalars(tag)] == expected, name
    (text,) = events.Tensors("stage.json/text_summary")
    assert b"max_steps" in text.tensor_proto.string_val[0]


def test_without_a_terminal_lines_tell_of_progress(tmp_path, capsys) -> None:
    """The first step, the last, and one per half minute."""
    values = {"loss": 1.5, "learning_rate": 1e-3, "tokens": 100, "spike": 0}
    with MetricsWriter(tmp_path, ALONE, first_step=2, num_steps=5) as metrics:
        for step in (3, 4, 5):
            metrics.write_step(step, values, 1.0, {"forward": 0.5}, [])
    first, last = capsys.readouterr().err.splitlines()
    assert first.startswith(
        "step 3 of 5: loss 1.5000, lr 1.00e-03, 200 tokens/s, 00:0"
    ) and first.endswith(" left")
    assert last == "step 5 of 5: loss 1.5000, lr 1.00e-03, 200 tokens/s, 00:00 left"


def test_weights_and_biases_gets_every_step(work, tmp_path, monkeypatch) -> None:
    """A module of that name, since the service is not reachable from a test; it keeps what it is
    given.
    """
    (tmp_path / "wandb.py").write_text(
        "import json, os\n"
        "def tell(*words): open(os.environ['TOLD'], 'a').write(json.dumps(words) + '\\n')\n"
        "class Run:\n"
        "    def log(self, values, step): tell(step, values['loss'])\n"
        "    def finish(self, exit_code): tell(exit_code)\n"
        "def init(project, id, resume, **more): tell(project, id, resume); return Run()\n"
    )
    told = tmp_path / "told"
    paths = f"{tmp_path}:{ENVIRONMENT.get('PYTHONPATH', '')}"
    done = train(
        work,
        "wandb",
        "--set",
        "beingvl.max_steps=2",
        WANDB_PROJECT="digits",
        TOLD=str(told),
        PYTHONPATH=paths,
    )
    assert done.returncode == 0, done.stderr
    steps = [[row["step"], row["loss"]] for row in read_metrics(work / "wandb")]
    first, *others = [json.loads(line) for line in told.read_text().splitlines()]
    assert first[0] == "digits" and first[2] == "allow" and others == [*steps, [0]]
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("WANDB_PROJECT", "digits"), monkeypatch.setenv("TOLD", str(told))
    with MetricsWriter(work / "wandb", ALONE, first_step=2, num_steps=4):
        pass
    assert [json.loads(line) for line in told.read_text().splitlines()][-2:] == [
        first,
        [0],
    ]  # a resumed stage: the same run
    done = train(work, "wandb-missing", WANDB_PROJECT="digits")
    assert (
        done.returncode == 2
        and "wandb is not installed" in done.stderr
        and "rank 0" not in done.stderr
    )


@pytest.mark.slow
def test_a_resumed_stage_goes_on_with_its_weights_and_biases_run(work, tmp_path) -> None:
    """The real package, offline: it writes down what it would send."""
    packages, output = tmp_path / "packages", work / "wandb-offline"
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "-q", "--target", packages, "wandb"], check=True
    )
    paths = (
        f"{ENVIRONMENT.get('PYTHONPATH', '')}:{packages}"  # last: our versions of what both need
    )
    settings = {"WANDB_PROJECT": "digits", "WANDB_MODE": "offline", "PYTHONPATH": paths}
    assert train(work, output.name, "--set", "beingvl.max_steps=4", **settings).returncode == 0
    losses = {str(row["step"]): row["loss"] for row in read_metrics(output)}
    for folder in (
        output / "final",
        output / "checkpoints" / "step-00000004",
    ):  # as if killed in step 4
        (folder / "manifest.json").unlink()
    done = train(work, output.name, "--set", "beingvl.max_steps=4", **settings)
    assert done.returncode == 0 and "resumed from" in done.stdout, done.stderr
    read = run_program("read_wandb", output, PYTHONPATH=paths)
    first, second = sorted(
        (json.loads(line) for line in read.stdout.splitlines()), key=lambda run: -len(run["steps"])
    )
    assert first["id"] == second["id"] == (output / "wandb-run-id").read_text()
    assert first["steps"] == losses and second["steps"] == {
        step: losses[step] for step in ("3", "4")
    }


def test_metrics_say_where_the_time_of_a_step_goes(plain_run) -> None:
    for row in read_metrics(plain_run):
        phases = {
            name: row[f"seconds_{name}"]
            for name in ("data", "communication", "forward", "backward", "optimizer", "check")
        }
        assert all(seconds >= 0 for seconds in phases.values())
        assert sum(phases.values()) <= row["seconds"] * 1.0001
        assert row["tokens_per_second"] == pytest.approx(row["tokens"] / row["seconds"])
        assert row["mfu"] is None and row["target_tokens"] <= row["tokens"]


def test_plain_torch_agrees_with_the_run_that_the_others_are_held_to(work, plain_run) -> None:
    losses, _ = train_plain(work / "base", work / "shards", load_stage_config(work / "all.json"))
    assert [row["loss"] for row in read_metrics(plain_run)] == pytest.approx(losses, rel=1e-5)
    assert load_file(complete_checkpoints(plain_run)[-1] / "rank-00000-of-00001.safetensors")
