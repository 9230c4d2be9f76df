"""A model that was trained with anchors is asked and draws with anchors; the readable twin says
which.
"""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from beingvl.artefact.manifest import MANIFEST_FILE, read_manifest, write_manifest
from beingvl.errors import InputError
from beingvl.inference.draw import before_drawing
from beingvl.inference.model import BeingVL
from beingvl.vbpe.published import LegacyVisualBPE
from beingvl.vbpe.reference import positions_reference

KINDS = ["running", "anchor"]


@pytest.fixture(scope="module", params=KINDS)
def model(request, run_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> BeingVL:
    folder = tmp_path_factory.mktemp("final") / "final"
    shutil.copytree(run_folder / "stage-3" / "final", folder)
    manifest = read_manifest(folder)
    (folder / MANIFEST_FILE).unlink()
    details = {"identity": {}, "image_positions": request.param}
    write_manifest(folder, "model", {}, manifest.lineage, details)
    return BeingVL(folder, run_folder / "vbpe").load_model(device="cpu")


def twin(model: BeingVL, ids: list[int]) -> list[int]:
    if model.image_positions == "running":
        return list(range(len(ids)))
    image_ids = [max(-1, token - model.layout.first_image_id) for token in ids]
    return positions_reference(image_ids, model.vbpe.num_codes, model.vbpe.merges.tolist())


def with_image(model: BeingVL, text: str, seed: int) -> list[int]:
    """A prompt with an image of which some cells are merged."""
    codes = np.random.default_rng(seed).integers(1, 4, (1, 4, 4)).astype(np.uint16)
    ids = model.tokenize_with_tokens(text, model.codes2tok(codes))
    assert twin(model, ids)[-1] > len(ids) - 1 or model.image_positions == "running"
    return ids


def test_a_batch_answers_as_a_loop_of_the_twin(model: BeingVL) -> None:
    prompts = [with_image(model, "hi", 0), with_image(model, "a longer question", 1)]
    prompts.append(model.tokenize("no image"))
    answers = model.continue_token_sequences(prompts, 5)
    for prompt, answer in zip(prompts, answers, strict=True):
        ids, positions = [*prompt], twin(model, prompt)
        for token in [*answer, model.layout.eos_id][:5]:
            arguments = {
                "input_ids": torch.tensor([ids]),
                "position_ids": torch.tensor([positions]),
            }
            everything = torch.ones(1, len(ids), dtype=torch.long)
            with torch.no_grad():
                logits = model.model(**arguments, attention_mask=everything, use_cache=False).logits
            assert int(logits[0, -1, : model.layout.size].argmax()) == token
            ids, positions = [*ids, token], [*positions, positions[-1] + 1]


def test_what_is_drawn_stands_where_it_would_be_trained(model: BeingVL) -> None:
    seen: list[torch.Tensor] = []
    rotary = model.model.get_decoder().rotary_emb
    hook = rotary.register_forward_hook(
        lambda module, args, kwargs, out: seen.append(kwargs.get("position_ids", args[-1])),
        with_kwargs=True,
    )
    torch.manual_seed(0)
    with hook:
        first, second = model.draw(["", "a seven"])
    prompt = before_drawing(model, "a seven", [], True)
    row = twin(model, [*prompt, *second.tolist(), model.layout.eoi_id])
    found = torch.cat(seen, 1)[1].tolist()
    assert found[: len(row) - 1] == row[:-1]
    assert (len(first) and max(np.diff(row)) > 1) or model.image_positions == "running"


def test_the_context_counts_positions_and_a_published_vbpe_has_none(model: BeingVL) -> None:
    prompt = with_image(model, "hi", 0)
    free = model.context - twin(model, prompt)[-1] - 1
    model.check_length(prompt, free)
    with pytest.raises(InputError, match="do not fit the model's context"):
        model.check_length(prompt, free + 1)
    if model.image_positions == "anchor":
        other = BeingVL(model.model_path)
        other.vbpe = LegacyVisualBPE(16, np.array([[1, 2]]))
        with pytest.raises(InputError, match="whose tokens have no anchor"):
            other.position_ids(prompt)
