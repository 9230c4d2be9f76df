"""What is wrong with a path is told before the step's libraries are loaded."""

from __future__ import annotations

import json
from pathlib import Path

from beingvl.artefact.manifest import write_manifest
from beingvl.commands.main import COMMANDS
from beingvl.vocab import LAYOUT_FILE, VocabLayout
from tests.programs import run_program

MOST_SECONDS = 2.0  # of the processor; here for all of them together
LINES = {
    "train-vq --image_path no --output o": "--image_path no: No such file",
    "encode-images --image_path no --vqgan . --output o": "--image_path no: No such file",
    "encode-images --image_path . --vqgan no --output o": "--vqgan no: No such file",
    "encode-images --image_path . --vqgan . --output o": ". has no config.json: it is not a VQ-GAN",
    "train-vbpe --codes no --output o": "no",
    "convert --llama_path no --output o": "--llama_path no: No such file",
    "convert --llama_path . --output o": ". has no config.json: it is not a Hugging Face model f",
    "tokenize --json_path . --model no --output o": "no",
    "tokenize --json_path . --image_path no --model m --output o": "--image_path no: No such file",
    "build-shards --jsonl_path no --output o": "no",
    "train --config no --model no --data no --output o": "no",
    "generate --model no --prompt q": "no does not exist; expected a Being-VL model folder",
    "generate --model MODEL --image no.png --prompt q": "--image no.png: No such file",
    "generate --model MODEL --vbpe MODEL/vocab_layout.json --prompt q": "is not a vBPE vocabulary",
    "generate --model MODEL --vbpe MODEL --prompt q": "vbpe.json does not exist; make it with",
    "evaluate --model MODEL --codes SHARDS --json_path . --output o": "holds 'shards', expected 'v",
    "serve --model SHARDS": "is not a Being-VL model folder",
    "serve --model MODEL --api --api_key no": "--api_key is not a readable file of ASCII",
    "evaluate --model MODEL --json_path s3://a --image_path no --output o": "--image_path no: No",
    "evaluate --model MODEL --data no --output o": "no is not a folder; make it with `beingvl bu",
    "report vbpe no": "no: No such file",
    "report run . --codes no": "--codes no: No such file",
    "export --model MODEL --checkpoint no --output o": "--checkpoint no: No such file",
    "launch --hostfile no -- --config no --model no --data no --output no": "no",
    "preflight --hostfile no": "--hostfile no: No such file",
    "plan --model m --config no": "--config no: No such file",
    "plan --model no": "--model no is neither a model folder nor a config.json, and no known shape",
    "verify no": "no does not exist",
}


def test_a_wrong_path_is_told_before_torch_is_imported(tmp_path: Path) -> None:
    assert {line.split()[0] for line in LINES} == {*COMMANDS}
    places = {"MODEL": tmp_path / "model", "SHARDS": tmp_path / "shards"}
    for kind, folder in places.items():
        folder.mkdir()
        write_manifest(folder, kind.lower(), {}, {})
    layout = VocabLayout(100, 8, 4, 1, 2).to_dict()
    (places["MODEL"] / LAYOUT_FILE).write_text(json.dumps(layout))
    lines = [*LINES]
    for name, folder in places.items():
        lines = [line.replace(name, str(folder)) for line in lines]
    done = run_program("light_answers", *lines, is_measured=True)
    assert done.returncode == 0, done.stderr
    answers = [answer.split() for answer in done.stdout.splitlines()]
    assert [code for code, _ in answers] == ["2"] * len(LINES), done.stderr
    errors = done.stderr.splitlines()
    assert len(errors) == len(LINES), done.stderr
    for (line, expected), error in zip(LINES.items(), errors, strict=True):
        assert expected in error.removeprefix("beingvl "), line
    assert float(answers[-1][1]) < MOST_SECONDS
