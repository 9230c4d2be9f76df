"""lmms-eval's POPE task on local pictures and questions, by the adapter and by `beingvl
evaluate`; one JSON line last.

    python -m tests.benchmarks.lmms_task --run runs/quickstart --lmms_python
    LMMS_ENVIRONMENT/bin/python [--rows 200]

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

from beingvl.commands.main import main as beingvl
from beingvl.evaluation.results import read_predictions, read_summary

MAKE_TASK = """
import json, pathlib, shutil, sys
import datasets, lmms_eval
folder, images = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2])
rows = [json.loads(line) for line in open(folder / "documents.jsonl")]
for row in rows:
    row["image"] = str(images / row["image"])
columns = {name: [row[name] for row in rows] for name in rows[0]}
documents = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())
documents.to_parquet(folder / "documents.parquet")
task = pathlib.Path(lmms_eval.__file__).parent / "tasks" / "pope"
shutil.copy(task / "utils.py", folder / "utils.py")
text = (task / "pope.yaml").read_text()
head = "dataset_path: parquet\\ndataset_kwargs:\\n  data_files:\\n    test: " + str(folder / "documents.parquet") + "\\n"
text = head + text[text.index("task:"):].replace('"pope"', '"pope_local"')
text = text.replace('"\\\\nAnswer the question using a single word or phrase."', '""')
(folder / "pope_local.yaml").write_text(text)
"""


def yes_or_no_rows(run: Path, count: int) -> list[dict]:
    rows = json.loads((run / "data" / "test.json").read_text())
    chosen = [row for row in rows if row["conversations"][1]["value"] in ("yes", "no")]
    return chosen[:count]


def by_lmms_eval(
    python: str, processes: int, run: Path, rows: list[dict], folder: Path
) -> tuple[dict, list[str]]:
    """Scores of lmms-eval, and its answers in the order of the rows."""
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
    subprocess.run(
        [python, "-c", MAKE_TASK, folder, (run / "data" / "images").resolve()], check=True
    )
    arguments = (
        f"pretrained={run / 'stage-3' / 'final'},vbpe_path={run / 'vbpe'},torch_dtype=float32"
    )
    launch = (
        ["accelerate.commands.launch", "--cpu", "--num_processes", processes, "-m"]
        if processes > 1
        else []
    )
    command = [
        python,
        "-m",
        *launch,
        "lmms_eval",
        "--model",
        "beingvl",
        "--model_args",
        arguments,
        "--tasks",
        "pope_local",
    ]
    command += [
        "--include_path",
        folder,
        "--batch_size",
        "64",
        "--device",
        "cpu",
        "--log_samples",
        "--output_path",
        folder / "out",
    ]
    subprocess.run(list(map(str, command)), check=True)
    (results,) = (folder / "out").rglob("*results.json")
    (samples,) = (folder / "out").rglob("*samples_pope_local.jsonl")
    with open(samples, encoding="utf-8") as file:
        answers = {sample["doc_id"]: sample["filtered_resps"] for sample in map(json.loads, file)}
    return json.loads(results.read_text())["results"]["pope_local"], [
        answers[number] for number in range(len(rows))
    ]


def by_evaluate(run: Path, rows: list[dict], folder: Path) -> tuple[dict, list[str]]:
    (folder / "rows.json").write_text(json.dumps(rows))
    where = [
        f"--model={run / 'stage-3' / 'final'}",
        f"--vbpe_path={run / 'vbpe'}",
        f"--json_path={folder / 'rows.json'}",
    ]
    where += [
        f"--image_path={run / 'data' / 'images'}",
        f"--output_path={folder / 'eval'}",
        "--metric=pope",
        "--device=cpu",
    ]
    assert beingvl(["evaluate", *where]) == 0
    return read_summary(folder / "eval")["scores"], [
        row["prediction"] for row in read_predictions(folder / "eval")
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=Path, required=True, help="folder of scripts/quickstart.sh")
    parser.add_argument(
        "--lmms_python",
        required=True,
        help="python of an environment with lmms-eval and this package",
    )
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument(
        "--processes", type=int, default=1, help="of lmms-eval, started by accelerate"
    )
    args = parser.parse_args()
    rows = yes_or_no_rows(args.run.resolve(), args.rows)
    with tempfile.TemporaryDirectory() as folder:
        theirs, their_answers = by_lmms_eval(
            args.lmms_python, args.processes, args.run.resolve(), rows, Path(folder)
        )
        ours, our_answers = by_evaluate(args.run.resolve(), rows, Path(folder))
    names = [name for name in theirs if name.startswith("pope_") and "stderr" not in name]
    scores = {f"lmms_{name.partition(',')[0]}": theirs[name] for name in names}
    print(
        json.dumps(
            {"rows": len(rows), "answers_equal": their_answers == our_answers, **scores, **ours}
        )
    )


if __name__ == "__main__":
    main()
