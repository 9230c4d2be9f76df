"""One of each thing that the rows of docs/how-to/coming-from-being-vl-0.5.md need, made when it is
first asked for; and commands as that page writes them.
"""

from __future__ import annotations

import contextlib
import io
import json
import runpy
import shlex
import subprocess
import sys
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from beingvl.commands.main import main
from tests.launcher import ENVIRONMENT, PYTHON, free_port
from tests.model.small_models import write_base_model, write_sentencepiece_base
from tests.tiny import stage_fields
from tests.upstream import artefacts
from tests.upstream.artefacts import GRID, IMAGE_SIZE, TINY

REPOSITORY = Path(__file__).parents[2]
# Of the published vocabulary 8192, 128256, 136448 and 16389.
SIZES = {
    "init_size": TINY.num_vq,
    "vocab_pad": TINY.num_text,
    "vocab_end": TINY.num_text + TINY.num_vq,
    "new_ids": TINY.num_visual,
}
# Variables of the published stage scripts that decide nothing, and what to use instead.
INSTEAD = {
    "BS": "--set train_micro_batch_size_per_gpu=7",
    "GRAD_ACCUM": "--set train_batch_size=",
    "EPOCH": "--set beingvl.epochs=7",
    "LR": "--set optimizer.params.lr=7",
    "LR_SCHE": "--set beingvl.schedule=7",
    "WARMUP": "--set beingvl.warmup_ratio=7",
    "SAVE_STEPS": "--set beingvl.checkpoint_every_steps=7",
    "MODEL_TYPE": "set MODEL_PATH",
    "TRAIN_WITH_VBPE": "NAME_base.jsonl",
    "SHUFFLE_DATA": "--set beingvl.seed=",
    "FREEZE_TEXT_HEADS": "--set beingvl.trainable=",
    "INIT_IMAGE_HEADS": "`beingvl convert` initialises the visual rows",
}


class Done(NamedTuple):
    """A command that ended; `words` are those it was started with."""

    code: int
    said: str
    words: list[str]


class World:
    """Inputs as a user of Being-VL-0.5 has them, in `folder`, and what beingvl makes of them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    # ---- running ----

    def python(self, script: str, options: str, **paths: object) -> Done:
        """A script with its options, in this process: `--option {name}` takes a path or a size."""
        words = [word.format(**SIZES, **paths) for word in shlex.split(options)]
        said = io.StringIO()
        before, sys.argv = sys.argv, [script, *words]
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            try:
                runpy.run_path(str(REPOSITORY / script), run_name="__main__")
                code: Any = None
            except SystemExit as end:
                code = end.code
            finally:
                sys.argv = before
        return Done(int(code or 0), said.getvalue(), words)

    def bash(self, script: str, *words: object, **variables: object) -> Done:
        environment = ENVIRONMENT | {"PYTHON": PYTHON[-1]}
        environment |= {name: str(value) for name, value in variables.items()}
        done = subprocess.run(
            ["bash", script, *map(str, words)],
            cwd=REPOSITORY,
            env=environment,
            capture_output=True,
            text=True,
        )
        return Done(done.returncode, done.stdout + done.stderr, [script, *map(str, words)])

    def beingvl(self, *words: object) -> Done:
        said = io.StringIO()
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            code = main([str(word) for word in words])
        return Done(code, said.getvalue(), [str(word) for word in words])

    # ---- what a user has ----

    @cached_property
    def llama3(self) -> Path:
        return write_base_model(self.folder / "llama")

    @cached_property
    def llama2(self) -> Path:
        return write_sentencepiece_base(self.folder / "llama2")

    @cached_property
    def tokenizer(self) -> Path:
        return artefacts.write_tokenizer(self.folder / "being-tokenizer")

    @cached_property
    def vqgan(self) -> Path:
        return artefacts.write_vqgan(self.folder / "being-vq-8k")

    @cached_property
    def images(self) -> Path:
        folder = self.folder / "images"
        folder.mkdir()
        random = np.random.default_rng(0)
        for number in range(6):
            pixels = random.integers(0, 256, (IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
            Image.fromarray(pixels).save(folder / f"{number}.png")
        return folder

    @cached_property
    def rows(self) -> list[dict[str, Any]]:
        """Plain LLaVA rows, without categories; every other one has a second turn."""
        turns = [
            {"from": "human", "value": "<image>\nWhat is it?"},
            {"from": "gpt", "value": "Seven."},
            {"from": "human", "value": " Really? "},
            {"from": "gpt", "value": "Yes."},
        ]
        return [
            {
                "id": str(number),
                "image": f"{number}.png",
                "conversations": turns[: 2 + 2 * (number % 2)],
            }
            for number in range(6)
        ]

    @cached_property
    def json(self) -> Path:
        path = self.folder / "train.json"
        path.write_text(json.dumps(self.rows))
        return path

    @cached_property
    def codes(self) -> np.ndarray:
        """[6, 4, 4]"""
        return np.random.default_rng(0).integers(0, 4, (6, *GRID))

    @cached_property
    def npy(self) -> Path:
        path = self.folder / "train_tokens.npy"
        np.save(path, self.codes.reshape(6, -1) + SIZES["vocab_pad"])
        return path

    @cached_property
    def pickle(self) -> Path:
        return artefacts.write_pickle(self.folder / "published.pkl", vocab_pad=SIZES["vocab_pad"])

    @cached_property
    def published_rows(self) -> tuple[Path, Path]:
        folder = self.folder / "published_rows"
        return artefacts.write_rows(folder, "data", self.rows, self.codes)

    @cached_property
    def published_model(self) -> Path:
        return artefacts.write_model(self.folder / "Being-VL")

    @cached_property
    def stage(self) -> Path:
        """A stage's JSON for the sources of its mixture that no row names."""
        path = self.folder / "stage.json"
        path.write_text(json.dumps(stage_fields(mixture={"foundation": 0.8, "perception": 0.2})))
        return path

    # ---- what beingvl makes ----

    def convert(self, output: str, more: str = "", script: str = "convert_llama_to_being") -> Done:
        """The guide's command; `more` are options behind it."""
        options = (
            "--llama_path {llama} --being_tokenizer_config_path {tokenizer} "
            "--being_vq_path {vqgan} --output_path {output} --verify_loading"
        )
        return self.python(
            f"beingvl/utils/{script}.py",
            f"{options} {more}",
            llama=self.llama3,
            tokenizer=self.tokenizer,
            vqgan=self.vqgan,
            output=self.folder / output,
        )

    @cached_property
    def converted(self) -> Done:
        return self.convert(
            "base", "--torch_dtype float32 --vocab_size 300 --extended_vocab_size {new_ids}"
        )

    @cached_property
    def base(self) -> Path:
        assert self.converted.code == 0, self.converted.said
        return self.folder / "base"

    @cached_property
    def trained_vbpe(self) -> Done:
        options = (
            "--data_path {npy} --output_path {output} --num_merges 8 --init_size {init_size} "
            "--vocab_pad {vocab_pad} --vocab_end {vocab_end} --validate_data --save_intermediate"
        )
        return self.python(
            "beingvl/train/train_vbpe.py", options, npy=self.npy, output=self.folder / "vbpe.pkl"
        )

    @cached_property
    def vbpe(self) -> Path:
        assert self.trained_vbpe.code == 0, self.trained_vbpe.said
        return self.folder / "vbpe.pkl"

    def tokenize(self, output: str, more: str = "", mode: str = "pt", **paths: object) -> Done:
        options = (
            f"--mode {mode} --json_path {{json}} --image_path {{images}} --output_dir {{output}} "
            "--model_path {base} --batch_size 4 --num_workers 1 --torch_dtype bfloat16 "
        )
        inputs = {"json": self.json, "images": self.images, "base": self.base} | paths
        output_path = self.folder / output
        script = "beingvl/utils/tokenize_dataset.py"
        return self.python(script, options + more, **inputs, output=output_path)

    @cached_property
    def tokenized(self) -> Done:
        sizes = (
            "--vbpe_path {vbpe} --vbpe_init_size {init_size} --vbpe_vocab_pad {vocab_pad} "
            "--vbpe_vocab_end {vocab_end}"
        )
        return self.tokenize("tokenized", sizes, vbpe=self.vbpe)

    @cached_property
    def imported(self) -> Path:
        output = self.folder / "imported"
        done = self.beingvl("export", "--model", self.published_model, "--output_path", output)
        assert done.code == 0, done.said
        return output

    def train(self, stage: int, *words: object, **variables: object) -> Done:
        """What a stage script would start."""
        paths = {
            "DATA_PATH": self.published_rows[1],
            "OUTPUT_DIR": self.folder / "models" / f"stage-{stage}",
            "LOG_DIR": self.folder / "logs",
            "DS_CONFIG": self.stage,
            "NUM_RANKS": 1,
            "MASTER_PORT": free_port(),
            "DRY_RUN": 1,
        }
        script = f"beingvl/scripts/train-stage-{stage}.sh"
        return self.bash(script, 0, *words, **paths | variables)

    @cached_property
    def paths(self) -> dict[str, Path]:
        """The variables of the stage scripts that work as they did."""
        return {
            "MODEL_PATH": self.base,
            "DATA_PATH": self.published_rows[1],
            "OUTPUT_DIR": self.folder / "models" / "stage-1",
            "LOG_DIR": self.folder / "logs" / "stage-1",
        }

    @cached_property
    def with_paths(self) -> Done:
        return self.train(1, **self.paths)

    @cached_property
    def with_variables(self) -> Done:
        return self.train(1, self.base, **dict.fromkeys(INSTEAD, 7))
