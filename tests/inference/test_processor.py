"""Others load a model folder: stock transformers, AutoProcessor, one call, the Hub's cache."""

import http.server
import json
import re
import shutil
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForCausalLM, AutoProcessor, pipeline

from beingvl import BeingVL, BeingVLProcessor, InputError
from beingvl.artefact.manifest import read_manifest, write_manifest
from beingvl.commands.main import main
from beingvl.model.target_folder import finish_target
from tests.damage import list_anew
from tests.inference.test_model import strengthen

BASE_TEMPLATE = (
    """{% for m in messages %}{{ "[" + m.role + "]" + m.content }}{% endfor %}[answer]"""
)
FRESH = """
import json, sys
from transformers import AutoModelForCausalLM, AutoProcessor, AutoTokenizer
folder, messages = sys.argv[1], json.loads(sys.argv[2])
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder)
inputs = tokenizer.apply_chat_template(messages, return_dict=True, return_tensors="pt")
out = model.generate(**inputs, max_new_tokens=8, do_sample=False)
processor = AutoProcessor.from_pretrained(folder)
assert type(processor) is type(tokenizer) and "beingvl" not in sys.modules
print(json.dumps([inputs["input_ids"][0].tolist(), out[0].tolist()]))
"""
REGISTERED = """
import sys
{imports}
processor = AutoProcessor.from_pretrained(sys.argv[1])
assert type(processor) is beingvl.BeingVLProcessor, type(processor)
assert processor(text="hi")["input_ids"]
"""


def written(run: Path, folder: Path, **details: str) -> Path:
    """The run's last model, finished as training finishes it, with its vBPE inside."""
    shutil.copytree(run / "stage-3" / "final", folder)
    shutil.copy(run / "vbpe" / "vbpe.json", folder)
    lineage = read_manifest(folder).lineage
    model = strengthen(BeingVL(folder).load_model(device="cpu")).model
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = 257, 258
    (folder / "manifest.json").unlink()
    model.save_pretrained(folder)
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "base.jinja").write_text(BASE_TEMPLATE)
    finish_target(folder, "model", {}, lineage, {"identity": {}, **details}, {})
    return folder


@pytest.fixture(scope="module")
def final(run_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(run_folder, tmp_path_factory.mktemp("made") / "final", variant="vbpe")


@pytest.fixture(scope="module")
def model(final: Path) -> BeingVL:
    return BeingVL.from_pretrained(final, device="cpu")


@pytest.fixture(scope="module")
def images(run_folder: Path) -> list[Path]:
    return sorted((run_folder / "data" / "images" / "test").glob("*.png"))


def test_a_fresh_process_of_stock_transformers_asks_as_the_class_does(
    final: Path, model: BeingVL
) -> None:
    chat = [("Which digit is this?", "one"), ("Is it even?", None)]
    messages = [
        {"role": "user", "content": chat[0][0]},
        {"role": "assistant", "content": chat[0][1]},
        {"role": "user", "content": chat[1][0]},
    ]
    command = [sys.executable, "-c", FRESH, str(final), json.dumps(messages)]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    ids, whole = json.loads(found.stdout.splitlines()[-1])
    assert ids == model.tokenize(chat)
    [answer] = model.continue_token_sequences([ids], 8)
    assert whole[len(ids) :][: len(answer)] == answer


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_importing_the_package_is_all_that_autoprocessor_needs(
    final: Path, order: tuple[int, int]
) -> None:
    lines = ["import beingvl", "from transformers import AutoProcessor"]
    code = REGISTERED.format(imports="\n".join(lines[number] for number in order))
    done = subprocess.run([sys.executable, "-c", code, str(final)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "details", [{}, {"template": "being-vl-0.5"}, {"image_positions": "anchor"}], ids=str
)
def test_the_processors_ids_and_stock_answers_are_those_of_the_class(
    run_folder: Path, tmp_path: Path, images: list[Path], details: dict
) -> None:
    folder = written(run_folder, tmp_path / "final", **details)
    model = BeingVL(folder).load_model(device="cpu")
    processor = AutoProcessor.from_pretrained(folder)
    assert isinstance(processor, BeingVLProcessor)
    asked = {
        "role": "user",
        "content": [{"type": "image", "path": str(images[0])}, {"type": "text", "text": "Which?"}],
    }
    chats = [
        [asked],
        [asked, {"role": "assistant", "content": "one"}, {"role": "user", "content": "Even?"}],
        [{"role": "user", "content": "hi"}],
    ]
    prompts = ["<image>Which?", [("<image>Which?", "one"), ("Even?", None)], "hi"]
    pictures = [images[0], images[0], None]
    expected = [model.tokenize(*pair) for pair in zip(prompts, pictures, strict=True)]
    inputs = processor.apply_chat_template(
        chats,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True},
    )
    rows = zip(inputs["input_ids"], inputs["attention_mask"].bool(), strict=True)
    assert [ids[mask].tolist() for ids, mask in rows] == expected
    stock = AutoModelForCausalLM.from_pretrained(folder)
    out = stock.generate(**inputs, max_new_tokens=6, do_sample=False)
    answers = model.continue_token_sequences(expected, 6)
    for row, answer in zip(out[:, inputs["input_ids"].shape[1] :].tolist(), answers, strict=True):
        assert row[: len(answer)] == answer
    alone = processor(images=Image.open(images[0]), text="Which?")
    assert alone["input_ids"] == [expected[0]] and processor(text=[])["input_ids"] == []


def test_a_pipeline_answers_as_the_class_does(final: Path, model: BeingVL, images) -> None:
    ask = pipeline("image-text-to-text", model=str(final), device="cpu")
    part = {"type": "image", "image": Image.open(images[0])}
    asked = {"role": "user", "content": [part, {"type": "text", "text": "Which?"}]}
    [found] = ask([asked], max_new_tokens=6)
    said = re.sub("<vbpe[0-9]*>", "", found["generated_text"][-1]["content"])
    assert said == model("Which?", images[0], 6)


def test_several_images_and_what_does_not_fit(final: Path, model: BeingVL, images) -> None:
    processor = BeingVLProcessor.from_pretrained(final)
    pair = [np.asarray(Image.open(path)) for path in images[:2]]
    question = "left <image> right <image>, same?"
    found = processor(images=pair, text=question)["input_ids"]
    assert found == [model.tokenize(question, images[:2])]
    for given, text in ((pair, "same?"), (None, question), ([pair], ["a", "b"])):
        with pytest.raises(InputError, match="images"):
            processor(images=given, text=text)
    for name in ("truncation", "retrun_tensors", "videos"):
        with pytest.raises(InputError, match=f"'{name}' is not an option of the processor"):
            processor(text="hi", **{name: True})


def test_the_cards_code_runs_and_says_whose_scores_it_shows(
    final: Path, run_folder: Path, images, tmp_path: Path, capsys, monkeypatch
) -> None:
    """README.md is its owner's: verify does not look at it, and one that was changed stays."""
    card = final / "README.md"
    first = card.read_text()
    code = first.split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(final)
    exec(code.replace("picture.png", str(images[0])), {})
    assert capsys.readouterr().out
    evaluation = tmp_path / "eval"
    evaluation.mkdir()
    scores = {"name": "digits", "metric": "exact_match", "rows": 24, "scores": {"accuracy": 0.75}}
    scores |= {"standard_errors": {"accuracy": 0.09}}
    (evaluation / "scores.json").write_text(json.dumps(scores))
    request = {"model": read_manifest(final).content_hash}
    write_manifest(evaluation, "evaluation", {}, {}, {"request": request})
    command = ["report", "card", str(final)]
    assert main([*command, f"--scores={evaluation}"]) == 0
    assert "| digits | exact_match | accuracy | 0.75 | 0.09 | 24 |" in card.read_text()
    write_manifest(evaluation, "evaluation", {}, {}, {"request": {"model": "another"}})
    assert main([*command, f"--scores={evaluation}"]) == 2
    assert "holds scores of a different model" in capsys.readouterr().err
    assert main(command) == 0 and card.read_text() == first
    card.write_text(own := first.replace("Being-VL model", "Our model"))
    assert main(command) == 2 and "was changed; move it away" in capsys.readouterr().err
    assert card.read_text() == own and main(["verify", str(final)]) == 0
    card.write_text(first)


def test_one_call_takes_what_there_is(model: BeingVL, images: list[Path]) -> None:
    folder = images[0].parent
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/{images[0].name}"
        forms = [images[0], str(images[0]), Image.open(images[0]), address]
        forms.append(np.asarray(Image.open(images[0])))
        answers = [model("Which?", form, 6) for form in forms]
        server.shutdown()
    assert isinstance(answers[0], str) and len(set(answers)) == 1
    chat = [("Which?", "one"), ("Even?", None)]
    assert model([chat, "hi"], [images[0], None], 6) == [
        model(chat, images[0], 6),
        model("hi", None, 6),
    ]
    with pytest.raises(InputError, match=r"float64 \[2, 2\], expected uint8"):
        model("hi", np.zeros((2, 2)))
    with pytest.raises(InputError, match="is bytes, expected an image"):
        model("hi", b"")


def test_sampling_options_have_transformers_names(model: BeingVL) -> None:
    prompts = [model.tokenize("Which digit is this?")]

    def answers(**options: object) -> list[list[int]]:
        torch.manual_seed(0)
        return model.continue_token_sequences(prompts, 12, **options)

    assert answers(do_sample=True, temperature=5.0, top_k=1) == answers()
    assert answers(do_sample=True, temperature=5.0, top_p=1e-6) == answers()
    assert answers(do_sample=True, temperature=5.0) != answers()
    assert len(answers(num_beams=2)[0]) <= 12
    with pytest.raises(InputError, match="'topp' is not an option of generation; did you mean"):
        answers(topp=0.5)
    with pytest.raises(InputError, match=r"transformers refused \{'top_k': -1\}"):
        answers(do_sample=True, top_k=-1)


def test_the_variant_is_the_models_and_another_is_said(
    run_folder: Path, tmp_path: Path, model: BeingVL, images: list[Path], capsys
) -> None:
    raw = BeingVL(written(run_folder, tmp_path / "raw", variant="raw"))
    codes = np.full((1, 4, 4), 3, np.uint16)  # its vBPE merges two of them
    plain, merged = (raw.codes2tok(codes, chosen)[0].tolist() for chosen in (False, True))
    said = "trained on plain image codes (--raw), but gets merged"
    assert said in capsys.readouterr().err
    assert raw.codes2tok(codes)[0].tolist() == plain
    assert model.codes2tok(codes)[0].tolist() == merged != plain
    assert not capsys.readouterr().err
    command = ["generate", f"--model={model.model_path}", "--prompt=hi", f"--image={images[0]}"]
    assert main([*command, "--raw", "--max_new_tokens=1", "--device=cpu"]) == 0
    assert "but gets plain image codes" in capsys.readouterr().err


def test_a_base_is_asked_in_its_own_template(final: Path, images: list[Path], capsys) -> None:
    own = BeingVL(final, template="base")
    layout, image = own.layout, own.img2tok(images[:1])[0].tolist()
    plain = own.encoder.plain
    expected = [*plain("[user]"), layout.boi_id, *image, layout.eoi_id, *plain("hi[answer]")]
    assert own.tokenize("<image>\nhi", images[0]) == expected
    chat = [("hi", "ho"), ("and?", None)]
    assert own.tokenize(chat) == plain("[user]hi[assistant]ho[user]and?[answer]")
    with pytest.raises(InputError, match="spells a special token"):
        own.tokenize("hi <|end_of_text|>")
    shutil.rmtree(final / "additional_chat_templates")
    list_anew(final)
    with pytest.raises(InputError, match="its base model had no chat template"):
        BeingVL(final, template="base")


def test_a_model_comes_from_the_hubs_cache(final: Path, tmp_path: Path) -> None:
    """As the Hub's client lays it out: a snapshot of links into blobs."""
    repository = tmp_path / "models--me--tiny"
    snapshot, blobs = repository / "snapshots" / ("0" * 40), repository / "blobs"
    for number, path in enumerate(path for path in final.rglob("*") if path.is_file()):
        blobs.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, blobs / str(number))
        link = snapshot / path.relative_to(final)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(blobs / str(number))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    options = {"cache_dir": tmp_path, "local_files_only": True}
    found = BeingVL.from_pretrained("me/tiny", device="cpu", **options)
    assert found.tokenize("hi") == BeingVL(final).tokenize("hi")
    assert BeingVLProcessor.from_pretrained("me/tiny", **options)(text="hi")["input_ids"] == [
        found.tokenize("hi")
    ]
    with pytest.raises(InputError, match="me/other is neither a folder here nor reachable"):
        BeingVL.from_pretrained("me/other", **options)


def test_options_of_loading_have_transformers_names_and_no_other(final: Path) -> None:
    model = BeingVL.from_pretrained(final, dtype="bfloat16", device_map={"": "cpu"})
    assert model.model.dtype == torch.bfloat16 and model.model.device.type == "cpu"
    for load in (BeingVL.from_pretrained, BeingVLProcessor.from_pretrained):
        for name, said in (("revison", "did you mean 'revision'"), ("xyz", "expected one of")):
            with pytest.raises(InputError, match=f"{name!r} is not an option .*{said}"):
                load(final, **{name: 1})
    with pytest.raises(InputError, match=r"'dtyp' is not an option .*did you mean 'dtype'"):
        BeingVL.from_pretrained(final, dtyp="bfloat16")
    with pytest.raises(InputError, match="runs on one device"):
        BeingVL.from_pretrained(final, device_map="balanced")
    for options, said in [
        ({"dtype": "float32", "torch_dtype": torch.bfloat16}, "torch_dtype is torch.bfloat16"),
        ({"device": "cpu", "device_map": 0}, "device_map is cuda:0"),
    ]:
        with pytest.raises(InputError, match=f" and {said}, but they mean the same"):
            BeingVL.from_pretrained(final, **options)
    BeingVL.from_pretrained(final, dtype="float32", torch_dtype=torch.float32, device="cpu")
    AutoProcessor.from_pretrained(final, use_fast=True, trust_remote_code=False, token=None)
