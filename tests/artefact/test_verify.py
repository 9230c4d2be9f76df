"""`beingvl verify` of models, checkpoints and evaluations: what no hash can tell, because it was
written that way.
"""

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from beingvl.artefact.files import to_json
from beingvl.artefact.manifest import read_manifest, write_manifest
from beingvl.commands import main as cli
from beingvl.train.checkpoint import CheckpointState, CheckpointWriter, rank_file
from beingvl.train.probe import Probe, save_probe
from tests.tiny import LAYOUT, write_model


def seal(folder: Path) -> None:
    """Make the manifest fit what lies in the folder now."""
    manifest = read_manifest(folder)
    write_manifest(folder, manifest.kind, manifest.counts, manifest.lineage, manifest.details)


def refuses(folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    seal(folder)
    capsys.readouterr()
    assert cli.main(["verify", str(folder)]) == 2
    return capsys.readouterr().err


def test_a_model_folder_fits_its_config_its_index_and_its_vocabulary(tmp_path, capsys) -> None:
    folder = write_model(tmp_path / "model")
    assert cli.main(["verify", str(folder)]) == 0
    weights, config, layout = (
        folder / name for name in ("model.safetensors", "config.json", "vocab_layout.json")
    )
    whole, fields, ids = weights.read_bytes(), config.read_text(), layout.read_text()

    weights.write_bytes(whole[:-4])
    assert "it was cut off" in refuses(folder, capsys)
    weights.write_bytes(whole)
    config.write_text(fields.replace('"intermediate_size": 64', '"intermediate_size": 32'))
    assert "are not of the same model" in refuses(folder, capsys)
    config.write_text(fields)
    layout.write_text(ids.replace('"num_merges": 8', '"num_merges": 9'))
    assert f"has {LAYOUT.size} rows, vocab_layout.json has {LAYOUT.size + 1} ids" in refuses(
        folder, capsys
    )
    layout.write_text(ids.replace('"num_merges": 8', '"num_merges": 7'))
    assert "is not the vocabulary of the manifest's lineage" in refuses(folder, capsys)
    layout.write_text(ids)
    (folder / "old.safetensors").write_bytes(whole)
    assert "old.safetensors is a weight file that model.safetensors does not name" in refuses(
        folder, capsys
    )


def write_checkpoint(folder: Path) -> Path:
    """Parameter `a` `[2, 3]`, of which rank 0 has four elements and rank 1 two."""
    spans = [[0, 4], [4, 6]]
    state = CheckpointState(
        1, 1, 2, {"lineage": {}}, {"a": {"shape": [2, 3], "spans": spans, "adam_steps": 1}}
    )
    probe = Probe(torch.tensor([1]), torch.tensor([0]))
    writers = [CheckpointWriter(rank, lambda value: [value]) for rank in (0, 1)]
    for writer, span in zip(writers, spans, strict=True):
        tensors = {
            f"a.{key}": torch.arange(*span).float() for key in ("master", "exp_avg", "exp_avg_sq")
        }
        writer.begin(
            folder,
            state,
            tensors.items(),
            lambda folder: save_probe(folder, probe, torch.zeros(1, 4)),
        )
    for writer in reversed(writers):  # rank 0 writes the manifest, of all ranks' files
        writer.commit()
    return folder


def test_the_slices_of_a_checkpoint_make_whole_parameters(tmp_path, capsys) -> None:
    folder = write_checkpoint(tmp_path / "checkpoints" / "step-00000001")
    write_model(tmp_path / "final")
    assert cli.main(["verify", str(tmp_path)]) == 0  # the stage's folder
    shown = capsys.readouterr().out
    assert f"{folder}: checkpoint, " in shown and f"{tmp_path / 'final'}: model, " in shown
    state, slices = folder / "state.json", folder / rank_file(1, 2)
    text, whole = state.read_text(), load_file(slices)

    for change in ({"shape": [2, 4]}, {"spans": [[0, 3], [4, 6]]}, {"spans": [[0, 4], [3, 6]]}):
        fields = json.loads(text)
        fields["parameters"]["a"] |= change
        state.write_text(to_json(asdict(CheckpointState(**fields))))
        assert "of a do not make its shape" in refuses(folder, capsys)
    state.write_text(text)
    for damaged, found in (
        (whole | {"a.exp_avg": torch.zeros(1)}, 4),
        ({"a.master": whole["a.master"]}, 0),
    ):
        save_file(damaged, slices)
        assert f"{slices.name} holds {found} of 8 bytes of a.exp_avg" in refuses(folder, capsys)
    save_file(whole, slices)
    (folder / "probe.safetensors").write_bytes(b"{}")
    assert "probe.safetensors is missing or damaged" in refuses(folder, capsys)


def test_an_evaluation_has_a_readable_line_for_every_row(tmp_path, capsys) -> None:
    scores, lines = tmp_path / "scores.json", tmp_path / "predictions.jsonl"
    good = '{"id": 1, "prediction": "yes\u2028"}\n'
    scores.write_text('{"rows": 2}')
    lines.write_text(2 * good)
    write_manifest(tmp_path, "evaluation", {"rows": 2}, {})
    assert cli.main(["verify", str(tmp_path)]) == 0
    for text, message in (
        (good, "predictions.jsonl has 1 lines, the manifest 2 rows"),
        (good + "{", "line 2: no 'prediction'"),
        (good + '{"id": 2}\n', "line 2: no 'prediction'"),
    ):
        lines.write_text(text)
        assert message in refuses(tmp_path, capsys)
    for text, message in (
        ('{"rows": 3}', "scores.json is of 3 rows, the manifest of 2"),
        ("{", "scores.json cannot be read"),
    ):
        scores.write_text(text)
        assert message in refuses(tmp_path, capsys)
    lines.unlink()
    scores.write_text('{"rows": 2}')
    (tmp_path / "samples.jsonl").write_text('{"loss_sum": 1}\n{"loss": 1}\n')
    assert "samples.jsonl, line 2: no 'loss_sum'" in refuses(tmp_path, capsys)
