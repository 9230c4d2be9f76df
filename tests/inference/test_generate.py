"""`beingvl generate` prints what the class answers, once or in a conversation."""

from pathlib import Path

import pytest

from beingvl.commands.main import main
from beingvl.inference.model import BeingVL


def options(run_folder: Path) -> list[str]:
    return [
        "generate",
        f"--model={run_folder / 'stage-3' / 'final'}",
        f"--vbpe-path={run_folder / 'vbpe' / 'vbpe.json'}",
        f"--image={run_folder / 'data' / 'images' / 'test' / '0000.png'}",
        "--max_new_tokens=6",
        "--device=cpu",
    ]


def model_and_image(run_folder: Path) -> tuple[BeingVL, Path]:
    model = BeingVL(run_folder / "stage-3" / "final", run_folder / "vbpe").load_model(device="cpu")
    return model, run_folder / "data" / "images" / "test" / "0000.png"


@pytest.mark.parametrize("raw", [False, True])
def test_prints_the_answer(run_folder: Path, capsys: pytest.CaptureFixture[str], raw: bool) -> None:
    model, image = model_and_image(run_folder)
    method = model.generate if raw else model.generate_with_vbpe
    capsys.readouterr()
    assert main([*options(run_folder), "--prompt=Is it even?", *(["--raw"] if raw else [])]) == 0
    assert capsys.readouterr().out == method(["Is it even?"], [image], max_new_tokens=6)[0] + "\n"


def test_a_chat_remembers_its_turns(
    run_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, image = model_and_image(run_folder)
    first = model.generate_with_vbpe(["one"], [image], max_new_tokens=6)[0]
    second = model.generate_with_vbpe([[("one", first), ("two", None)]], [image], max_new_tokens=6)[
        0
    ]
    capsys.readouterr()
    questions = iter(["one", "IMGIMGAAAAAAZ", "two", ""])
    monkeypatch.setattr("builtins.input", lambda _: next(questions))
    assert main([*options(run_folder), "--chat"]) == 0
    captured = capsys.readouterr()
    assert captured.out == f"{first}\n{second}\n"
    assert "spells the reserved token" in captured.err


def test_the_end_of_input_ends_a_chat(run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def end(_: str) -> str:
        raise EOFError

    monkeypatch.setattr("builtins.input", end)
    assert main([*options(run_folder), "--chat"]) == 0


@pytest.mark.parametrize("more", [[], ["--chat", "--prompt=hi"]])
def test_prompt_or_chat(
    run_folder: Path, capsys: pytest.CaptureFixture[str], more: list[str]
) -> None:
    assert main([*options(run_folder), *more]) == 2
    assert "give either --prompt with a question, or --chat" in capsys.readouterr().err
