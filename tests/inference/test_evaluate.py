"""Predictions equal the class's answers, scores equal an independent count, a finished evaluation is reused; refusals."""

import json
from pathlib import Path
from typing import Any

import pytest

from beingvl.cli import main
from beingvl.inference.evaluate import (
    PartialAnswers,
    Question,
    is_correct,
    read_predictions,
    read_summary,
    summarize,
    write_evaluation,
)
from beingvl.inference.model import BeingVL
from beingvl.manifest import read_manifest
from tests.inference.small_run import QUESTIONS, evaluate

WHICH, EVEN = QUESTIONS


def question(number: int, text: str, reference: str) -> Question:
    return Question(str(number), (f"{number}.png",), f"<image>\n{text}", reference)


def test_scores_by_hand() -> None:
    questions = [question(n, WHICH, "one") for n in range(3)] + [question(3, WHICH, "Two"), question(4, EVEN, "yes")]
    summary = summarize(questions, ["one", " ONE ", "two", "two", "no"])
    assert summary["questions"][WHICH] == {"accuracy": 0.75, "chance": 0.5, "majority": 0.75, "rows": 4, "distinct_answers": 2}
    assert summary["questions"][EVEN] == {"accuracy": 0.0, "chance": 1.0, "majority": 1.0, "rows": 1, "distinct_answers": 1}
    assert (summary["rows"], summary["correct"]) == (5, 3)
    assert summary["accuracy"] == 3 / 5 and summary["accuracy_mean"] == 0.375
    assert not is_correct("one.", "one")


def test_predictions_hold_any_text(tmp_path: Path) -> None:
    texts = ["a\nb", "\u2028", "\x85\x1c", '"', "\N{GREEK SMALL LETTER PHI}"]
    questions = [question(number, WHICH, "one") for number in range(len(texts))]
    write_evaluation(tmp_path, questions, texts, {"name": "x", **summarize(questions, texts)}, {}, {})
    assert [row["prediction"] for row in read_predictions(tmp_path)] == texts


def test_predictions_are_the_models_answers_in_the_order_of_the_file(run_folder: Path) -> None:
    model = BeingVL(run_folder / "stage-2" / "final", run_folder / "vbpe").load_model(device="cpu")
    rows = json.loads((run_folder / "data" / "test.json").read_text())
    images = [run_folder / "data" / "images" / row["image"] for row in rows]
    prompts = [row["conversations"][0]["value"] for row in rows]
    answers = model.generate_with_vbpe(prompts, images, max_new_tokens=4)

    predictions = read_predictions(run_folder / "eval" / "stage-2")
    assert [row["prediction"] for row in predictions] == answers
    assert [row["id"] for row in predictions] == [row["id"] for row in rows]
    assert [row["answer"] for row in predictions] == [row["conversations"][1]["value"] for row in rows]
    right = sum(
        answer.strip().lower() == row["conversations"][1]["value"].strip().lower()
        for answer, row in zip(answers, rows, strict=True)
    )
    summary = read_summary(run_folder / "eval" / "stage-2")
    assert summary["correct"] == right and summary["rows"] == len(rows) and summary["name"] == "stage-2"
    assert set(summary["questions"]) == set(QUESTIONS)


def test_a_model_that_knows_is_scored_right(run_folder: Path, tmp_path: Path) -> None:
    """References that are the model's own answers: accuracy 1, through the whole command."""
    predictions = read_predictions(run_folder / "eval" / "stage-1")
    rows = json.loads((run_folder / "data" / "test.json").read_text())
    known = [row for row, prediction in zip(rows, predictions, strict=True) if prediction["prediction"]]
    for row in known:
        answer = next(entry["prediction"] for entry in predictions if entry["id"] == row["id"])
        row["conversations"][1]["value"] = answer.upper() + " "
    (tmp_path / "known.json").write_text(json.dumps(known))
    assert evaluate(run_folder / "stage-1" / "final", run_folder, tmp_path / "known.json", tmp_path / "eval") == 0
    summary = read_summary(tmp_path / "eval")
    assert summary["accuracy_mean"] == 1.0 and summary["correct"] == len(known) > 0


def command(run_folder: Path, output: Path, *more: str) -> list[str]:
    return [
        "evaluate",
        f"--model={run_folder / 'stage-1' / 'final'}",
        f"--vbpe_path={run_folder / 'vbpe'}",
        f"--json_path={run_folder / 'data' / 'test.json'}",
        f"--output_path={output}",
        "--max_new_tokens=4",
        "--device=cpu",
        *more,
    ]


def test_images_encoded_now_give_the_same_predictions(run_folder: Path, tmp_path: Path) -> None:
    image_path = f"--image_path={run_folder / 'data' / 'images'}"
    assert main(command(run_folder, tmp_path / "eval", image_path, "--batch_size=5")) == 0
    assert read_predictions(tmp_path / "eval") == read_predictions(run_folder / "eval" / "stage-1")


def test_raw_codes_name_and_limit(run_folder: Path, tmp_path: Path) -> None:
    codes = f"--vq_codes={run_folder / 'vq_codes' / 'test'}"
    assert main(command(run_folder, tmp_path / "eval", codes, "--raw", "--limit=5", "--name=plain codes")) == 0
    summary = read_summary(tmp_path / "eval")
    assert (summary["name"], summary["variant"], summary["rows"]) == ("plain codes", "raw", 5)
    model = BeingVL(run_folder / "stage-1" / "final").load_model(device="cpu")
    row = read_predictions(tmp_path / "eval")[4]
    image = run_folder / "data" / "images" / row["image"]
    assert model.generate([row["question"]], [image], max_new_tokens=4) == [row["prediction"]]


def test_a_finished_evaluation_is_reused_and_another_request_refused(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    codes = f"--vq_codes={run_folder / 'vq_codes' / 'test'}"
    output = tmp_path / "eval"
    assert main(command(run_folder, output, codes, "--limit=4")) == 0
    written = (output / "manifest.json").stat().st_mtime_ns
    capsys.readouterr()
    assert main(command(run_folder, output, codes, "--limit=4")) == 0
    out = capsys.readouterr().out
    assert "reused" in out and "mean over questions" in out
    assert (output / "manifest.json").stat().st_mtime_ns == written
    assert main(command(run_folder, output, codes, "--limit=6")) == 2
    assert "another limit" in capsys.readouterr().err
    assert main(command(run_folder, output, codes, "--limit=6", "--overwrite")) == 0
    manifest = read_manifest(output, "evaluation")
    assert manifest.counts["rows"] == 6
    assert {"vqgan", "vocab", "vbpe"} <= set(manifest.lineage)


def test_an_interrupted_evaluation_is_continued(run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped in its third batch, with half a line on disk: the same command answers what is missing, nothing twice."""
    arguments = command(run_folder, tmp_path / "eval", f"--vq_codes={run_folder / 'vq_codes' / 'test'}", "--batch_size=5")
    answer_batch = BeingVL._continue_batch
    sizes: list[int] = []

    def interrupted(self: BeingVL, sequences: list[list[int]], *more: Any) -> list[list[int]]:
        if len(sizes) == 2:
            raise KeyboardInterrupt
        sizes.append(len(sequences))
        return answer_batch(self, sequences, *more)

    monkeypatch.setattr(BeingVL, "_continue_batch", interrupted)
    assert main(arguments) == 130
    partial = tmp_path / "eval" / "predictions.jsonl.tmp"
    assert not (tmp_path / "eval" / "manifest.json").exists()
    partial.write_text(partial.read_text() + '\n[23, "cut o')
    sizes = []
    monkeypatch.setattr(
        BeingVL, "_continue_batch", lambda self, s, *more: (sizes.append(len(s)), answer_batch(self, s, *more))[1]
    )
    assert main(arguments) == 0
    assert sum(sizes) == 24 - 10 and not partial.exists()
    assert read_predictions(tmp_path / "eval") == read_predictions(run_folder / "eval" / "stage-1")


def test_answers_of_another_request_are_not_continued(tmp_path: Path) -> None:
    first = PartialAnswers(tmp_path, {"limit": 1})
    first.add([0, 4], ["yes", "no\n"])
    assert PartialAnswers(tmp_path, {"limit": 1}).answers == {0: "yes", 4: "no\n"}
    assert PartialAnswers(tmp_path, {"limit": 2}).answers == {}


def test_text_only_rows(run_folder: Path, tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]
    (tmp_path / "text.jsonl").write_text(json.dumps({"id": 1, "conversations": turns}) + "\n")
    output = tmp_path / "eval"
    assert main([*command(run_folder, output), f"--json_path={tmp_path / 'text.jsonl'}"]) == 0
    assert read_summary(output)["rows"] == 1


def test_many_questions_print_a_short_table(run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        {"id": n, "conversations": [{"from": "human", "value": f"question {n}"}, {"from": "gpt", "value": "yes"}]}
        for n in range(23)
    ]
    (tmp_path / "many.json").write_text(json.dumps(rows))
    assert main([*command(run_folder, tmp_path / "eval"), f"--json_path={tmp_path / 'many.json'}"]) == 0
    assert "and 3 more questions" in capsys.readouterr().out


def test_refusals(run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    turns = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]
    for row, more, message in [
        ({"id": "a", "conversations": turns * 2}, [], "row 0 (id 'a') has 2 questions, expected one"),
        ({"id": "a", "conversations": turns[:1]}, [], "row 0 (id 'a'): conversations has 1 entries"),
        ({"conversations": turns, "image": "a.png"}, [], "give --vq_codes, or --image_path"),
        ({"conversations": turns, "image": "../a.png"}, [f"--image_path={tmp_path}"], "leaves --image_path"),
        ({"conversations": turns, "image": "a.png"}, [f"--image_path={tmp_path}"], "a.png"),
        ({"conversations": turns, "image": "a.png"}, [f"--vq_codes={run_folder / 'vq_codes' / 'test'}"], "no codes of a.png"),
        ({"conversations": turns}, ["--limit=0"], "--limit is 0"),
    ]:
        (tmp_path / "rows.json").write_text(json.dumps([row]))
        capsys.readouterr()
        arguments = [*command(run_folder, tmp_path / "eval"), f"--json_path={tmp_path / 'rows.json'}", *more]
        assert main(arguments) == 2, message
        assert message in capsys.readouterr().err
    assert not (tmp_path / "eval").exists()
