"""Predictions equal the class's answers, scores equal an independent count, killed and shared
work is continued; refusals.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from beingvl.artefact.manifest import read_manifest, verify_folder
from beingvl.commands.main import main
from beingvl.evaluation.answering import (
    Question,
    by_question,
    prediction_rows,
    summarize,
)
from beingvl.evaluation.metrics import METRICS, Reference
from beingvl.evaluation.results import read_predictions, read_summary, write_lines
from beingvl.inference.model import BeingVL
from beingvl.vbpe.visual_bpe import VisualBPE
from tests.data.forms import write_parquet
from tests.data.test_kills import when_it_writes
from tests.inference.small_run import QUESTIONS, evaluate
from tests.model.small_models import NUM_CODES

WHICH, EVEN = QUESTIONS
INDEPENDENT = Path(__file__).with_name("independent_scores.py")


def question(number: int, text: str, answer: str) -> Question:
    prompt = f"<image>\n{text}"
    return Question((answer,), None, (f"{number}.png",), id=str(number), prompt=prompt)


def test_half_a_surrogate_pair_in_a_row_is_written_as_it_was_read(tmp_path) -> None:
    cut = Question(("yes \udcff",), id="\ud83d", prompt="hi")
    scores = METRICS["exact_match"].score(["no"], [cut])
    write_lines(tmp_path / "predictions.jsonl", prediction_rows([cut], ["no"], scores))
    (line,) = (tmp_path / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(line)["id"] == cut.id and json.loads(line)["answer"] == "yes \udcff"


def test_scores_by_hand() -> None:
    questions = [question(n, WHICH, "one") for n in range(3)] + [
        question(3, WHICH, "Two"),
        question(4, EVEN, "yes"),
    ]
    predictions = ["one", " ONE ", "two", "two", "no"]
    scores = METRICS["exact_match"].score(predictions, questions)
    found = summarize("exact_match", questions, scores)
    assert found["questions"] == by_question(questions, [1, 1, 0, 1, 0])
    assert found["questions"][WHICH] == {
        "accuracy": 0.75,
        "chance": 0.5,
        "majority": 0.75,
        "rows": 4,
        "distinct_answers": 2,
    }
    assert found["questions"][EVEN] == {
        "accuracy": 0.0,
        "chance": 1.0,
        "majority": 1.0,
        "rows": 1,
        "distinct_answers": 1,
    }
    assert (found["rows"], found["correct"]) == (5, 3)
    assert (
        found["accuracy"] == found["scores"]["accuracy"] == 3 / 5
        and found["accuracy_mean"] == 0.375
    )
    assert found["standard_errors"]["accuracy"] == pytest.approx((0.24 / 4) ** 0.5)


def test_predictions_hold_any_text(tmp_path: Path) -> None:
    texts = ["a\nb", "\u2028", "\x85\x1c", '"', "\N{GREEK SMALL LETTER PHI}"]
    questions = [question(number, WHICH, "one") for number in range(len(texts))]
    scores = METRICS["exact_match"].score(texts, questions)
    write_lines(tmp_path / "predictions.jsonl", prediction_rows(questions, texts, scores))
    with open(tmp_path / "predictions.jsonl", encoding="utf-8") as file:
        assert [json.loads(line)["prediction"] for line in file] == texts


def test_predictions_are_the_models_answers_in_the_order_of_the_file(run_folder: Path) -> None:
    model = BeingVL(run_folder / "stage-2" / "final", run_folder / "vbpe").load_model(device="cpu")
    rows = json.loads((run_folder / "data" / "test.json").read_text())
    images = [run_folder / "data" / "images" / row["image"] for row in rows]
    prompts = [row["conversations"][0]["value"] for row in rows]
    answers = model.generate_with_vbpe(prompts, images, max_new_tokens=4)

    predictions = read_predictions(run_folder / "eval" / "stage-2")
    assert [row["prediction"] for row in predictions] == answers
    assert [row["id"] for row in predictions] == [row["id"] for row in rows]
    assert [row["answer"] for row in predictions] == [
        row["conversations"][1]["value"] for row in rows
    ]
    summary = read_summary(run_folder / "eval" / "stage-2")
    assert (
        summary["rows"] == len(rows)
        and summary["name"] == "stage-2"
        and set(summary["questions"]) == set(QUESTIONS)
    )


def test_an_independent_script_gives_the_same_scores(run_folder: Path, tmp_path: Path) -> None:
    """Through the whole command, on questions of which the model answers some rightly: its own
    answers, some of them spoilt.
    """
    predictions = read_predictions(run_folder / "eval" / "stage-1")
    rows = json.loads((run_folder / "data" / "test.json").read_text())
    known = [
        row for row, prediction in zip(rows, predictions, strict=True) if prediction["prediction"]
    ]
    answer_of = {row["id"]: row["prediction"] for row in predictions}
    for number, row in enumerate(known):
        row["conversations"][1]["value"] = (
            "wrong" if number % 5 == 3 else answer_of[row["id"]].upper() + " "
        )
    (tmp_path / "known.json").write_text(json.dumps(known))
    assert (
        evaluate(
            run_folder / "stage-1" / "final", run_folder, tmp_path / "known.json", tmp_path / "eval"
        )
        == 0
    )

    done = subprocess.run(
        [sys.executable, INDEPENDENT, tmp_path / "eval" / "predictions.jsonl"],
        capture_output=True,
        text=True,
        check=True,
    )
    summary, expected = read_summary(tmp_path / "eval"), json.loads(done.stdout)
    of_question = expected.pop("of_question")
    assert {key: summary[key] for key in expected} == expected
    assert {text: entry["accuracy"] for text, entry in summary["questions"].items()} == of_question
    assert summary["scores"]["accuracy"] == expected["accuracy"]
    assert 0 < expected["correct"] < len(known)


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


def codes(run_folder: Path) -> str:
    return f"--vq_codes={run_folder / 'vq_codes' / 'test'}"


def test_images_encoded_now_give_the_same_predictions(run_folder: Path, tmp_path: Path) -> None:
    image_path = f"--image_path={run_folder / 'data' / 'images'}"
    assert (
        main(
            command(
                run_folder, tmp_path / "eval", image_path, "--batch_size=5", "--rows_per_part=7"
            )
        )
        == 0
    )
    assert read_predictions(tmp_path / "eval") == read_predictions(run_folder / "eval" / "stage-1")
    assert main(command(run_folder, tmp_path / "eval", image_path)) == 0, "the same images: reused"


def test_rows_of_another_form_give_the_same_predictions(run_folder: Path, tmp_path: Path) -> None:
    """Parquet with the images inside, turns as messages, the answer beside them."""
    rows = json.loads((run_folder / "data/test.json").read_text())
    told = []
    for row in rows:
        image = (run_folder / "data/images" / row["image"]).read_bytes()
        question, answer = (turn["value"] for turn in row["conversations"])
        messages = [{"role": "user", "content": question}]
        told.append({"images": [{"bytes": image}], "messages": messages, "answer": answer})
    table = write_parquet(tmp_path / "questions", told)
    words = command(run_folder, tmp_path / "eval", "--batch_size=5")
    words = [word for word in words if not word.startswith("--json_path")]
    assert main([*words, f"--json_path={table}"]) == 0
    found, expected = (
        [
            (line["question"], line["answer"], line["prediction"])
            for line in read_predictions(folder)
        ]
        for folder in (tmp_path / "eval", run_folder / "eval" / "stage-1")
    )
    assert found == expected


def test_raw_codes_name_and_limit(run_folder: Path, tmp_path: Path) -> None:
    assert (
        main(
            command(
                run_folder,
                tmp_path / "eval",
                codes(run_folder),
                "--raw",
                "--limit=5",
                "--name=plain codes",
            )
        )
        == 0
    )
    summary = read_summary(tmp_path / "eval")
    assert (summary["name"], summary["variant"], summary["rows"]) == ("plain codes", "raw", 5)
    model = BeingVL(run_folder / "stage-1" / "final").load_model(device="cpu")
    row = read_predictions(tmp_path / "eval")[4]
    image = run_folder / "data" / "images" / row["image"]
    asked = model.generate([row["question"]], [image], max_new_tokens=4, with_vbpe=False)
    assert asked == [row["prediction"]]


def test_a_finished_evaluation_is_reused_and_another_request_refused(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "eval"
    assert main(command(run_folder, output, codes(run_folder), "--limit=4")) == 0
    written = (output / "manifest.json").stat().st_mtime_ns
    capsys.readouterr()
    assert main(command(run_folder, output, codes(run_folder), "--limit=4")) == 0
    out = capsys.readouterr().out
    assert "reused" in out and "mean over questions" in out
    assert (output / "manifest.json").stat().st_mtime_ns == written
    assert main(command(run_folder, output, codes(run_folder), "--limit=4", "--name=B")) == 2
    assert "is finished with the name" in capsys.readouterr().err
    assert main(command(run_folder, output, codes(run_folder), "--limit=6")) == 2
    assert "different limit" in capsys.readouterr().err
    assert main(command(run_folder, output, codes(run_folder), "--limit=6", "--overwrite")) == 0
    manifest = verify_folder(output)
    assert manifest.counts["rows"] == 6
    assert {"vqgan", "vocab", "vbpe"} <= set(manifest.lineage)


def test_an_interrupted_evaluation_is_continued_on_other_ranks(
    run_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Stopped in its third part and started again as two ranks: what is missing is answered,
    nothing twice, the same bytes.
    """
    arguments = command(run_folder, tmp_path / "eval", codes(run_folder), "--rows_per_part=5")
    answer = BeingVL.continue_token_sequences
    sizes: list[int] = []

    def interrupted(
        self: BeingVL, sequences: list[list[int]], *more: Any, **options: Any
    ) -> list[list[int]]:
        if len(sizes) == 2:
            raise KeyboardInterrupt
        sizes.append(len(sequences))
        return answer(self, sequences, *more, **options)

    monkeypatch.setattr(BeingVL, "continue_token_sequences", interrupted)
    assert main(arguments) == 130
    assert not (tmp_path / "eval" / "manifest.json").exists()
    assert (
        main([*arguments, "--limit=7"]) == 2
        and "unfinished work with different limit" in capsys.readouterr().err
    )
    counted: list[int] = []
    monkeypatch.setattr(
        BeingVL,
        "continue_token_sequences",
        lambda self, s, *more, **options: (
            counted.append(len(s)),
            answer(self, s, *more, **options),
        )[1],
    )
    assert main([*arguments, "--rank=1", "--num_ranks=2"]) == 0
    assert "2 of 5 are still missing" in capsys.readouterr().out
    assert main([*arguments, "--rank=0", "--num_ranks=2"]) == 0
    assert sum(counted) == 24 - 10 and not list((tmp_path / "eval").glob("parts.tmp"))
    assert read_predictions(tmp_path / "eval") == read_predictions(run_folder / "eval" / "stage-1")
    ours, whole = (
        read_summary(folder) for folder in (tmp_path / "eval", run_folder / "eval" / "stage-1")
    )
    assert {**ours, "name": ""} == {**whole, "name": ""}


def test_a_rank_that_is_overtaken_in_the_middle_of_a_part_ends_well(
    run_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output, overtakers = tmp_path / "eval", []
    arguments = command(run_folder, output, codes(run_folder), "--rows_per_part=9")
    when_it_writes(monkeypatch, 1, lambda: overtakers.append(main(arguments)))
    assert main(arguments) == 0, capsys.readouterr().err
    assert overtakers == [0] and not list(output.glob("parts.tmp"))
    assert read_predictions(output) == read_predictions(run_folder / "eval" / "stage-1")


def test_overwrite_is_for_one_rank(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        main(
            command(
                run_folder, tmp_path, codes(run_folder), "--overwrite", "--rank=0", "--num_ranks=2"
            )
        )
        == 2
    )
    assert "--overwrite is for one rank" in capsys.readouterr().err


def test_text_only_rows(run_folder: Path, tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]
    (tmp_path / "text.jsonl").write_text(json.dumps({"id": 1, "conversations": turns}) + "\n")
    output = tmp_path / "eval"
    assert main([*command(run_folder, output), f"--json_path={tmp_path / 'text.jsonl'}"]) == 0
    assert read_summary(output)["rows"] == 1
    assert read_predictions(output)[0]["id"] == 1, "not the text '1'"


def test_many_questions_print_a_short_table(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        {
            "id": n,
            "conversations": [
                {"from": "human", "value": f"question {n}"},
                {"from": "gpt", "value": "yes"},
            ],
        }
        for n in range(23)
    ]
    (tmp_path / "many.json").write_text(json.dumps(rows))
    assert (
        main([*command(run_folder, tmp_path / "eval"), f"--json_path={tmp_path / 'many.json'}"])
        == 0
    )
    assert "and 3 more questions" in capsys.readouterr().out


# ---- metrics through the command ----


def asked(text: str = "hi") -> list[dict[str, str]]:
    return [{"from": "human", "value": text}]


ROWS_OF = {
    "vqa_accuracy": [
        {"answers": [{"answer": "yes", "answer_id": n} for n in range(10)]},
        {"answers": ["two"] * 9 + ["2"]},
    ],
    "pope": [{"answer": "yes", "category": "random"}, {"answer": "No", "category": "random"}],
    "mme": [{"answer": "Yes", "category": "OCR"}, {"answer": "No", "category": "OCR"}],
    "scienceqa": [{"answer": 1, "choices": ["a dog", "a cat"]}, {"answer": "A"}],
    "anls": [{"answers": ["one", "two"]}, {"answer": "three"}],
    "bleu": [{"answers": ["a b", "c d"]}, {"answer": "e f"}],
    "cider": [{"answers": ["a b", "c d"]}, {"answer": "e f"}],
}


@pytest.mark.parametrize("metric", ROWS_OF)
def test_scores_are_those_of_the_predictions_file(
    metric: str, run_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "rows.json").write_text(
        json.dumps([{"conversations": asked(), **row} for row in ROWS_OF[metric]])
    )
    where = [f"--json_path={tmp_path / 'rows.json'}", f"--metric={metric}"]
    assert main([*command(run_folder, tmp_path / "eval"), *where]) == 0
    rows, summary = read_predictions(tmp_path / "eval"), read_summary(tmp_path / "eval")
    references = [
        Reference(
            tuple([row["answer"]] if isinstance(row["answer"], str) else row["answer"]),
            row.get("category"),
        )
        for row in rows
    ]
    again = METRICS[metric].score([row["prediction"] for row in rows], references)
    assert (summary["metric"], summary["scores"], summary["categories"]) == (
        metric,
        again.values,
        again.categories,
    )
    assert [row.get("score") for row in rows] == (again.of_rows or [None, None])
    if metric == "scienceqa":
        assert [row["answer"] for row in rows] == ["B", "A"]


# ---- refusals ----


def test_refusals(run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    turns = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]
    for row, more, message in [
        (
            {"id": "a", "conversations": turns * 2},
            [],
            "row 0 (id 'a'): found 2 questions, expected one",
        ),
        (
            {"id": "a", "conversations": turns[:1]},
            [],
            "row 0 (id 'a'): there is no reference answer; give `answer`, `answers`",
        ),
        ({"id": "a", "answer": "yes"}, [], "has rows with the keys"),
        (
            {"conversations": asked(), "answers": []},
            [],
            "`answers` is '[]', expected a list of texts",
        ),
        (
            {"conversations": asked(), "answers": [{"text": "a"}]},
            [],
            "expected a list of texts or of objects with `answer`",
        ),
        ({"conversations": asked(), "answer": None}, [], "`answer` is 'None', expected text"),
        (
            {"conversations": asked(), "answer": 2, "choices": ["a", "b"]},
            [],
            "`answer` is 2, but `choices` is",
        ),
        (
            {"conversations": asked(), "answer": 30, "choices": ["a"] * 40},
            [],
            "`answer` is 30, but `choices` is",
        ),
        (
            {"conversations": asked(), "answer": True, "choices": ["a", "b"]},
            [],
            "`answer` is True, but `choices` is",
        ),
        (
            {"conversations": turns},
            ["--metric=pope"],
            "row 0 (id None) has the answer 'ho', expected yes or no; correct it",
        ),
        ({"conversations": turns, "image": "a.png"}, [], "give --codes, or --image_path"),
        (
            {"conversations": turns, "image": "../a.png"},
            [f"--image_path={tmp_path}"],
            "leaves the image folder",
        ),
        (
            {"conversations": turns, "image": "a.png"},
            [f"--image_path={tmp_path}"],
            "a.png: No such file or directory; do the rows' paths",
        ),
        ({"conversations": turns, "image": "a.png"}, [codes(run_folder)], "no codes of a.png"),
        (
            {"id": "a", "conversations": asked("<image> \n"), "answer": "b"},
            [],
            "row 0 (id 'a'): a prompt is empty",
        ),
        ({"conversations": turns}, ["--loss_on=all"], "--loss_on has no effect on --json_path"),
        ({"conversations": turns}, ["--device=foo"], "device 'foo' cannot be used"),
        ({"conversations": turns}, ["--limit=0"], "--limit is 0"),
        ({"conversations": turns}, ["--batch_size=0"], "--batch_size is 0"),
        ({"conversations": turns}, ["--max_new_tokens=-3"], "--max_new_tokens is -3"),
        ({"conversations": turns}, ["--rows_per_part=0"], "--rows_per_part is 0"),
    ]:
        (tmp_path / "rows.json").write_text(json.dumps([row]))
        capsys.readouterr()
        arguments = [
            *command(run_folder, tmp_path / "eval"),
            f"--json_path={tmp_path / 'rows.json'}",
            *more,
        ]
        assert main(arguments) == 2, message
        assert message in capsys.readouterr().err
    assert not (tmp_path / "eval").exists()


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("<image> hi", "more <image> placeholders than images"),
        ("long " * 200, "do not fit the model's"),
    ],
)
def test_a_bad_row_is_named_before_any_is_answered(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], prompt: str, message: str
) -> None:
    rows = [
        {"id": n, "conversations": asked(text), "answer": "yes"}
        for n, text in enumerate(["hi", prompt])
    ]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    arguments = [
        *command(run_folder, tmp_path / "eval"),
        f"--json_path={tmp_path / 'rows.json'}",
        "--rows_per_part=1",
    ]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert f"{tmp_path / 'rows.json'}, row 1 (id 1): " in error and message in error
    assert not (tmp_path / "eval").exists()


def test_a_row_whose_images_do_not_fit_is_named(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its text fits; how many tokens its images have is known when they are encoded."""
    row = {
        "id": "a",
        "conversations": asked("<image>" * 30 + "hi"),
        "answer": "yes",
        "image": ["test/0000.png"] * 30,
    }
    (tmp_path / "rows.json").write_text(json.dumps([row]))
    arguments = [
        *command(run_folder, tmp_path / "eval", codes(run_folder)),
        f"--json_path={tmp_path / 'rows.json'}",
        "--raw",
    ]
    assert main(arguments) == 2
    assert "row 0 (id 'a'): a prompt of " in capsys.readouterr().err


def test_an_unknown_metric_is_refused(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(command(run_folder, tmp_path, "--metric=guess"))
    assert exit_.value.code == 2 and "invalid choice: 'guess'" in capsys.readouterr().err


def test_another_model_or_vbpe_is_refused(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import numpy as np

    VisualBPE(NUM_CODES, np.array([[1, 1, 0, 1]])).save(tmp_path / "other.json")
    for more, message in [
        ([f"--model={tmp_path}"], "it is not a Being-VL model folder"),
        ([f"--vbpe_path={tmp_path / 'other.json'}"], "different vbpe"),
    ]:
        assert main([*command(run_folder, tmp_path / "eval", codes(run_folder)), *more]) == 2
        assert message in capsys.readouterr().err
    incomplete = shutil.copytree(run_folder / "stage-1" / "final", tmp_path / "model")
    (incomplete / "manifest.json").unlink()
    assert (
        main([*command(run_folder, tmp_path / "eval", codes(run_folder)), f"--model={incomplete}"])
        == 2
    )
    assert "incomplete" in capsys.readouterr().err
    assert read_manifest(run_folder / "stage-1" / "final", "model")
