"""What the adapter makes of lmms-eval's requests: the class's own answers, images where tasks
put none, options, refusals.

The class that lmms-eval loads needs lmms-eval itself: `python -m tests.benchmarks.lmms_task` runs
one of its tasks.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from PIL import Image

from beingvl.data.conversation import TextEncoder, build_sequence
from beingvl.errors import InputError
from beingvl.evaluation.lmms_eval_requests import (
    Question,
    answer_questions,
    as_flag,
    open_model,
)
from beingvl.inference.model import BeingVL
from beingvl.inference.streaming import cut_at
from tests.inference.published_template import (
    PUBLISHED,
    SAYS_YEP,
    batches_of,
    taught_to_say,
)
from tests.tiny import LAYOUT

GREEDY = {"max_new_tokens": 6, "temperature": 0, "top_p": 1.0, "num_beams": 1, "do_sample": False}


@pytest.fixture(scope="module")
def model(run_folder: Path) -> BeingVL:
    model, device = open_model(
        str(run_folder / "stage-3" / "final"), str(run_folder / "vbpe"), None, "cpu"
    )
    assert (
        device == "cpu" and model.model.dtype.is_floating_point and model.model.dtype.itemsize == 4
    )
    return model


@pytest.fixture(scope="module")
def images(run_folder: Path) -> list[Image.Image]:
    return [
        Image.open(path)
        for path in sorted((run_folder / "data" / "images" / "test").glob("*.png"))[:3]
    ]


def test_answers_are_those_of_the_class(model: BeingVL, images: list[Image.Image]) -> None:
    """Requests of unlike options and of none, one and two images keep their order; missing
    placeholders are added.
    """
    requests = [
        Question("Is it even?", [images[0]], GREEDY),
        Question("Which?", [images[1]], {**GREEDY, "max_new_tokens": 3}),
        Question("hi", [], GREEDY),
        Question("Same?", [images[0], images[1]], GREEDY),
        Question("<image> and <image>, same?", [images[1], images[2]], GREEDY),
        Question("<image>\nIs it even?", [images[2]], GREEDY),
    ]
    told: list[int] = []
    for with_vbpe, method in ((True, model.generate_with_vbpe), (False, model.generate)):
        expected = [
            method(["Is it even?"], [images[0]], 6),
            method(["Which?"], [images[1]], 3),
            method(["hi"], None, 6),
            method(["<image><image>Same?"], [images[:2]], 6),
            method(["<image> and <image>, same?"], [images[1:]], 6),
            method(["Is it even?"], [images[2]], 6),
        ]
        assert answer_questions(model, requests, 2, with_vbpe, told.append) == [
            answer.strip() for (answer,) in expected
        ]
    assert sum(told) == 12 and max(told) == 2


def test_a_model_of_the_published_template_is_asked_and_stops_in_it(
    run_folder: Path, tmp_path: Path, images: list[Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = taught_to_say(run_folder, tmp_path / "final", SAYS_YEP)
    model, _ = open_model(str(folder), str(run_folder / "vbpe"), None, "cpu")
    encoder, batches = TextEncoder(folder, LAYOUT), batches_of(model, monkeypatch)
    requests = [
        Question("<image>\nIs it even?", [images[0]], {**GREEDY, "max_new_tokens": 40}),
        Question("hi", [], {**GREEDY, "max_new_tokens": 40}),
    ]
    for with_vbpe in (True, False):
        tokens = model.img2tok(images[:1], with_vbpe)
        expected = [
            [build_sequence([(text, None)], shown, encoder, LAYOUT, PUBLISHED).input_ids]
            for text, shown in (("<image>\nIs it even?", tokens), ("hi", []))
        ]
        answers = answer_questions(model, requests, 1, with_vbpe, lambda count: None)
        assert answers == ["yep", "yep"], "nothing of </s> and of what would follow it"
        assert batches == expected
        batches.clear()


def test_stop_strings_cut_answers() -> None:
    assert cut_at("yes ASSISTANT: no", ["ASSISTANT:", "\n"]) == "yes"
    assert (
        cut_at("yes\nno", "\n") == "yes"
        and cut_at(" yes ", None) == "yes"
        and cut_at("yes", [""]) == "yes"
    )


def test_flags_arrive_as_text_too() -> None:
    assert [as_flag(value) for value in (True, "True", "1", "false", "", False, 0)] == [
        True,
        True,
        True,
        False,
        False,
        False,
        False,
    ]


def test_refusals(model: BeingVL, images: list[Image.Image], run_folder: Path) -> None:
    for request, message in [
        (Question("hi", [], {"num_beams": 5}), "num_beams is 5"),
        (Question("hi", [], {"penalty": 1}), "generation option 'penalty' is not known"),
        (Question("hi", [b"a video"], GREEDY), "the task shows bytes, beingvl sees images only"),
    ]:
        with pytest.raises(InputError, match=message):
            answer_questions(model, [request], 1, True, lambda count: None)
    with pytest.raises(InputError, match="it is not a Being-VL model folder"):
        open_model(str(run_folder), None, None, "cpu")


def test_the_entry_point_names_the_adapter() -> None:
    """setup.py's entry point and the class path in the manifest exist, read without lmms-eval."""
    root = Path(__file__).parents[2]
    assert (
        '"lmms_eval.models": ["beingvl=beingvl.evaluation.lmms_eval_model:manifest"]'
        in (root / "setup.py").read_text()
    )
    tree = ast.parse((root / "beingvl" / "evaluation" / "lmms_eval_model.py").read_text())
    names = {node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    assert names == {"manifest", "LmmsEvalModel"}
