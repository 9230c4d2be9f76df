"""Run by lmms_task.py in lmms-eval's environment: lmms-eval's POPE task with documents of our own.

python lmms_pope_task.py FOLDER IMAGES      FOLDER holds documents.jsonl
"""

import json
import shutil
import sys
from pathlib import Path

import datasets
import lmms_eval

folder, images = Path(sys.argv[1]), Path(sys.argv[2])
with open(folder / "documents.jsonl", encoding="utf-8") as file:
    rows = [json.loads(line) for line in file]
columns = {name: [row[name] for row in rows] for name in rows[0]}
columns["image"] = [str(images / name) for name in columns["image"]]
documents = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())
documents.to_parquet(folder / "documents.parquet")

task = Path(lmms_eval.__file__).parent / "tasks" / "pope"
shutil.copy(task / "utils.py", folder / "utils.py")
head = f"""dataset_path: parquet
dataset_kwargs:
  data_files:
    test: {folder / "documents.parquet"}
"""
text = (task / "pope.yaml").read_text()
text = head + text[text.index("task:") :].replace('"pope"', '"pope_local"')
text = text.replace('"\\nAnswer the question using a single word or phrase."', '""')
(folder / "pope_local.yaml").write_text(text)
