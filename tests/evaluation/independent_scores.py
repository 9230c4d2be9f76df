"""What somebody who does not trust us would write: predictions in, scores out, nothing of ours."""

import json
import sys

with open(sys.argv[1], encoding="utf-8") as file:
    rows = [json.loads(line) for line in file]
right = [row["prediction"].strip().lower() == row["answer"].strip().lower() for row in rows]
questions: dict[str, list[bool]] = {}
for row, is_right in zip(rows, right, strict=True):
    questions.setdefault(row["question"], []).append(is_right)
means = {question: sum(values) / len(values) for question, values in questions.items()}
overall = {
    "correct": sum(right),
    "accuracy": sum(right) / len(rows),
    "accuracy_mean": sum(means.values()) / len(means),
}
print(json.dumps({**overall, "of_question": means}))
