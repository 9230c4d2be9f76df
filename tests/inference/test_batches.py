"""A batch gives the answers that its prompts give alone, also when images are read once for all."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from beingvl import BeingVL
from beingvl.inference.back_end import Sampling, TransformersBackEnd
from beingvl.inference.batches import reading_order
from beingvl.vocab import VocabLayout
from tests.tiny import write_model

LAYOUT = VocabLayout(num_text=512, num_vq=64, num_merges=128, bos_id=256, eos_id=257)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> BeingVL:
    folder = write_model(tmp_path_factory.mktemp("made") / "model", LAYOUT, num_layers=2)
    model = BeingVL(folder).load_model(device="cpu")
    for parameter in model.model.parameters():
        if parameter.dim() == 2:
            parameter.data *= 8  # fresh weights hardly attend
    return model


def prompts(num_images: int, num_questions: int) -> list[list[int]]:
    """Every question about every image; images of 20 to 40 tokens, questions of 3 to 12."""
    random = np.random.default_rng(0)

    def ids(least: int, most: int, first: int, end: int) -> list[int]:
        return random.integers(first, end, random.integers(least, most)).tolist()

    images = [ids(20, 40, LAYOUT.first_image_id, LAYOUT.size) for _ in range(num_images)]
    questions = [ids(3, 12, 0, 256) for _ in range(num_questions)]
    heads = [[LAYOUT.bos_id, LAYOUT.boi_id, *image, LAYOUT.eoi_id] for image in images]
    return [[*head, *question, LAYOUT.sep_id] for question in questions for head in heads]


def test_images_that_rows_share_are_read_once_and_the_answers_stay(model: BeingVL) -> None:
    read: list[int] = []
    hook = model.model.base_model.register_forward_pre_hook(
        lambda module, args, given: read.append(given["input_ids"].numel()), with_kwargs=True
    )
    asked = prompts(num_images=5, num_questions=4)
    alone = model.continue_token_sequences(asked, 1, batch_size=1)
    read_alone = sum(read)
    read.clear()
    assert model.continue_token_sequences(asked, 1) == alone
    assert sum(read) * 2 < read_alone
    hook.remove()
    text = [ids[-6:] for ids in asked]
    mixed = [*asked, *text, *prompts(1, 1)]
    longer = model.continue_token_sequences(mixed, 8, batch_size=1)
    assert model.continue_token_sequences(mixed, 8, batch_size=6) == longer
    assert model.continue_token_sequences(mixed, 8) == longer


@pytest.mark.parametrize("cells", [1, 2], ids=["running", "two cells per image token"])
@pytest.mark.parametrize("stop_text", ["", "hi"])
def test_the_next_prompt_takes_the_place_of_an_answer_that_has_ended(
    model: BeingVL, monkeypatch: pytest.MonkeyPatch, cells: int, stop_text: str
) -> None:
    """The same tokens as alone, computed for fewer rows than a batch that waits for its longest."""

    def positions(ids: list[int]) -> np.ndarray:
        is_image = np.array(ids) >= LAYOUT.first_image_id
        return np.cumsum(np.where(is_image, cells, 1)) - 1

    monkeypatch.setattr(model, "position_ids", positions)
    if stop_text:
        monkeypatch.setattr(BeingVL, "stop_texts", (stop_text,))
        monkeypatch.setattr(model, "decode_text", lambda ids: " ".join(spelt(ids)))
    head = model.model.lm_head.weight.data
    original = head[LAYOUT.eos_id].clone()
    head[LAYOUT.eos_id] *= 2  # ends answers at different lengths
    rows: list[int] = []
    hook = model.model.register_forward_pre_hook(
        lambda module, args, given: rows.append(len(given["input_ids"])), with_kwargs=True
    )
    asked = prompts(num_images=6, num_questions=5)
    asked = [*asked, *[ids[-6:] for ids in asked]]
    ended: list[int] = []

    def on_batch(indices: list[int], answers: list[list[int]]) -> None:
        ended.extend(indices)

    alone = [model.continue_token_sequences([ids], 40)[0] for ids in asked]
    rows.clear()
    found = model.continue_token_sequences(asked, 40, batch_size=12, on_batch=on_batch)
    lengths = sorted(map(len, alone))
    assert found == alone and sorted(ended) == list(range(len(asked)))
    assert lengths[0] < 8 < lengths[-1]
    order = reading_order(asked, LAYOUT.eoi_id)
    waits = sum(
        12 * max(len(alone[index]) for index in order[start : start + 12])
        for start in range(0, len(order), 12)
    )
    assert sum(rows) < 0.8 * waits
    hook.remove()
    head[LAYOUT.eos_id] = original


def spelt(ids: list[int]) -> list[str]:
    return ["hi" if token % 16 == 0 else "." for token in ids]


def test_beams_of_prompts_that_share_images_are_those_of_each_alone(model: BeingVL) -> None:
    asked = prompts(num_images=1, num_questions=2)
    alone = model.continue_token_sequences(asked, 6, batch_size=1, num_beams=2)
    assert model.continue_token_sequences(asked, 6, num_beams=2) == alone


def test_those_who_ask_the_server_about_one_image_get_their_own_answers(model: BeingVL) -> None:
    asked = prompts(num_images=2, num_questions=6)
    back_end = TransformersBackEnd(model)

    def answer(ids: list[int]) -> list[int]:
        pieces = back_end.answer(ids, 6, Sampling())
        return [token for piece in pieces if not isinstance(piece, int) for token in piece]

    with ThreadPoolExecutor(len(asked)) as pool:
        found = list(pool.map(answer, asked))
    assert found == model.continue_token_sequences(asked, 6, batch_size=1)


def test_prompts_of_one_image_share_a_batch_and_else_those_of_like_length() -> None:
    eoi = LAYOUT.eoi_id
    shared = [[1, eoi, 5, 5], [2, eoi, 5], [1, eoi, 5], [2, eoi, 5, 5]]
    assert reading_order(shared, eoi) == [2, 0, 1, 3]
    alone = [[1, 2, eoi, 5], [2, eoi, 5, 5, 5], [3, eoi, 5]]
    assert reading_order(alone, eoi) == [2, 0, 1]
