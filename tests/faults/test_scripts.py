"""The scripts that make inputs: one at a time in a folder, and never in a folder of others."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import save_file
from transformers import JanusConfig

from beingvl.artefact.manifest import MANIFEST_FILE, read_manifest, verify_folder
from beingvl.artefact.owner import owned
from beingvl.images.vqgan import VQGAN
from tests.model.small_models import write_vqgan

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


def test_the_files_of_others_stay(script, tmp_path, capsys) -> None:
    (thesis := tmp_path / "out" / "thesis.tex").parent.mkdir()
    thesis.write_text("mine")
    assert script(tmp_path / "out") == 2
    assert "exists and holds files; choose another folder" in capsys.readouterr().err
    assert [path.name for path in thesis.parent.iterdir()] == ["thesis.tex"]
    assert thesis.read_text() == "mine"


def test_one_writes_at_a_time(script, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr("beingvl.artefact.owner.PATIENCE_SECONDS", 0)
    with owned(tmp_path / "out"):
        assert script(tmp_path / "out") == 2
    assert f"{tmp_path / 'out'} is in use by" in capsys.readouterr().err
