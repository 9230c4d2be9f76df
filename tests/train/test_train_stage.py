"""The training engine under the real launcher: exact against plain torch, and bit-identical in what
is frozen and after a resumption.
"""

import re
import shlex
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch

from beingvl.artefact.card import CARD_FILE
from beingvl.artefact.manifest import read_manifest
from beingvl.commands import main as cli
from beingvl.model.weight_files import WeightFolder
from beingvl.stage.stage_config import load_stage_config
from beingvl.train.checkpoint import read_state
from beingvl.train.checkpoint_folders import complete_checkpoints, step_of
from beingvl.train.metrics import read_metrics
from tests import programs
from tests.launcher import (
    ENVIRONMENT,
    PYTHON,
    log_of,
    rank_processes,
    run,
    run_each,
    stage_words,
    start,
    wait_for_step,
)
from tests.plain_torch import train_plain
from tests.tiny import LAYOUT, write_shards
from tests.train.programs import run_program


def losses(output: Path) -> list[float]:
    lines = read_metrics(output)
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [line["loss"] for line in lines]


def weights(output: Path) -> dict[str, torch.Tensor]:
    return dict(WeightFolder(output / "final"))


def assert_same_bytes(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def test_rows_only_equals_plain_torch_and_leaves_the_rest_to_the_bit(work) -> None:
    output = work / "rows"
    assert run(2, work / "rows.json", work / "base", work / "shards", output) == 0, log_of(output)
    assert re.search(
        r"sources: foundation \d+ samples \([\d.]+%\), [\d,]+ tokens \([\d.]+%\), reasoning",
        log_of(output),
    )
    rows = slice(LAYOUT.num_text, None)
    plain_losses, plain_weights = train_plain(
        work / "base", work / "shards", load_stage_config(work / "rows.json"), rows
    )
    assert losses(output) == pytest.approx(plain_losses, rel=1e-5)
    start_weights = dict(WeightFolder(work / "base"))
    for name, tensor in weights(output).items():
        if name in ("model.embed_tokens.weight", "lm_head.weight"):
            torch.testing.assert_close(tensor, plain_weights[name], rtol=1e-4, atol=1e-5)
            assert torch.equal(tensor[: LAYOUT.num_text], start_weights[name][: LAYOUT.num_text])
            assert not torch.equal(tensor[rows], start_weights[name][rows])
        else:  # weight decay is 0.1 in this run
            assert torch.equal(tensor, start_weights[name]), name
    assert "visual_rows  yes" in (output / "plan.txt").read_text()
    saved = read_state(
        complete_checkpoints(output)[-1]
    ).parameters  # the optimizer holds state for these alone
    assert sorted(saved) == ["lm_head.visual_rows", "model.embed_tokens.visual_rows"]


def test_everything_equals_plain_torch(work, whole_run) -> None:
    """Rounding grows from step to step at this learning rate, so the first steps are held
    tightly and the last ones loosely.
    """
    plain_losses, plain_weights = train_plain(
        work / "base", work / "shards", load_stage_config(work / "all.json")
    )
    assert losses(whole_run)[:8] == pytest.approx(plain_losses[:8], rel=1e-5)
    assert losses(whole_run) == pytest.approx(plain_losses, rel=2e-3)
    for name, tensor in weights(whole_run).items():
        assert (tensor - plain_weights[name]).norm() < 0.02 * plain_weights[name].norm(), name


def test_final_is_a_stock_hugging_face_folder(whole_run) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(whole_run / "final")
    assert model.get_input_embeddings().weight.shape[0] == LAYOUT.size
    assert (
        AutoTokenizer.from_pretrained(whole_run / "final").convert_tokens_to_ids("<eoss>")
        == LAYOUT.eoi_id
    )
    assert cli.main(["verify", str(whole_run / "final")]) == 0


def test_cards_say_what_shards_and_models_were_made_of(work, whole_run) -> None:
    shards = read_manifest(work / "shards")
    card = (whole_run / "final" / CARD_FILE).read_text()
    assert "after 1 training stage\n" in card and f"| shards | {shards.content_hash} |\n" in card
    for text in (card, (work / "shards" / CARD_FILE).read_text()):
        assert f" {shards.counts['tokens']:,} |\n" in text and str(work) not in text


def test_a_finished_stage_is_left_alone_and_another_run_is_refused(work, whole_run) -> None:
    before = (whole_run / "final" / "manifest.json").read_text()
    base = [
        *PYTHON,
        "-m",
        "beingvl",
        "train",
        "--deepspeed_config",
        str(work / "all.json"),
        "--model",
        str(work / "base"),
    ]
    outputs = (
        whole_run,
        work / "another-view",
    )  # rank 1 does not see final/, as on a disk that shows it late
    commands = [
        [*base, "--data", str(work / "shards"), "--output", str(output)] for output in outputs
    ]
    done = run_each(commands)
    assert [each.returncode for each in done] == [0, 0], done
    assert "finished already" in done[0].stdout and not (outputs[1] / "checkpoints").exists()
    refused = run_each([[*command, "--set", "beingvl.seed=1"] for command in commands])
    assert [each.returncode for each in refused] == [2, 2], refused
    assert all("different seed (found 0, asked for 1)" in each.stderr for each in refused), refused
    assert (whole_run / "final" / "manifest.json").read_text() == before
    line = shlex.join(commands[0][len(PYTHON) + 2 :])
    alone = programs.run_program("light_answers", line, is_measured=True)  # without torch
    code, seconds = alone.stdout.splitlines()[-1].split()
    assert code == "0" and float(seconds) < 2 and "finished already" in alone.stdout, alone


def test_old_checkpoints_are_deleted(whole_run) -> None:
    assert [path.name for path in complete_checkpoints(whole_run)] == [
        path.name for path in sorted((whole_run / "checkpoints").iterdir())
    ]
    assert len(complete_checkpoints(whole_run)) == 2


def test_a_stopped_and_a_killed_run_continue_to_the_same_bytes(work, whole_run) -> None:
    output = work / "interrupted"
    launcher = start(2, work / "all.json", work / "base", work / "shards", output)
    wait_for_step(launcher, output, 4)
    rank_processes(launcher)[1].send_signal(signal.SIGINT)  # one rank's signal stops all
    assert launcher.wait(timeout=120) == 85, log_of(output)
    assert "stopped by a signal" in log_of(output)
    saved = step_of(complete_checkpoints(output)[-1])

    launcher = start(2, work / "all.json", work / "base", work / "shards", output)
    wait_for_step(launcher, output, saved + 4)
    for process in rank_processes(launcher).values():
        process.kill()
    assert launcher.wait(timeout=120) != 0

    assert run(2, work / "all.json", work / "base", work / "shards", output) == 0, log_of(output)
    assert "resumed from" in log_of(output)
    assert losses(output) == losses(whole_run)
    assert_same_bytes(weights(output), weights(whole_run))
    cards = [(folder / "final" / CARD_FILE).read_bytes() for folder in (output, whole_run)]
    assert cards[0] == cards[1]


def test_a_signal_during_the_start_ends_the_run_before_its_first_step(work) -> None:
    output = work / "stopped-early"
    launcher = start(2, work / "all.json", work / "base", work / "shards", output)
    while not list(output.glob("ranks/rank-*.json")):  # whoever has a heartbeat listens
        assert launcher.poll() is None, log_of(output)
        time.sleep(0.01)
    (rank, *_) = [int(path.stem.removeprefix("rank-")) for path in output.glob("ranks/rank-*.json")]
    rank_processes(launcher)[rank].send_signal(signal.SIGTERM)
    assert launcher.wait(timeout=120) == 85, log_of(output)
    assert (
        "stopped by a signal before the model was loaded; start the same command again"
        in log_of(output)
    )
    assert not (output / "checkpoints").exists() and not (output / "metrics.jsonl").exists()


def test_ranks_that_are_given_different_things_end_together_and_all_differences_are_named(
    work, tmp_path
) -> None:
    """What makes another run, what decides when ranks meet, and what is only looked at; without
    it ranks would wait for a day.
    """
    validation = [
        "beingvl.validation_every_steps=2",
        "zero_optimization.stage3_max_live_parameters=1000000",
    ]
    commands = []
    for number, steps in enumerate((3, 2)):
        shards, held_out = (
            write_shards(tmp_path / f"{name}-{number}", 40, seed=number)
            for name in ("data", "held-out")
        )
        words = stage_words(work / "all.json", work / "base", shards, tmp_path / "run")
        command = [*PYTHON, "-m", "beingvl", "train", *words, "--validation_data", str(held_out)]
        settings = [*validation[: 2 - number], f"beingvl.checkpoint_every_steps={steps}"]
        commands.append([*command, "--set", *settings])
    for done in run_each(commands):
        assert done.returncode == 2, done
        (line,) = [line for line in done.stderr.splitlines() if "error:" in line]
        assert "rank 1 has different inputs than rank 0: different " in line, line
        assert line.endswith("every host must read the same files"), line
        assert "different checkpoint_every_steps (found 2, asked for 3)" in line, line
        assert "different lineage" not in line, line
        assert all(
            f"different {name} (" in line
            for name in ("zero_optimization", "shards", "validation set")
        ), line
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_stage_folder_serves_as_start_model_and_export_equals_final(
    work, whole_run, capsys
) -> None:
    exported = work / "exported"
    command = [
        "export",
        "--model",
        str(work / "base"),
        "--checkpoint",
        str(whole_run),
        "--output_path",
        str(exported),
    ]
    assert cli.main(command) == 0
    assert (
        "the same model" in capsys.readouterr().out
    )  # the probe that ZeRO-3 ranks answered, asked of stock transformers
    assert_same_bytes(dict(WeightFolder(exported)), weights(whole_run))
    assert cli.main(command) == 2  # finished already
    assert (
        cli.main([*command[:2], str(exported), *command[3:-1], str(work / "other")]) == 2
    )  # not its start model
    next_stage = work / "next"
    assert (
        run(2, work / "rows.json", whole_run, work / "shards", next_stage, "beingvl.max_steps=1")
        == 0
    ), log_of(next_stage)
    assert "## Stage 2" in (next_stage / "final" / CARD_FILE).read_text()


def test_bf16_keeps_float32_where_it_belongs_and_skips_what_is_no_number_in_every_stage(
    work,
) -> None:
    """Masters are the start model's weights.

    A gradient that is not a number changes neither weights nor moments; the step after it does.
    Rotary frequencies stay float32. The buffer for gradients under way is no larger than they are.
    """
    done = run_program("bf16_steps", work)
    assert "fine" in done.stdout, done.stderr


def test_bf16_run_stays_near_float32(work, whole_run) -> None:
    output = work / "bf16"
    assert (
        run(
            2,
            work / "all.json",
            work / "base",
            work / "shards",
            output,
            "bf16.enabled=true",
            "beingvl.max_steps=3",
        )
        == 0
    ), log_of(output)
    assert losses(output) == pytest.approx(losses(whole_run)[:3], rel=2e-2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "nowhere"], "nowhere is not a folder; make it with `beingvl convert"),
        (["--data", "nowhere"], "make it with `beingvl build-shards`"),
        (["--set", "beingvl.mixture.perception=1"], "the shards hold ['foundation', 'reasoning']"),
        (["--set", "zero_optimization.stage=4"], "expected one of 1, 2, 3; on one rank"),
        (["--set", "beingvl.sequence_length=10"], "raise beingvl.sequence_length"),
        (
            ["--set", "train_batch_size=1000000000"],
            "train_batch_size is 1000000000, the whole run has ",
        ),
    ],
)
def test_wrong_input_is_one_sentence(work, tmp_path, arguments, message) -> None:
    given = {
        "--deepspeed_config": work / "all.json",
        "--model": work / "base",
        "--data": work / "shards",
        "--output": tmp_path / "x",
    }
    command = [
        *PYTHON,
        "-m",
        "beingvl",
        "train",
        *[str(word) for pair in given.items() for word in pair],
        *arguments,
    ]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    error = [line for line in done.stderr.splitlines() if "error:" in line]
    assert len(error) == 1 and message in error[0], done.stderr
    assert "Traceback" not in done.stderr
