"""The report says what the evaluations say, draws every token once, needs no second file;
refusals.
"""

import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from beingvl.artefact.manifest import read_manifest, verify_folder, write_manifest
from beingvl.artefact.owner import owned
from beingvl.commands.main import main
from beingvl.evaluation.results import read_summary
from beingvl.report.frozen import hash_groups
from beingvl.report.made import bytes_on_disk, read_made
from beingvl.report.run_charts import training_curves
from beingvl.report.run_pieces import RunPaths, choose_examples, choose_wrong, confusions, read_run
from beingvl.report.train import TrainedStage, running_mean
from beingvl.vbpe.published import LegacyVisualBPE
from beingvl.vbpe.visual_bpe import VisualBPE
from tests.inference.small_run import QUESTIONS, STAGES, evaluate, overwrite_summary
from tests.tiny import LAYOUT, write_shards

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def copied_run(run_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run_folder, tmp_path / "run"))


def test_report_of_a_run(
    copied_run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    output = tmp_path / "report"
    row = {"spread": 0.0, "tokens_per_image": 100.0, "cpu_seconds": 150.0, "seeds": 3}
    rows = {name: {"mean": mean, **row} for name, mean in (("raw", 0.5), ("anchor_128", 0.75))}
    (copied_run / "equal_time.json").write_text(json.dumps(rows))
    words = [f"--output-path={output}", "--wall_seconds=61.5"]
    assert main(["report", "run", str(copied_run), *words]) == 0
    summary = json.loads((output / "summary.json").read_text())
    scores = {stage: read_summary(copied_run / "eval" / stage) for stage in STAGES}
    assert summary["test_accuracy_mean"] == scores["stage-3"]["accuracy_mean"]
    assert list(summary["test_accuracy"]) == list(STAGES)
    for stage in STAGES:
        questions = scores[stage]["questions"]
        assert summary["test_accuracy"][stage] == {
            text: questions[text]["accuracy"] for text in QUESTIONS
        }
    assert summary["chance"] == {text: 1 / len(answers) for text, answers in QUESTIONS.items()}
    assert summary["training_loss"]["stage-3"] == [3, 0.375]
    assert summary["wall_seconds"] == 61.5
    assert summary["accuracy_raw_equal_time"] == 0.5
    assert summary["accuracy_vbpe_equal_time"] == 0.75
    assert summary["peak_memory_bytes"] == 3008  # the last step of stage 3
    codes = np.load(copied_run / "vq_codes" / "test" / "codes.npy")
    tokens = [len(VisualBPE.load(copied_run / "vbpe").encode(grid)) for grid in codes]
    assert summary["vbpe_compression"] == codes.size / sum(tokens)
    printed = capsys.readouterr().out
    with owned(output):  # by another process, as a report that starts now sees it
        monkeypatch.setattr("beingvl.artefact.owner.PATIENCE_SECONDS", 0)
        assert main(["report", "run", str(copied_run), *words]) == 2
    assert f"{output} is in use by process " in capsys.readouterr().err
    for name in ("contact_sheet.png", "training.png"):
        assert (output / name).read_bytes().startswith(PNG)
    verify_folder(output)
    assert "  stage-3 3.000 -> 0.375\n" in printed and "   none" in printed
    assert (
        "stage-3" in printed
        and sum(line.startswith("  test/") for line in printed.splitlines()) == 10
    )


def test_page_needs_no_second_file_and_trusts_no_text(run_folder: Path, copied_run: Path) -> None:
    path = copied_run / "eval" / "stage-3" / "predictions.jsonl"
    rows = [
        json.loads(line) | {"prediction": "<script>alert(1)</script>"}
        for line in path.read_text().splitlines()
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["report", "run", str(copied_run), "--peak_memory_bytes=5"]) == 0
    html = (copied_run / "report" / "index.html").read_text()
    assert "<script" not in html and "&lt;script&gt;" in html
    assert html.count('<div class="wide"><table') >= 3  # scrolls by itself on a narrow screen
    assert (
        html.count("data:image/png;base64,")
        == html.count("src=") + html.count('xlink:href="data:')
        > 30
    )
    assert not re.findall(r"""(?:src|href)=["'](?!data:image/png;base64,|#)""", html)
    assert "http" not in html and "url(http" not in html and "@import" not in html
    assert (
        json.loads((copied_run / "report" / "summary.json").read_text())["peak_memory_bytes"] == 5
    )


def test_examples_do_not_depend_on_answers(run_folder: Path) -> None:
    examples = choose_examples(read_run(RunPaths(run_folder)))
    assert len({example.key for example in examples}) == 10
    assert {example.question for example in examples} == set(QUESTIONS)
    assert all(example.reconstruction.shape == (16, 16, 3) for example in examples)


def test_wrong_answers_and_how_the_run_was_made(run_folder: Path, copied_run: Path) -> None:
    path = copied_run / "eval" / "stage-3" / "predictions.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for number, row in enumerate(rows):
        row |= {"correct": number % 2 == 0, "prediction": row["answer"] if number % 2 == 0 else "Q"}
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    pieces = read_run(RunPaths(copied_run))
    wrong = choose_wrong(pieces)
    assert len(wrong) == 10 and not any(example.correct for example in wrong)
    for question, counts in confusions(pieces.predictions).items():
        asked = [row for row in rows if row["question"] == question]
        assert sum(given.total() for given in counts.values()) == len(asked)
        assert sum(given[truth] for truth, given in counts.items()) == sum(
            row["correct"] for row in asked
        )
        assert sum(given["…"] for given in counts.values()) == sum(
            not row["correct"] for row in asked
        )
    made = {made.path: made for made in read_made(copied_run, copied_run)}
    assert "stage-3/final" in made and "eval/stage-3" in made
    for one in made.values():
        assert one.version == read_manifest(copied_run / one.path).beingvl_version
    (copied_run / "again").hardlink_to(path)
    before = bytes_on_disk(copied_run)
    (copied_run / "more").write_bytes(b"12345")
    assert (
        bytes_on_disk(copied_run)
        == before + 5
        == bytes_on_disk(run_folder)
        + 5
        + (
            path.stat().st_size
            - (run_folder / "eval" / "stage-3" / "predictions.jsonl").stat().st_size
        )
    )


def test_equal_curves_can_be_told_apart() -> None:
    scores = dict.fromkeys("abcdef", 0.5)
    figure = training_curves(
        {}, {"test_accuracy": {"base": scores, "stage-1": scores}, "chance": scores}
    )
    curves = [
        line
        for line in figure.axes[1].lines
        if len(line.get_xdata()) == 2 and not line.get_label().startswith("_")
    ]
    assert (
        len({(line.get_linestyle(), line.get_marker()) for line in curves})
        == len({line.get_color() for line in curves})
        == 6
    )


@pytest.mark.parametrize(
    ("losses", "scale"),
    [
        ((4.0, 2.0), "linear"),
        ((4.0, 0.1), "log"),
        ((4.0, 0.0), "linear"),
        ((4.0, float("nan"), 0.1), "log"),
        ((None,), "linear"),
    ],
)
def test_a_steep_loss_has_a_logarithmic_axis(losses: tuple[float | None, ...], scale: str) -> None:
    rows = [{"step": step, "loss": loss} for step, loss in enumerate(losses, 1)]
    axes = training_curves(
        {"stage-1": TrainedStage(rows, [], "")}, {"test_accuracy": {}, "chance": {}}
    ).axes[0]
    assert axes.get_yscale() == scale
    low, high = axes.get_ylim()
    assert all(low <= loss <= high for loss in losses if loss is not None and math.isfinite(loss))


def test_running_mean() -> None:
    assert running_mean(np.arange(8.0)).tolist() == list(range(8))
    values = np.where(np.arange(80) == 40, 5.0, 0.0)
    assert running_mean(values)[[36, 38, 40, 42, 44]].tolist() == [0, 1, 1, 1, 0]


def test_a_run_without_early_evaluations_is_reported(copied_run: Path) -> None:
    for stage in STAGES[:-1]:
        shutil.rmtree(copied_run / "eval" / stage)
    shutil.rmtree(copied_run / "stage-1")
    assert main(["report", "run", str(copied_run)]) == 0
    assert list(
        json.loads((copied_run / "report" / "summary.json").read_text())["test_accuracy"]
    ) == ["stage-3"]


def test_stages_on_plain_codes_beside_those_with_vbpe(
    copied_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw = copied_run / "raw"
    json_path = copied_run / "data" / "test.json"
    assert (
        evaluate(
            copied_run / "stage-3" / "final",
            copied_run,
            json_path,
            raw / "eval" / "stage-3",
            "--raw",
        )
        == 0
    )
    overwrite_summary(raw / "eval" / "stage-3", accuracy_mean=0.75)
    assert main(["report", "run", str(copied_run), f"--stages_path={raw}"]) == 0
    summary = json.loads((raw / "report" / "summary.json").read_text())
    assert summary["variant"] == "raw" and summary["test_accuracy_mean"] == 0.75
    vbpe_mean = read_summary(copied_run / "eval" / "stage-3")["accuracy_mean"]
    assert summary["test_accuracy_mean_of_variant"] == {"vbpe": vbpe_mean, "raw": 0.75}
    assert "raw 0.750" in capsys.readouterr().out
    assert "the same, trained on vBPE tokens" in (raw / "report" / "index.html").read_text()
    example = choose_examples(read_run(RunPaths(copied_run, stages=raw)))[0]
    assert len(np.unique(example.owners)) == example.owners.size


@pytest.mark.parametrize("kind", ["run", "vbpe"])
def test_every_kind_explains_itself(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["report", kind, "--help"])
    assert stop.value.code == 0 and f"beingvl report {kind}" in capsys.readouterr().out


def test_refusals(copied_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", "run", str(copied_run / "nowhere")]) == 2
    assert "nowhere: No such file or directory" in capsys.readouterr().err
    path = copied_run / "vbpe" / "vbpe.json"
    own = path.read_bytes()
    LegacyVisualBPE(16, np.array([[1, 2]])).save(path)
    assert main(["report", "run", str(copied_run)]) == 2
    assert "is a published (legacy) vocabulary" in capsys.readouterr().err
    path.write_bytes(own)
    for more, message in [
        (["--vbpe_path=nowhere"], "--vbpe_path nowhere: No such file or directory"),
        ([f"--stages_path={copied_run / 'data'}"], "nothing to report"),
    ]:
        assert main(["report", "run", str(copied_run), *more]) == 2
        assert message in capsys.readouterr().err


def test_a_run_of_which_only_a_stage_is_left(
    copied_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in copied_run.iterdir():
        if path.name != "stage-2":
            shutil.rmtree(path)
    shutil.rmtree(copied_run / "stage-2" / "final")
    assert main(["report", "run", str(copied_run)]) == 0
    printed = capsys.readouterr().out
    for what in (
        "the curves of stage-1",
        "accuracy after each stage",
        "the base model",
        "the vBPE",
        "the data",
    ):
        assert f"not in the report: {what}" in printed
    html = (copied_run / "report" / "index.html").read_text()
    assert "Not in this report" in html and "<svg" in html and "Frozen" not in html


def test_data_text_parity_and_other_questions_are_on_the_page(copied_run: Path) -> None:
    """An evaluation with questions of its own is shown among the scores only."""
    overwrite_summary(
        copied_run / "eval" / "base",
        questions={"Another?": {"accuracy": 1, "chance": 1, "majority": 1}},
    )
    write_shards(copied_run / "shards-vbpe")
    parity = {
        "metric": "text_parity",
        "equal": False,
        "equal_is_expected": True,
        "scores": {"kl_nats": 0.25},
        "questions": {},
    }
    shutil.copytree(copied_run / "eval" / "base", copied_run / "eval" / "text-parity")
    overwrite_summary(copied_run / "eval" / "text-parity", **parity)
    assert main(["report", "run", str(copied_run)]) == 0
    html = (copied_run / "report" / "index.html").read_text()
    summary = json.loads((copied_run / "report" / "summary.json").read_text())
    assert list(summary["test_accuracy"]) == list(STAGES[1:])
    assert list(summary["evaluations"]) == [*STAGES, "text-parity"]
    assert "foundation" in html and "shards-vbpe" in html
    assert (
        "kl nats" in html and '<span class="wrong">not equal to the base model&#39;s</span>' in html
    )


def test_frozen_groups_keep_their_hash_and_trained_ones_do_not(
    run_folder: Path, tmp_path: Path
) -> None:
    """Stage 1 trains the new rows, stage 2 also the first layer; a value of a frozen layer
    changed by hand is found.
    """
    base, first, second = (
        Path(shutil.copytree(run_folder / "base", tmp_path / name))
        for name in ("base", "first", "second")
    )
    rest = {"match": ".*", "train": False}
    train(
        base,
        first,
        [{"match": "visual_rows"}, rest],
        ["model.embed_tokens.weight", "lm_head.weight"],
    )
    trainable = [{"match": "visual_rows"}, {"match": "layers[:25%]"}, rest]
    changed = ["model.embed_tokens.weight", "lm_head.weight", "model.layers.0.mlp.up_proj.weight"]
    train(first, second, trainable, changed)
    groups = hash_groups({"stage-1": first, "stage-2": second}, base)
    assert [(group.stage, group.group, group.is_trained) for group in groups] == [
        ("stage-1", "visual_rows", True),
        ("stage-1", ".*", False),
        ("stage-2", "visual_rows", True),
        ("stage-2", "layers[:25%]", True),
        ("stage-2", ".*", False),
    ]
    assert all(group.is_as_promised for group in groups)
    assert (
        groups[1].after == groups[1].base and groups[2].before == groups[0].after != groups[0].base
    )
    visual = 2 * LAYOUT.num_visual * 32
    assert groups[0].num_parameters == visual and groups[0].num_tensors == 2
    train(first, second, trainable, [*changed, "model.layers.3.mlp.up_proj.weight"])
    groups = hash_groups({"stage-1": first, "stage-2": second}, base)
    assert [group.is_as_promised for group in groups] == [True, True, True, True, False]
    alone = hash_groups({"stage-2": second}, None)
    assert [(group.base, group.before, group.is_as_promised) for group in alone] == [
        (None, None, True)
    ] * 3


def train(start: Path, final: Path, trainable: list[dict], changed: list[str]) -> None:
    """Write `final` as a stage would that changed the last row of these tensors."""
    weights = load_file(start / "model.safetensors")
    for name in changed:
        weights[name][-1] += 1
    save_file(weights, final / "model.safetensors", {"format": "pt"})
    identity = {"start_model": read_manifest(start).content_hash, "trainable": trainable}
    write_manifest(final, "model", {}, {}, {"identity": identity})
