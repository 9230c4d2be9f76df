"""Answers do not depend on the batch, equal a plain greedy loop, stop at eos; prompts are what
training saw; refusals.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from beingvl.artefact.manifest import read_manifest, write_manifest
from beingvl.commands.main import main
from beingvl.data.conversation import TextEncoder, build_sequence
from beingvl.errors import InputError
from beingvl.inference.model import BeingVL
from beingvl.inference.streaming import TextPieces, TextStreamer
from beingvl.vbpe.visual_bpe import VisualBPE
from tests.damage import list_anew
from tests.model.small_models import NUM_CODES, write_vqgan
from tests.tiny import LAYOUT

QUESTION = "Which digit is this?"
PHI = "\N{GREEK SMALL LETTER PHI}"


@pytest.fixture(scope="module")
def model(run_folder: Path) -> BeingVL:
    return strengthen(
        BeingVL(run_folder / "stage-3" / "final", run_folder / "vbpe").load_model(device="cpu")
    )


def strengthen(model: BeingVL) -> BeingVL:
    """Larger weights: freshly initialised ones hardly attend, so that a wrong mask or position
    would change no answer.
    """
    for parameter in model.model.parameters():
        if parameter.dim() == 2:
            parameter.data *= 8
    return model


@pytest.fixture(scope="module")
def images(run_folder: Path) -> list[Path]:
    return sorted((run_folder / "data" / "images" / "test").glob("*.png"))


@pytest.fixture
def copied_model(run_folder: Path, tmp_path: Path) -> Path:
    """A model folder that a test may change."""
    return Path(shutil.copytree(run_folder / "stage-3" / "final", tmp_path / "model"))


def random_prompts(count: int, longest: int = 60) -> list[list[int]]:
    random = np.random.default_rng(0)
    return [
        random.integers(0, LAYOUT.size, random.integers(2, longest)).tolist() for _ in range(count)
    ]


def greedy_loop(model: BeingVL, prompt: list[int], max_new_tokens: int) -> list[int]:
    """The whole sequence again for every token: no cache, no mask, no padding."""
    ids = list(prompt)
    while len(ids) < len(prompt) + max_new_tokens:
        with torch.no_grad():
            token = int(model.model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
        if token == LAYOUT.eos_id:
            break
        ids.append(token)
    return ids[len(prompt) :]


# ---- answers ----


def test_batched_answers_equal_single_ones_and_a_plain_loop(model: BeingVL) -> None:
    prompts = random_prompts(24)
    expected = [greedy_loop(model, prompt, 12) for prompt in prompts]
    assert model.continue_token_sequences(prompts, 12, batch_size=24) == expected
    assert model.continue_token_sequences(prompts, 12, batch_size=7) == expected
    assert model.continue_token_sequences(prompts, 12, batch_size=1) == expected
    lengths = {len(answer) for answer in expected}
    assert 12 in lengths and min(lengths) < 12, (
        "the prompts should reach both ends: eos and the limit"
    )


def test_answers_of_images_chats_and_text_in_one_call_equal_single_ones(
    model: BeingVL, images: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    img2codes = model.img2codes
    prompts = [QUESTION, "hi", [("one", "1"), ("two", None)], "left <image> right <image>, same?"]
    pictures = [images[0], None, Image.open(images[1]), [images[2], images[3]]]
    for method in (model.generate_with_vbpe, model.generate):
        together = method(prompts, pictures, max_new_tokens=8)
        alone = [
            method([prompt], [picture], max_new_tokens=8)[0]
            for prompt, picture in zip(prompts, pictures, strict=True)
        ]
        assert together == alone
    monkeypatch.setattr(
        model, "img2codes", lambda images: (calls.append(len(images)), img2codes(images))[1]
    )
    assert model.generate(prompts, pictures, max_new_tokens=8) == together and calls == [4], (
        "one pass of the VQ-GAN"
    )
    assert model.generate_with_vbpe(["hi"], max_new_tokens=8) == model.generate(
        ["hi"], [None], max_new_tokens=8
    )


def test_a_prompt_is_the_beginning_of_the_training_sample(
    run_folder: Path, model: BeingVL, images: list[Path]
) -> None:
    folder = run_folder / "stage-3" / "final"
    tokens = model.img2tok([images[0]])
    sample = build_sequence([(QUESTION, "one")], tokens, TextEncoder(folder, LAYOUT), LAYOUT)
    prompt = model.tokenize(f"<image>\n{QUESTION}", images[0])
    assert sample.input_ids[: len(prompt)] == prompt
    assert sample.target_spans[0][0] == len(prompt)


def test_model_is_frozen_and_in_evaluation_mode(model: BeingVL) -> None:
    assert not model.model.training
    assert not any(parameter.requires_grad for parameter in model.model.parameters())


def test_rows_behind_the_vocabulary_are_never_answers(copied_model: Path, run_folder: Path) -> None:
    model = BeingVL(copied_model, run_folder / "vbpe").load_model(device="cpu")
    model.model.resize_token_embeddings(LAYOUT.size + 6)
    head = model.model.get_output_embeddings().weight
    head.data[LAYOUT.size :] = 100 * torch.randn(
        6, head.shape[1]
    )  # one of them is nearly always the likeliest
    answers = model.continue_token_sequences(random_prompts(8), 4)
    assert all(token < LAYOUT.size for answer in answers for token in answer)


def test_called_as_the_published_guide_does(
    run_folder: Path, model: BeingVL, images: list[Path]
) -> None:
    other = BeingVL(str(run_folder / "stage-3" / "final"), str(run_folder / "vbpe" / "vbpe.json"))
    strengthen(other.load_model(torch_dtype=torch.float32, device="cpu"))
    arguments = ([QUESTION], [str(images[0])], 8, False)
    assert other.generate_with_vbpe(*arguments) == model.generate_with_vbpe(*arguments)
    assert other.load_model(torch.bfloat16, device="cpu").model.dtype == torch.bfloat16


def test_sampling_is_a_function_of_the_seed(model: BeingVL) -> None:
    answers = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        answers.append(
            model.continue_token_sequences(random_prompts(4), 8, do_sample=True, temperature=2.0)
        )
    assert answers[0] == answers[1] != answers[2]


def test_whole_and_tiny_temperatures(model: BeingVL) -> None:
    prompts = random_prompts(4)

    def answers(**options: object) -> list[list[int]]:
        torch.manual_seed(1)
        return model.continue_token_sequences(prompts, 8, **options)

    assert answers(do_sample=True, temperature=2) == answers(do_sample=True, temperature=2.0)
    assert answers(do_sample=True, temperature=1e-40) == answers()


def test_the_base_models_generation_defaults_do_not_reach_answers(
    copied_model: Path, model: BeingVL
) -> None:
    defaults = {"do_sample": True, "temperature": 9.0, "eos_token_id": 65, "max_length": 3}
    (copied_model / "generation_config.json").write_text(json.dumps(defaults))
    list_anew(copied_model)
    other = strengthen(BeingVL(copied_model).load_model(device="cpu"))
    prompts = random_prompts(6)
    assert other.continue_token_sequences(prompts, 8) == model.continue_token_sequences(prompts, 8)


def test_streamed_pieces_make_up_the_answer(model: BeingVL) -> None:
    pieces: list[str] = []
    answer = model.answer_token_sequences(random_prompts(1), 10, on_text=pieces.append)[0]
    assert "".join(pieces) == answer and len(pieces) > 1


def test_streaming_waits_for_the_second_half_of_a_character(model: BeingVL) -> None:
    pieces: list[str] = []
    streamer = TextStreamer(TextPieces(model.decode_text), pieces.append)
    first, second = model.encoder.plain(PHI)
    streamer.put(torch.tensor([[1, 2, 3]]))
    for token in (first, second):
        streamer.put(torch.tensor([token]))
    streamer.end()
    assert pieces == [PHI]


def test_every_finished_batch_is_told(model: BeingVL) -> None:
    told: dict[int, list[int]] = {}
    sizes: list[int] = []

    def on_batch(indices: list[int], answers: list[list[int]]) -> None:
        told.update(zip(indices, answers, strict=True))
        sizes.append(len(indices))

    answers = model.continue_token_sequences(random_prompts(5), 2, batch_size=2, on_batch=on_batch)
    assert sizes == [2, 2, 1] and [told[index] for index in range(5)] == answers


def test_no_prompts_no_answers(model: BeingVL) -> None:
    assert model.generate_with_vbpe([], [], max_new_tokens=4) == []
    assert model.img2tok([]) == [] and model.tok2img([]) == []


# ---- images ----


def test_pictures_come_back_from_tokens(model: BeingVL, images: list[Path]) -> None:
    codes = model.img2codes(images)
    pictures = np.stack(model.tok2img(model.img2tok(images)))
    assert pictures.dtype == np.uint8 and (pictures == model.vqgan.decode(codes)).all()
    assert (np.stack(model.tok2img(model.img2tok(images, with_vbpe=False))) == pictures).all()
    assert sum(map(len, model.img2tok(images))) <= codes.size


def test_a_stream_that_no_image_has_is_refused(model: BeingVL) -> None:
    with pytest.raises(InputError, match="not all image tokens"):
        model.tok2img([[1, 2]])
    with pytest.raises(InputError, match="invalid image stream"):
        model.tok2img([[LAYOUT.first_image_id]])


# ---- refusals ----


def test_folders_that_are_no_model_are_refused(tmp_path: Path, copied_model: Path) -> None:
    with pytest.raises(InputError, match=r"vocab_layout.json: it is not a Being-VL model"):
        BeingVL(tmp_path)
    (copied_model / "manifest.json").unlink()
    with pytest.raises(InputError, match="incomplete"):
        BeingVL(copied_model)


@pytest.mark.parametrize(
    "name", ["vocab_layout.json", "tokenizer.json", "config.json", "model.safetensors"]
)
def test_damaged_files_of_a_model_are_named(
    copied_model: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = copied_model / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert main(["generate", f"--model={copied_model}", "--prompt=hi", "--device=cpu"]) == 2
    [line] = capsys.readouterr().err.strip().splitlines()[-1:]
    assert line.startswith("beingvl generate: error: ") and str(copied_model) in line


def test_every_bad_input_is_one_sentence_and_exit_code_2(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image, line, vbpe = tmp_path / "a.png", tmp_path / "line.png", tmp_path / "vbpe.json"
    image.write_text("no image")
    Image.new("1", (2000, 4)).save(line)
    VisualBPE(NUM_CODES, np.array([[1, 1, 0, 1]])).save(vbpe)
    ours, own_vbpe = (
        f"--model={run_folder / 'stage-3' / 'final'}",
        f"--vbpe_path={run_folder / 'vbpe'}",
    )
    for options, message in [
        ([ours, own_vbpe, "--prompt=hi", f"--image={image}"], "cannot be read as an image"),
        ([ours, own_vbpe, "--prompt=hi", f"--image={line}"], "has 2000 x 4 pixels"),
        ([ours, own_vbpe, "--prompt=hi", f"--image={tmp_path / 'no.png'}"], "No such file"),
        ([ours, own_vbpe, "--prompt= "], "a prompt is empty"),
        ([ours, own_vbpe, "--prompt=<image>\n <image>"], "a prompt is empty"),
        ([ours, own_vbpe, "--prompt=hi", "--device=foo"], "device 'foo' cannot be used"),
        ([ours, own_vbpe, "--prompt=hi", "--device=cuda:99"], "device 'cuda:99' cannot be used"),
        ([ours, own_vbpe, "--prompt=hi", "--device=meta"], "device 'meta' cannot be used"),
        ([ours, own_vbpe, f"--prompt={'long ' * 200}"], "do not fit the model's context of 512"),
        ([ours, f"--vbpe_path={vbpe}", "--prompt=hi"], "were made with different vbpe"),
        ([f"--model={tmp_path}", "--prompt=hi"], "is not a Being-VL model folder"),
        (
            [f"--model={tmp_path / 'nowhere'}", "--prompt=hi"],
            "nowhere does not exist; expected a Being-VL model folder",
        ),
    ]:
        capsys.readouterr()
        assert main(["generate", "--device=cpu", *options]) == 2, message
        error = capsys.readouterr().err.strip()
        assert message in error and error.count("\n") == 0 and "Traceback" not in error


def test_another_vbpe_is_refused(run_folder: Path, copied_model: Path, tmp_path: Path) -> None:
    VisualBPE(NUM_CODES, np.array([[1, 1, 0, 1]])).save(tmp_path / "vbpe.json")
    with pytest.raises(InputError, match="different vbpe"):
        BeingVL(copied_model, tmp_path / "vbpe.json")
    lineage = {"vocab": read_manifest(copied_model).lineage["vocab"]}
    write_manifest(copied_model, "model", {}, lineage)
    VisualBPE(NUM_CODES + 1, np.array([[1, 1, 0, 1]])).save(tmp_path / "vbpe.json")
    with pytest.raises(InputError, match=f"has {NUM_CODES + 1} codes and 1 merges"):
        BeingVL(copied_model, tmp_path / "vbpe.json")


def test_the_vbpe_inside_the_model_folder_is_the_default(
    run_folder: Path, copied_model: Path, images: list[Path]
) -> None:
    with pytest.raises(InputError, match="give vbpe_path"):
        BeingVL(copied_model).img2tok(images[:1])
    shutil.copy(run_folder / "vbpe" / "vbpe.json", copied_model)
    assert BeingVL(copied_model).vbpe == VisualBPE.load(run_folder / "vbpe")


def test_missing_or_other_vqgan_is_refused(copied_model: Path) -> None:
    shutil.rmtree(copied_model / "vqgan")
    list_anew(copied_model)
    with pytest.raises(InputError, match="has no vqgan/"):
        _ = BeingVL(copied_model).vqgan
    write_vqgan(copied_model / "vqgan", seed=5)
    with pytest.raises(InputError, match="different vqgan"):
        _ = BeingVL(copied_model).vqgan


def test_what_cannot_be_asked_is_refused(
    model: BeingVL, images: list[Path], tmp_path: Path
) -> None:
    no_image = tmp_path / "a.png"
    no_image.write_text("no image")
    for arguments, message in [
        (([" "],), "a prompt is empty"),
        (([[]],), "a prompt is empty"),
        (([[("hi", "ho")]],), "an answer to every question but the last"),
        (([[("hi", None), ("ho", None)]],), "an answer to every question but the last"),
        (("hi",), "prompts is one string"),
        (([None],), "a prompt is 'None', expected text or a list of"),
        (([["hi"]],), "expected text or a list of"),
        ((["hi"], [None, None]), "1 prompts and 2 images"),
        ((["hi"], str(images[0])), "images is one image"),
        ((["hi"], images[0]), "images is one image"),
        ((["hi"], [no_image]), "cannot be read as an image"),
        ((["hi"], [[images[0], images[1]]]), "2 images were given for 0 <image> placeholders"),
        ((["<image> hi"],), "more <image> placeholders than images"),
        ((["IMGIMGAAAAAAZ"],), "spells the reserved token"),
        ((["long " * 200],), "do not fit the model's context of 512"),
        ((["long " * 4000],), "19,999 characters does not fit the model's context of 512 tokens"),
        ((["hi"], None, 0), "max_new_tokens is 0"),
    ]:
        with pytest.raises(InputError, match=message):
            model.generate_with_vbpe(*arguments)
    with pytest.raises(InputError, match="images is one image"):
        model.img2tok(Image.open(images[0]))
    for name, value in [
        ("temperature", 0),
        ("temperature", None),
        ("num_beams", None),
        ("num_beams", "2"),
        ("batch_size", 2.5),
        ("batch_size", True),
    ]:
        with pytest.raises(InputError, match=f"{name} is {value!r}, expected an? .* above 0"):
            model.generate(["hi"], do_sample=True, **{name: value})
    with pytest.raises(InputError, match="a prompt has no token ids"):
        model.continue_token_sequences([[]], 4)
    with pytest.raises(InputError, match="streams one answer, found 2"):
        model.generate(["hi", "ho"], on_text=print)


def test_unknown_dtype_and_short_embeddings_are_refused(copied_model: Path) -> None:
    with pytest.raises(InputError, match="torch_dtype is 'float8'"):
        BeingVL(copied_model).load_model("float8")
    longer = LAYOUT.to_dict() | {"num_merges": LAYOUT.num_merges + 1}
    (copied_model / "vocab_layout.json").write_text(json.dumps(longer))
    list_anew(copied_model)
    with pytest.raises(
        InputError, match=f"has {LAYOUT.size} rows, but the vocabulary has {LAYOUT.size + 1} ids"
    ):
        BeingVL(copied_model).load_model(device="cpu")
