"""Mean loss over all targets of the first rows of a JSONL file, by stock transformers.

mean_loss MODEL ROWS.jsonl NUM_ROWS
"""

import itertools
import json
import sys

import torch
from transformers import AutoModelForCausalLM


@torch.no_grad()
def main(model_folder: str, rows: str, num_rows: str) -> None:
    model, total, count = AutoModelForCausalLM.from_pretrained(model_folder).eval(), 0.0, 0
    with open(rows) as lines:
        for line in itertools.islice(lines, int(num_rows)):
            row = json.loads(line)
            logits = model(torch.tensor([row["input_ids"]])).logits[0, :-1]
            targets = torch.tensor(row["labels"])[1:]
            total += float(torch.nn.functional.cross_entropy(logits, targets, reduction="sum"))
            count += int((targets >= 0).sum())
    print(total / count)


if __name__ == "__main__":
    main(*sys.argv[1:])
