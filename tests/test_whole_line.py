"""All steps of the line, stage 1 on two ranks, on a small part of the quickstart's data: the
three entry points of the training guide word for word, the other commands in this process.
"""

import json
import shlex
import subprocess
from pathlib import Path

import pytest

from beingvl.artefact.manifest import read_manifest, verify_folder
from beingvl.stage.stage_config import load_stage_config
from tests import command as command_line
from tests.command import argv
from tests.launcher import ENVIRONMENT, PYTHON, free_port, stage_words
from tests.programs import run_program

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("line")


def run(command: list, **more: object) -> subprocess.CompletedProcess:
    environment = {
        **ENVIRONMENT,
        "MASTER_PORT": str(free_port()),
        **{name: str(value) for name, value in more.items()},
    }
    words = [str(word) for word in command]
    return subprocess.run(
        words, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=600
    )


def must(command: list, **more: object) -> str:
    done = run(command, **more)
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def beingvl(command: str, *paths: Path, **options: object) -> None:
    """A command in this process, which has imported everything already."""
    assert command_line.beingvl(command, *paths, **options) == 0


def test_1_data_vqgan_codes_and_vbpe(work) -> None:
    script = [*PYTHON, "scripts/make_digits_dataset.py", "--output_dir", work / "data"]
    must([*script, "--augmentations", 0])
    for split, number in (("train", 240), ("test", 12)):
        rows = json.loads((work / f"data/{split}.json").read_text())
        (work / f"{split}.json").write_text(json.dumps(rows[:number]))
    validation = work / "data/images/validation"
    beingvl("train-vq", image_path=validation, output_path=work / "being-vq", steps=6)
    for split in ("train", "test"):
        beingvl(
            "encode-images",
            image_path=work / "data/images",
            json_path=work / f"{split}.json",
            vq_path=work / "being-vq",
            output_path=work / "vq_codes" / split,
        )
    beingvl(
        "train-vbpe",
        data_path=work / "vq_codes/train",
        output_path=work / "vbpe.json",
        num_merges=16,
    )


def test_2_the_guides_converter_command(work) -> None:
    script = [*PYTHON, "scripts/make_text_llama.py", "--texts", work / "data/texts.txt"]
    must([*script, "--output_path", work / "llama", "--steps", 3])
    inputs = {"llama_path": work / "llama", "being_vq_path": work / "being-vq", "num_merges": 16}
    beingvl("convert", **inputs, output_path=work / "first")
    base = work / "models/beingvl/base"
    words = [word for name, value in inputs.items() for word in (f"--{name}", value)]
    words += ["--being_tokenizer_config_path", work / "first", "--output_path", base]
    converter = [*PYTHON, "beingvl/utils/convert_llama_to_being.py"]
    must([*converter, *words, "--verify_loading"])
    assert (base / "model.safetensors").read_bytes() == (
        work / "first/model.safetensors"
    ).read_bytes()


def test_3_tokenize_and_shards(work) -> None:
    inputs = {
        "json_path": work / "train.json",
        "model_path": work / "models/beingvl/base",
        "vbpe_path": work / "vbpe.json",
    }
    places = {"output_dir": work / "pt", "dataset_name": "pretrain_data"}
    beingvl("tokenize", mode="pt", **inputs, vq_codes=work / "vq_codes/train", **places)
    # straight from the images, with dashes
    inputs = {name.replace("_", "-"): value for name, value in inputs.items()}
    places = {"output-dir": work / "sft", "dataset-name": "data"}
    images = {"image-path": work / "data/images"}
    beingvl("tokenize", mode="sft", **inputs, **images, **places)
    jsonl = work / "sft/data_vbpe.jsonl"
    assert jsonl.read_bytes() == (work / "pt/pretrain_data_vbpe.jsonl").read_bytes()
    beingvl("build-shards", jsonl_path=jsonl, output_path=work / "shards")


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_4_the_guides_stage_scripts(work, stage: int) -> None:
    environment = {
        "OUTPUT_DIR": work / f"models/beingvl/stage-{stage}",
        "LOG_DIR": work / f"logs/stage-{stage}",
        "DS_CONFIG": REPOSITORY / f"ds_configs/quickstart-stage{stage}.json",
        "DATA_PATH": work / "pt/pretrain_data_vbpe.jsonl" if stage == 1 else work / "shards",
        **(
            {"MODEL_PATH": work / "models/beingvl/base", "VBPE_PATH": work / "vbpe.json"}
            if stage == 1
            else {}
        ),
    }
    if stage > 1:  # what two ranks do, stage 1 has shown
        environment["NUM_RANKS"] = 1
    script = f"beingvl/scripts/train-stage-{stage}.sh"
    shown = must(["bash", script, 0, "--set", "beingvl.max_steps=2"], **environment)
    assert f"stage {stage}: start model" in shown
    output = work / f"models/beingvl/stage-{stage}"
    verify_folder(output / "final")
    assert load_stage_config(output / "stage.json").beingvl.max_steps == 2  # as it was run
    assert (output / "metrics.jsonl").is_file()
    assert list((work / f"logs/stage-{stage}").glob("events.out.tfevents*"))
    if stage == 1:
        assert (
            read_manifest(work / "pt/pretrain_data_vbpe_shards").details["merged_images"]
            == "decoded"
        )
    if stage > 1:  # it found the previous stage's output by itself
        before = read_manifest(work / f"models/beingvl/stage-{stage - 1}/final").content_hash
        assert read_manifest(output / "final").details["identity"]["start_model"] == before


def test_5_stage_scripts_say_what_is_missing(work) -> None:
    def complaint(*words: object, **environment: object) -> str:
        done = run(
            ["bash", *words],
            OUTPUT_DIR=work / "none/stage-2",
            LOG_DIR=work / "logs/none",
            **environment,
        )
        assert done.returncode == 2, done.stderr
        return done.stderr

    assert "run stage 1 first" in complaint(
        "scripts/train-stage-2.sh", 0, DATA_PATH=work / "shards"
    )
    final = work / "models/beingvl/stage-1/final"
    assert "does not exist" in complaint(
        "scripts/train-stage-2.sh", 0, MODEL_PATH=final, DATA_PATH=work / "none"
    )
    assert "hostfile-99 does not exist" in complaint(
        "scripts/train-stage-2.sh", 99, MODEL_PATH=final, DATA_PATH=work / "shards"
    )
    assert "<master_node_id>" in complaint("scripts/train-stage-2.sh")


def test_6_a_direct_launch(work) -> None:
    launch = ["deepspeed", "--num_gpus", 1, "--master_port", free_port()]
    launch += ["--module", "beingvl.train.train_stage"]
    config = Path("ds_configs/quickstart-stage1.json")
    fields = stage_words(config, work / "models/beingvl/base", work / "shards", work / "direct")
    must([*launch, *fields, "--set", "beingvl.epochs=1", "beingvl.max_steps=1"])
    verify_folder(work / "direct/final")


def test_7_answers_and_scores(work) -> None:
    final, vbpe = work / "models/beingvl/stage-3/final", work / "vbpe.json"
    image = next((work / "data/images/test").glob("*.png"))
    beingvl("generate", model=final, vbpe_path=vbpe, image=image, prompt="Which digit is this?")
    held_out = {"json_path": work / "test.json", "vq_codes": work / "vq_codes/test"}
    beingvl("evaluate", model=final, vbpe_path=vbpe, **held_out, output_path=work / "eval")
    summary = json.loads((work / "eval/scores.json").read_text())
    assert set(summary["questions"]) == {
        "Which digit is this?",
        "Is it even?",
        "Is it greater than four?",
    }
    beingvl("verify", *[path.parent for path in work.rglob("manifest.json")])


def test_8_what_is_finished_already_is_said_without_torch(work) -> None:
    base, vbpe, rows = work / "models/beingvl/base", work / "vbpe.json", work / "pt"
    learn = {"codes": work / "vq_codes/train", "output": work / "vbpe", "num_merges": 16}
    beingvl("train-vbpe", **learn)
    lines = [
        argv("train-vbpe", **learn),
        argv(
            "tokenize",
            mode="pt",
            json_path=work / "train.json",
            model=base,
            vbpe=vbpe,
            codes=work / "vq_codes/train",
            output=rows,
            dataset_name="pretrain_data",
        ),
        argv("build-shards", jsonl_path=work / "sft/data_vbpe.jsonl", output=work / "shards"),
        argv(
            "train",
            config="ds_configs/quickstart-stage1.json",
            model=base,
            data=work / "shards",
            output=work / "direct",
            set=["beingvl.epochs=1", "beingvl.max_steps=1"],
        ),
    ]
    done = run_program("light_answers", *map(shlex.join, lines), is_measured=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("finished already") == 4, done.stdout + done.stderr
