"""Text logits after training new rows only are bit-identical to the base model's; a touched
text weight is found; KL by hand.
"""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from beingvl.artefact.hashes import hash_bytes
from beingvl.artefact.manifest import read_manifest, write_manifest
from beingvl.commands.main import main
from beingvl.evaluation.results import read_summary
from beingvl.evaluation.text_parity import PROBE, kl_divergence
from tests.damage import list_anew
from tests.tiny import LAYOUT, write_model

ROWS_ONLY = [{"match": "visual_rows"}, {"match": ".*", "train": False}]
LAYERS_TOO = [{"match": "visual_rows"}, {"match": "layers[:25%]"}, {"match": ".*", "train": False}]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("parity") / "base")


def trained(
    base: Path, folder: Path, rules: list[dict], *changed: str, start: str | None = None
) -> Path:
    """A copy of `base` as a finished stage leaves it: new rows moved, and the tensors `changed`
    a little.
    """
    shutil.copytree(base, folder)
    manifest = read_manifest(folder)
    tensors = load_file(folder / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name][LAYOUT.num_text :] += 0.5
    for name in changed:
        tensors[name][: LAYOUT.num_text] += 0.01 * torch.randn(
            tensors[name][: LAYOUT.num_text].shape
        )
    (folder / "manifest.json").unlink()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    identity = {"start_model": start or manifest.content_hash, "trainable": rules}
    write_manifest(folder, "model", manifest.counts, manifest.lineage, {"identity": identity})
    return folder


def parity(model: Path, base: Path, output: Path) -> int:
    return main(
        ["evaluate", f"--model={model}", f"--text_parity={base}", f"--output_path={output}"]
    )


def test_stage_1_leaves_text_logits_alone(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = trained(base, tmp_path / "final", ROWS_ONLY)
    assert parity(model, base, tmp_path / "parity") == 0
    found = read_summary(tmp_path / "parity")
    assert found["equal"] and found["equal_is_expected"] and found["rows"] == len(PROBE)
    scores = found["scores"]
    assert (scores["max_logit_difference"], scores["kl_nats"], scores["same_top_token"]) == (
        0,
        0,
        1,
    )
    assert 0 < scores["new_id_probability"] < 1
    assert "bit-identical" in capsys.readouterr().out
    assert parity(model, base, tmp_path / "parity") == 0 and "reused" in capsys.readouterr().out


@pytest.mark.parametrize(
    "tensor", ["model.layers.2.mlp.up_proj.weight", "lm_head.weight", "model.embed_tokens.weight"]
)
def test_a_touched_text_weight_after_stage_1_is_exit_code_1(
    base: Path, tmp_path: Path, tensor: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model = trained(base, tmp_path / "final", ROWS_ONLY, tensor)
    assert parity(model, base, tmp_path / "parity") == 1
    assert "DIFFERENT: only visual rows were trained" in capsys.readouterr().out
    assert parity(model, base, tmp_path / "parity") == 1, "reused, and still different"


def test_later_stages_are_told_by_their_divergence(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = trained(base, tmp_path / "final", LAYERS_TOO, "model.layers.0.mlp.up_proj.weight")
    assert parity(model, base, tmp_path / "parity") == 0
    found = read_summary(tmp_path / "parity")
    assert not found["equal"] and not found["equal_is_expected"]
    assert 0 < found["scores"]["kl_nats"] < 1 and found["scores"]["max_logit_difference"] > 0
    assert "kl_nats" in capsys.readouterr().out
    rows_again = trained(
        base,
        tmp_path / "again",
        ROWS_ONLY,
        "model.layers.0.mlp.up_proj.weight",
        start="sha256:another",
    )
    assert parity(rows_again, base, tmp_path / "of-again") == 0, (
        "it did not start from this base, so nothing is promised"
    )


def test_a_plain_base_model_and_a_converted_one_agree(base: Path, tmp_path: Path) -> None:
    """The Hugging Face folder that the base was converted from has text rows only."""
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(base)
    plain.resize_token_embeddings(LAYOUT.num_text)
    plain.save_pretrained(tmp_path / "plain")
    assert parity(base, tmp_path / "plain", tmp_path / "converted") == 0
    assert read_summary(tmp_path / "converted")["equal_is_expected"]
    assert (
        parity(
            trained(base, tmp_path / "final", ROWS_ONLY), tmp_path / "plain", tmp_path / "trained"
        )
        == 0
    )
    assert read_summary(tmp_path / "trained")["equal"]
    write_manifest(tmp_path / "plain", "model", {}, {})  # as the quickstart's text model has one
    assert (
        parity(
            trained(base, tmp_path / "final-2", ROWS_ONLY),
            tmp_path / "plain",
            tmp_path / "trained-2",
        )
        == 0
    )
    assert read_summary(tmp_path / "trained-2")["equal_is_expected"]


def test_kl_by_hand() -> None:
    base, model = torch.tensor([[0.0, 1.0, -1.0]]), torch.tensor([[0.5, 0.5, 0.0]])
    p, q = base.softmax(-1), model.softmax(-1)
    assert float(kl_divergence(base, model)) == pytest.approx(
        float((p * (p / q).log()).sum()), rel=1e-5
    )
    assert float(kl_divergence(base, base)) == 0


def test_refusals(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from beingvl.vocab import VocabLayout

    other = VocabLayout(num_text=258, num_vq=16, num_merges=9, bos_id=256, eos_id=257)
    smaller = VocabLayout(num_text=200, num_vq=4, num_merges=1, bos_id=0, eos_id=1)
    write_model(tmp_path / "other", other)
    plain = write_model(tmp_path / "smaller", smaller)
    (plain / "vocab_layout.json").unlink()  # as somebody else's folder
    list_anew(plain)
    (tmp_path / "empty").mkdir()
    for model, against, message in [
        (base, tmp_path / "none", "none: No such file or directory"),
        (base, tmp_path / "empty", "has no config.json"),
        (base, tmp_path / "other", "different vocab"),
        (base, plain, "it has a different base model"),
        (tmp_path / "empty", base, "it is not a Being-VL model folder"),
    ]:
        assert parity(model, against, tmp_path / "parity") == 2, message
        assert message in capsys.readouterr().err
    assert not (tmp_path / "parity").exists()


def test_the_probe_is_fixed() -> None:
    """Other texts would make other numbers: a change here must be meant."""
    assert (
        hash_bytes("\n".join(PROBE).encode())
        == "blake3:fb3ff04c04fb25a070c3d8cb08ff89d2a2d97ba5eb9da489cb35d24bbf3a95dd"
    )
