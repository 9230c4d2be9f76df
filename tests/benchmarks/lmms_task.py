"""lmms-eval's POPE task on local pictures and questions, by the adapter and by `evaluate`; one JSON
line last.

    python -m tests.benchmarks.lmms_task --run runs/quickstart --lmms_python
    LMMS_ENVIRONMENT/bin/python [--rows 200]     --tiny: only ours, on a small random model

LMMS_ENVIRONMENT is a virtual environment with lmms-eval and this package (`pip install lmms-eval;
pip install -e .`), not the tests' own. The task is lmms-eval's, its YAML and its functions; only
its documents come from a parquet file of the quickstart's held-out pictures with their yes-or-no
questions. `answers_equal`: both gave the same answer to every question. (lmms-eval 0.7.3 computes
POPE's yes ratio from the reference answers, so that one number differs.)
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from beingvl.evaluation.evaluate import evaluate
from beingvl.evaluation.results import read_predictions
from tests.inference.small_run import write_run

MAKE_TASK = Path(__file__).with_name("lmms_pope_task.py")


def yes_or_no_rows(run: Path, count: int) -> list[dict]:
    rows = json.loads((run / "data" / "test.json").read_text())
    chosen = [row for row in rows if row["conversations"][1]["value"] in ("yes", "no")]
    return chosen[:count]


def by_lmms_eval(
    python: str | Path, processes: int, run: Path, rows: list[dict], folder: Path, api: str = ""
) -> tuple[dict, list[str]]:
    """Scores of lmms-eval, and its answers in the order of the rows; by the adapter, or by its
    model of OpenAI's API, with the arguments `api`.
    """
    documents = [
        {
            "question_id": row["id"],
            "question": row["conversations"][0]["value"].replace("<image>", "").strip(),
            "answer": row["conversations"][1]["value"],
            "image": row["image"],
        }
        for row in rows
    ]
    (folder / "documents.jsonl").write_text("".join(json.dumps(row) + "\n" for row in documents))
    subprocess.run([python, MAKE_TASK, folder, (run / "data" / "images").resolve()], check=True)
    accelerate = f"accelerate.commands.launch --cpu --num_processes {processes} -m"
    model = f"pretrained={run / 'stage-3' / 'final'},vbpe_path={run / 'vbpe'},torch_dtype=float32"
    command: list[Any] = [python, "-m", *(accelerate.split() if processes > 1 else [])]
    command += ["lmms_eval", "--model", "openai" if api else "beingvl"]
    command += ["--model_args", api or model]
    command += ["--tasks", "pope_local", "--include_path", folder, "--output_path", folder / "out"]
    command += ["--batch_size", "64", "--device", "cpu", "--log_samples"]
    subprocess.run(list(map(str, command)), check=True)
    (results,) = (folder / "out").rglob("*results.json")
    (samples,) = (folder / "out").rglob("*samples_pope_local.jsonl")
    with open(samples, encoding="utf-8") as file:
        answers = {sample["doc_id"]: sample["filtered_resps"] for sample in map(json.loads, file)}
    scores = json.loads(results.read_text())["results"]["pope_local"]
    return scores, [answers[number] for number in range(len(rows))]


def by_evaluate(run: Path, rows: list[dict], folder: Path) -> tuple[dict, list[str]]:
    (folder / "rows.json").write_text(json.dumps(rows))
    scores = evaluate(
        run / "stage-3" / "final",
        folder / "eval",
        json_path=folder / "rows.json",
        vbpe_path=run / "vbpe",
        image_path=run / "data" / "images",
        metric="pope",
        device="cpu",
    )
    assert scores is not None
    return scores["scores"], [row["prediction"] for row in read_predictions(folder / "eval")]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--run", type=Path, help="folder of scripts/quickstart.sh")
    add("--lmms_python", help="python of an environment with lmms-eval and this package")
    add("--rows", type=int, default=200)
    add("--processes", type=int, default=1, help="of lmms-eval, started by accelerate")
    add("--tiny", action="store_true", help="see that it runs, in seconds, without lmms-eval")
    args = parser.parse_args()
    if not args.tiny and not (args.run and args.lmms_python):
        parser.error("give --run and --lmms_python, or --tiny")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        run = write_run(folder / "run") if args.tiny else args.run.resolve()
        rows = yes_or_no_rows(run, args.rows)
        ours, our_answers = by_evaluate(run, rows, folder)
        found = {"rows": len(rows), **ours}
        if not args.tiny:
            theirs, their_answers = by_lmms_eval(
                args.lmms_python, args.processes, run, rows, folder
            )
            names = [name for name in theirs if name.startswith("pope_") and "stderr" not in name]
            found |= {f"lmms_{name.partition(',')[0]}": theirs[name] for name in names}
            found["answers_equal"] = their_answers == our_answers
    print(json.dumps(found))


if __name__ == "__main__":
    main()
