"""A model is asked, and its answers end, in the template that it was trained on."""

import json
from pathlib import Path

import pytest
import torch

from beingvl.commands.main import main
from beingvl.data.conversation import TextEncoder, build_sequence
from beingvl.errors import InputError
from beingvl.inference.back_end import TransformersBackEnd
from beingvl.inference.conversations import Conversations
from beingvl.inference.model import BeingVL
from tests.inference.published_template import PUBLISHED, SAYS_YEP, says, taught, taught_to_say
from tests.tiny import LAYOUT, write_shards


@pytest.fixture(scope="module")
def published(run_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return taught(run_folder, tmp_path_factory.mktemp("published") / "final", PUBLISHED)


@pytest.mark.parametrize(
    "tokens",
    [
        SAYS_YEP,
        ["Ġ", "y", "e", "p<", "/s>x", "z"],
    ],
    ids=["one token a letter", "tokens across the borders"],
)
def test_an_answer_ends_at_the_published_stop_text_however_it_is_spelt(
    published: Path, tokens: list[str]
) -> None:
    model = says(published, tokens)
    prompts = [model.tokenize(text) for text in ("hi", "a longer question")]
    prompts.append([*prompts[0], model._tokenizer.token_to_id(tokens[-1])])
    ids = model.continue_token_sequences(prompts, 12)
    assert [len(row) for row in ids[:2]] == [tokens.index(tokens[-1]) - 1] * 2
    assert len(ids[2]) == 12, "a row that never spells it goes on"
    assert model.answer_token_sequences(prompts[:2], 12) == ["yep", "yep"]
    pieces: list[str] = []
    model.answer_token_sequences(prompts[:1], 12, on_text=pieces.append)
    assert "".join(pieces) == "yep", "nothing of the stop text is shown while it grows"
    *_, shown = Conversations(model, TransformersBackEnd(model), True, 12).ask(
        "hi", [("hi", "yep")], None
    )
    assert shown.text == "yep"


def test_a_prompt_is_the_beginning_of_the_published_sample(
    published: Path, run_folder: Path
) -> None:
    model, image = BeingVL(published), run_folder / "data" / "images" / "test" / "0000.png"
    tokens = model.img2tok([image], with_vbpe=False)
    encoder = TextEncoder(published, LAYOUT)
    turns = [("<image>\nhi", "ho"), ("and", "so")]
    sample = build_sequence(turns, tokens, encoder, LAYOUT, PUBLISHED).input_ids
    prompt = model.tokenize([turns[0], ("and", None)], image, with_vbpe=False)
    assert sample[: len(prompt)] == prompt and prompt[-1] == encoder.plain(" ")[0]
    assert model.tokenize("hi", image, with_vbpe=False)[-3:] == encoder.plain("hi ")
    with pytest.raises(InputError, match="takes at most one image, found 2"):
        model.tokenize("<image> <image> same?", [image, image], with_vbpe=False)


def test_the_template_is_the_models_unless_one_is_given(
    published: Path, run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    default = run_folder / "stage-3" / "final"
    assert BeingVL(default).template == "default" and BeingVL(published).template == PUBLISHED
    as_default = BeingVL(published, template="default")
    assert as_default.tokenize("hi") == BeingVL(default).tokenize("hi")
    assert as_default.tokenize("hi")[-1] == LAYOUT.sep_id
    with pytest.raises(InputError, match="template 'v2' is unknown"):
        BeingVL(taught(run_folder, tmp_path / "final", "v2"))
    command = ["generate", f"--model={published}", "--prompt=hi", "--device=cpu"]
    assert main([*command, "--max_new_tokens=2", "--template=default"]) == 0
    assert main([*command, "--template=v3"]) == 2
    assert "template 'v3' is unknown" in capsys.readouterr().err


def test_answers_are_scored_in_the_models_template(run_folder: Path, tmp_path: Path) -> None:
    model = taught_to_say(run_folder, tmp_path / "model", SAYS_YEP)
    rows = [
        {"id": n, "conversations": [{"from": "human", "value": "hi"}], "answer": "yep"}
        for n in range(3)
    ]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    command = ["evaluate", f"--model={model}", f"--json_path={tmp_path / 'rows.json'}"]
    for options, accuracy in (
        (["--output_path=a"], 1),
        (["--output_path=b", "--template=default"], 0),
    ):
        words = [
            word.replace("=", f"={tmp_path}/", 1) if "path" in word else word for word in options
        ]
        assert main([*command, *words, "--device=cpu"]) == 0
        scores = json.loads((Path(words[0].partition("=")[2]) / "scores.json").read_text())
        assert scores["accuracy"] == accuracy


def test_held_out_shards_of_another_template_are_refused(
    published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = write_shards(tmp_path / "shards", num_samples=4)
    command = ["evaluate", f"--model={published}", f"--data={shards}", "--device=cpu"]
    assert main([*command, f"--output_path={tmp_path / 'a'}"]) == 2
    assert "give different shards, or --template default" in capsys.readouterr().err
    assert main([*command, f"--output_path={tmp_path / 'a'}", "--template=default"]) == 0


def test_the_default_type_is_the_checkpoints_on_an_accelerator(
    run_folder: Path, tmp_path: Path
) -> None:
    from beingvl.inference.reading import dtype_of

    folder = run_folder / "stage-3" / "final"
    for name in ("dtype", "torch_dtype"):
        (tmp_path / "config.json").write_text(json.dumps({name: "bfloat16"}))
        assert dtype_of(tmp_path, None, torch.device("cuda")) == torch.bfloat16
        assert dtype_of(tmp_path, None, torch.device("cpu")) == torch.float32
    assert dtype_of(tmp_path, "float16", torch.device("cpu")) == torch.float16
    assert dtype_of(folder, None, torch.device("cuda")) == torch.float32


def test_a_stage_folder_is_taken_for_its_final(run_folder: Path) -> None:
    stage = run_folder / "stage-3"
    assert BeingVL(stage).model_path == stage / "final"
    rows = [
        f"--json_path={run_folder / 'data/test.json'}",
        f"--vq_codes={run_folder / 'vq_codes/test'}",
    ]
    output = f"--output_path={run_folder / 'eval' / 'stage-3'}"
    words = [f"--vbpe_path={run_folder / 'vbpe'}", "--max_new_tokens=4", "--device=cpu"]
    assert main(["evaluate", f"--model={stage}", *rows, output, *words]) == 0, "it is reused"
