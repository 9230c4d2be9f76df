"""Every drawn stream is exactly one grid; the rule allows what an independent check allows; the
command saves a PNG.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from beingvl.commands.main import main
from beingvl.errors import InputError
from beingvl.inference.draw import FittingTokens, before_drawing
from beingvl.inference.model import BeingVL
from beingvl.vbpe.published import LegacyVisualBPE
from beingvl.vbpe.reference import cells_reference, decode_reference, train_reference
from beingvl.vbpe.visual_bpe import VisualBPE
from tests.model.small_models import NUM_CODES
from tests.tiny import LAYOUT


@pytest.fixture(scope="module")
def model(run_folder: Path) -> BeingVL:
    return BeingVL(run_folder / "stage-3" / "final", run_folder / "vbpe").load_model(device="cpu")


@pytest.mark.parametrize("with_vbpe", [True, False])
@pytest.mark.parametrize("temperature", [0.7, 5.0])
def test_every_drawing_is_a_whole_grid(model: BeingVL, with_vbpe: bool, temperature: float) -> None:
    height, width = model.vqgan.grid
    merges = model.vbpe.merges.tolist() if with_vbpe else []
    lengths = set()
    for seed in range(8):
        torch.manual_seed(seed)
        drawings = model.draw(["", "", "a seven"], with_vbpe=with_vbpe, temperature=temperature)
        for token_ids, picture in zip(drawings, model.tok2img(drawings), strict=True):
            ids = model.layout.token_to_image_ids(token_ids).tolist()
            grid = decode_reference(ids, height, width, NUM_CODES, merges)
            assert (picture == model.vqgan.decode(grid[None].astype(np.uint16))[0]).all()
            lengths.add(len(ids))
    assert (min(lengths) < height * width) == with_vbpe, (
        "with vBPE some merged tokens should be drawn"
    )


def test_a_drawing_is_a_function_of_the_seed_and_may_follow_images(
    model: BeingVL, run_folder: Path
) -> None:
    image = run_folder / "data" / "images" / "test" / "0000.png"
    drawings = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawings.append(model.draw(["", "the same"], [None, image])[1].tolist())
    assert drawings[0] == drawings[1] != drawings[2]


def test_an_empty_prompt_begins_as_a_training_sample_does(model: BeingVL, run_folder: Path) -> None:
    image = run_folder / "data" / "images" / "test" / "0000.png"
    sample = model.tokenize("hi", image)
    assert before_drawing(model, "", [], True) == sample[:2]
    two = model.tokenize("<image>hi<image>", [image, image])
    first = len(model.img2tok([image])[0]) + 3
    assert before_drawing(model, "hi", [image], True) == [*two[: first + 2], LAYOUT.boi_id]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 4), st.integers(1, 5))
def test_the_rule_allows_exactly_what_fits(seed: int, height: int, width: int) -> None:
    """Shapes learnt from random grids of two codes (also those that reach to the left), against
    a check cell by cell.
    """
    random = np.random.default_rng(seed)
    merges, _ = train_reference(
        [random.integers(0, 2, (5, 5)) for _ in range(3)], 2, 12, min_count=1
    )
    tokens = FittingTokens(VisualBPE(2, np.array(merges, np.int32).reshape(-1, 4)), (height, width))
    shapes = [set(cells_reference(image_id, 2, merges)) for image_id in range(2 + len(merges))]
    covered, stream = tokens.empty(), []
    while not covered.all():
        free = {tuple(cell) for cell in np.argwhere(~covered).tolist()}
        y, x = min(free)
        fits = tokens.fitting(covered)
        assert fits.tolist() == [{(y + dy, x + dx) for dy, dx in shape} <= free for shape in shapes]
        stream.append(int(random.choice(np.flatnonzero(fits))))
        tokens.place(covered, stream[-1])
    assert not tokens.fitting(covered).any()
    decode_reference(stream, height, width, 2, merges)


def options(run_folder: Path) -> list[str]:
    vbpe = run_folder / "vbpe" / "vbpe.json"
    return [
        "generate",
        f"--model={run_folder / 'stage-3' / 'final'}",
        f"--vbpe_path={vbpe}",
        "--device=cpu",
    ]


def test_the_command_saves_what_the_class_draws(
    model: BeingVL, run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*options(run_folder), f"--draw={tmp_path / 'a.png'}", "--seed=4"]) == 0
    torch.manual_seed(4)
    expected = model.tok2img(model.draw())[0]
    assert (np.asarray(Image.open(tmp_path / "a.png")) == expected).all()
    assert "16 x 16 pixels" in capsys.readouterr().out


def test_refusals(
    model: BeingVL,
    run_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for more, message in [
        (["--chat", "--draw=a.png"], "give either --draw or --chat"),
        ([f"--draw={tmp_path / 'no' / 'a.png'}"], "its folder does not exist"),
        ([f"--draw={tmp_path / 'a.jpg'}"], "a.jpg is not a .png"),
        ([f"--draw={tmp_path}"], "is a folder; name a PNG file"),
    ]:
        assert main([*options(run_folder), *more]) == 2
        assert message in capsys.readouterr().err
    monkeypatch.setattr("beingvl.images.vqgan.VQGAN.has_decoder", False)
    assert main([*options(run_folder), f"--draw={tmp_path / 'a.png'}"]) == 2
    assert "has no decoder" in capsys.readouterr().err
    without = BeingVL(run_folder / "stage-3" / "final")
    with pytest.raises(InputError, match="give vbpe_path, or use plain codes"):
        without.draw()
    without.vbpe = LegacyVisualBPE(16, np.array([[1, 2]]))
    with pytest.raises(InputError, match="no fixed shape"):
        without.draw()
    for arguments, message in [
        ((["long " * 200],), "do not fit the model's context"),
        ((["a"], [None, None]), "1 prompts and 2 images"),
        (([None],), "a prompt is 'None'"),
        ((["a"], "a.png"), "images is one image"),
        (("ab",), "prompts is one string"),
        ((["a"], None, None, None), "temperature is None, expected a number above 0"),
    ]:
        with pytest.raises(InputError, match=message):
            model.draw(*arguments)
