"""The scripts that make inputs: one at a time in a folder, and never in a folder of others."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import ChameleonConfig, ChameleonVQVAE, ChameleonVQVAEConfig, JanusConfig

from beingvl.artefact.manifest import MANIFEST_FILE, read_manifest, verify_folder, write_manifest
from beingvl.artefact.owner import owned
from beingvl.images.vqgan import VQGAN
from tests.images.test_vqgan import SIZES
from tests.model.small_models import write_vqgan
from tests.upstream.artefacts import preprocessor_fields

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
import extract_vqgan
import make_digits_dataset
import make_text_llama

Script = Callable[..., int]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """What a Janus checkpoint has of its VQ-GAN."""
    folder = tmp_path_factory.mktemp("checkpoint")
    model = VQGAN.load(write_vqgan(folder / "vqgan")).model
    JanusConfig(vq_config=model.config.to_dict()).save_pretrained(folder)
    tensors = {f"model.vqmodel.{name}": value for name, value in model.state_dict().items()}
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.fixture(params=["digits", "text LLaMA", "VQ-GAN"])
def script(request, tmp_path, checkpoint) -> Script:
    (tmp_path / "texts.txt").write_text("Is seven even? No.\n" * 20)
    sizes = "--vocab_size 260 --hidden_size 32 --num_layers 1 --steps 2 --sequence_length 24"
    texts = ["--texts", str(tmp_path / "texts.txt")]
    return {
        "digits": lambda output, *more: make_digits_dataset.main(
            ["--output_dir", str(output), "--augmentations", "0", *more]
        ),
        "text LLaMA": lambda output, *more: make_text_llama.main(
            ["--output_path", str(output), *texts, *sizes.split(), *more]
        ),
        "VQ-GAN": lambda output, *more: extract_vqgan.main([str(checkpoint), str(output), *more]),
    }[request.param]


def test_a_finished_folder_is_reused_and_replaced_when_asked(script, tmp_path, capsys) -> None:
    assert script(tmp_path / "out") == 0
    content = verify_folder(tmp_path / "out").content_hash
    capsys.readouterr()
    assert script(tmp_path / "out") == 0
    assert "is finished already, with the same inputs: reused" in capsys.readouterr().out
    assert script(tmp_path / "out", "--overwrite") == 0
    assert verify_folder(tmp_path / "out").content_hash == content


def test_a_killed_run_starts_over(script, tmp_path, monkeypatch) -> None:
    def die(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        for module in ("make_digits_dataset", "make_text_llama", "beingvl.images.vqgan"):
            patched.setattr(f"{module}.write_manifest", die)
        script(tmp_path / "out")
    assert any((tmp_path / "out").iterdir()) and not (tmp_path / "out" / MANIFEST_FILE).exists()
    assert script(tmp_path / "out") == 0
    assert read_manifest(tmp_path / "out").files and verify_folder(tmp_path / "out")


@pytest.mark.parametrize("more", [[], ["--overwrite"]])
def test_the_files_of_others_stay(script, tmp_path, capsys, more) -> None:
    """In a folder that is not of ours, and beside what is of ours."""
    theirs = ["thesis.tex", "config.json", "vqgan/model.safetensors", "images/cats/2024-01.png"]
    for name in theirs:
        (tmp_path / "out" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "out" / name).write_text("mine")
    assert script(tmp_path / "out", *more) == 2
    said = "out holds files that beingvl did not write; choose another folder"
    assert said in capsys.readouterr().err
    assert all((tmp_path / "out" / name).read_text() == "mine" for name in theirs)

    assert script(tmp_path / "new") == 0
    (mine := tmp_path / "new" / "thesis.tex").write_text("mine")
    for _ in range(2):
        assert script(tmp_path / "new", "--overwrite") == 0
        assert "thesis.tex" not in read_manifest(tmp_path / "new").files
    assert mine.read_text() == "mine"


@pytest.mark.needs_root
def test_a_finished_folder_on_a_disk_that_only_reads(script, tmp_path, capsys) -> None:
    output = tmp_path / "out"
    assert script(output) == 0
    with ExitStack() as stack:
        for options in (["--bind", output, output], ["-o", "remount,ro,bind", output]):
            subprocess.run(["mount", *options], check=True)
        stack.callback(subprocess.run, ["umount", output], check=True)
        with pytest.raises(OSError, match="Read-only file system"):
            (output / "new").touch()
        assert script(output) == 0
    assert "is finished already" in capsys.readouterr().out


def test_a_checkpoint_is_no_output_and_is_read_where_its_vqgan_is(checkpoint, tmp_path, capsys):
    shutil.copytree(checkpoint, own := tmp_path / "janus", ignore=shutil.ignore_patterns("vqgan"))
    before = {path.name: path.read_bytes() for path in own.iterdir()}
    assert extract_vqgan.main([str(own), str(own), "--overwrite"]) == 2
    assert before == {path.name: path.read_bytes() for path in own.iterdir()}

    fields = json.loads((own / "config.json").read_text())
    (own / "config.json").write_text(json.dumps({"model_type": "foo", "auto_map": {}}))
    assert extract_vqgan.main([str(own), str(tmp_path / "out")]) == 2
    assert "janus/config.json cannot be read" in capsys.readouterr().err

    # one file of two, the one with the VQ-GAN
    (own / "config.json").write_text(json.dumps(fields))
    with safe_open(own / "model.safetensors", "np") as stored:
        index = dict.fromkeys(stored.keys(), "model-1.safetensors") | {
            "lm_head.weight": "model-2.safetensors"
        }
    (own / "model.safetensors").rename(own / "model-1.safetensors")
    (own / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    assert extract_vqgan.main([str(own), str(tmp_path / "out")]) == 0


def test_other_preprocessing_is_a_different_vqgan(tmp_path, capsys) -> None:
    model = ChameleonVQVAE(ChameleonVQVAEConfig(**SIZES, resolution=32))
    given = tmp_path / "chameleon"
    ChameleonConfig(vq_config=model.config.to_dict()).save_pretrained(given)
    weights = {f"model.vqmodel.{name}": value for name, value in model.state_dict().items()}
    save_file(weights, given / "model.safetensors")
    fields = preprocessor_fields(32)
    (given / "preprocessor_config.json").write_text(json.dumps(fields))
    assert extract_vqgan.main([str(given), str(tmp_path / "out")]) == 0
    fields["image_mean"] = [0.1, 0.2, 0.3]
    (given / "preprocessor_config.json").write_text(json.dumps(fields))
    assert extract_vqgan.main([str(given), str(tmp_path / "out")]) == 2
    assert "with different vqgan" in capsys.readouterr().err


def test_the_finished_folder_of_another_step_gets_no_file(script, tmp_path, capsys) -> None:
    (tmp_path / "shards").mkdir()
    write_manifest(tmp_path / "shards", "shards", {}, {})
    assert script(tmp_path / "shards", "--overwrite") == 2
    assert "holds 'shards'" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "shards").iterdir()] == [MANIFEST_FILE]


def test_one_writes_at_a_time(script, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr("beingvl.artefact.owner.PATIENCE_SECONDS", 0)
    with owned(tmp_path / "out"):
        assert script(tmp_path / "out") == 2
    assert f"{tmp_path / 'out'} is in use by" in capsys.readouterr().err
