"""The page says what the class says, keeps to this machine and its temporary folder; refusals.
The browser's part is slow.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import numpy as np
import psutil
import pytest

from beingvl.commands.main import main
from beingvl.errors import InputError
from beingvl.images.pictures import BORDER, with_borders
from beingvl.inference import serve as serving
from beingvl.inference.back_end import TransformersBackEnd
from beingvl.inference.conversations import (
    Conversations,
    Progress,
    Turns,
    refuse_other_files,
    shown,
)
from beingvl.inference.model import BeingVL
from beingvl.inference.serve import FOLDERS, listen, temporary_folder
from beingvl.vbpe.published import LegacyVisualBPE
from tests.environments import own_environment
from tests.inference.small_run import write_images

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def model(run_folder: Path) -> BeingVL:
    return BeingVL(run_folder / "stage-3" / "final", run_folder / "vbpe").load_model(device="cpu")


def conversations(model: BeingVL, with_vbpe: bool = True, max_new_tokens: int = 6) -> Conversations:
    return Conversations(model, TransformersBackEnd(model), with_vbpe, max_new_tokens)


def answer(page: Conversations, question: str, turns: Turns, path: str | None) -> str:
    *_, last = page.ask(question, turns, path)
    return last.text


@pytest.mark.parametrize("with_vbpe", [True, False])
def test_answers_and_tokens_are_those_of_the_class(
    model: BeingVL, run_folder: Path, with_vbpe: bool
) -> None:
    image = run_folder / "data" / "images" / "test" / "0000.png"
    method = model.generate_with_vbpe if with_vbpe else model.generate
    page = conversations(model, with_vbpe)
    found = page.look(str(image))
    token_ids = model.img2tok([image], with_vbpe)[0]
    assert page.token_ids(str(image)).tolist() == token_ids.tolist()
    assert found.words == f"16 codes in {len(token_ids)} tokens"
    assert found.borders.shape == found.original.shape == (512, 512, 3)
    assert (found.borders != found.original).any()
    # The question waits for the tokens of a picture that nobody has looked at yet.
    for asked in (page, conversations(model, with_vbpe)):
        first = answer(asked, "one", [], str(image))
        second = answer(asked, "two", [("one", first)], str(image))
        assert first == method(["one"], [image], max_new_tokens=6)[0]
        assert second == method([[("one", first), ("two", None)]], [image], max_new_tokens=6)[0]
    grown = [progress.text for progress in page.ask("hi", [], None)]
    assert grown[-1] == method(["hi"], max_new_tokens=6)[0] and all(
        after.startswith(before) for before, after in pairwise(grown)
    )
    facts = page.facts()
    assert "float32 on cpu" in facts and "16 codes, 8 merges" in facts and "6 tokens" in facts


def test_what_cannot_be_asked_is_refused_with_the_classs_sentences(
    model: BeingVL, tmp_path: Path
) -> None:
    page = conversations(model)
    (tmp_path / "a.png").write_text("no image")
    for refused in (page.look, page.token_ids):
        with pytest.raises(InputError, match=r"a\.png cannot be read as an image"):
            refused(str(tmp_path / "a.png"))
    for question, message in [
        (" ", "a prompt is empty"),
        ("long " * 200, "do not fit the model's context"),
        ("long " * 4000, "does not fit the model's context"),
    ]:
        with pytest.raises(InputError, match=message):
            list(page.ask(question, [], None))


def test_a_visitor_waits_is_told_his_place_and_may_stop(
    model: BeingVL, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = conversations(model, max_new_tokens=400)
    whole = model.generate_with_vbpe(["hi"], max_new_tokens=400)[0]
    first = page.ask("hi", [], None, "first")
    next(first)
    others = [page.ask("hi", [], None, str(number)) for number in range(3)]
    with ThreadPoolExecutor(3) as visitors:
        waiting = [found.num_before for found in visitors.map(next, others)]
    assert sorted(waiting) == [1, 2, 3]
    page.stop("first")
    *_, last = [Progress(""), *first]
    assert len(last.text) < len(whole) and whole.startswith(last.text)
    *_, last = others[0]
    assert last.text == whole
    monkeypatch.setattr("beingvl.inference.conversations.MAX_WAITING", 2)
    with pytest.raises(InputError, match="too many questions are waiting"):
        list(page.ask("hi", [], None))
    page.stop("nobody")
    for other in others:
        other.close()
    assert not page._is_stopped


def test_a_published_vbpe_shows_no_borders(run_folder: Path) -> None:
    model = BeingVL(run_folder / "stage-3" / "final")
    model.vbpe = LegacyVisualBPE(16, np.array([[1, 2]]))
    found = conversations(model).look(str(run_folder / "data" / "images" / "test" / "0000.png"))
    assert found.borders.shape == (16, 16, 3) and "no borders are shown" in found.words


def test_borders_drawn_by_hand() -> None:
    picture = np.zeros((2, 4, 3), np.uint8)
    large = with_borders(
        picture, np.array([[0, 0, 1, 2], [3, 0, 1, 1]]), min_side=6
    )  # 12 x 6 pixels, 3 a cell
    drawn = (large == BORDER).all(axis=-1)
    assert (
        drawn[2].tolist() == [True] * 3 + [False] * 2 + [True] + [False] * 2 + [True] * 4
    )  # 0 above 3; 0|1; 1|2; 2 above 1
    assert drawn[0].tolist() == [False] * 5 + [True] + [False] * 2 + [True] + [False] * 3
    assert drawn[5].tolist() == [False] * 2 + [True] + [False] * 2 + [True] + [False] * 6
    assert (large[~drawn] == 0).all()


def test_only_uploads_are_opened(tmp_path: Path) -> None:
    """Whatever field names a file, and whether the file is there or not."""
    uploads = tmp_path / "uploads"
    uploads.mkdir()
    (tmp_path / "secret.png").touch()
    (uploads / "link.png").symlink_to(tmp_path / "secret.png")
    refuse_other_files(
        [{"path": str(uploads / "a.png")}, "/etc/passwd", None, [["hi", 1]]], uploads
    )
    for path in ("secret.png", "none.png", "uploads/../secret.png", "uploads/link.png"):
        named = {"path": str(tmp_path / path), "meta": {}}
        for data in ([named], ["hi", {"files": [[named]]}]):
            with pytest.raises(InputError, match="only files that were uploaded"):
                refuse_other_files(data, uploads)
    for address in ("http://localhost/a.png", None, 3, ["a"]):
        with pytest.raises(InputError, match="only files that were uploaded"):
            refuse_other_files({"path": address}, uploads)


def test_empty_answers_and_missing_pictures_are_shown_as_such() -> None:
    turns = [("a", "b"), ("c", "")]
    said = [message["content"] for message in shown(turns, has_picture=True)]
    assert said == ["a", "b", "c", "(nothing)"]
    said = [message["content"] for message in shown(turns[:1], has_picture=False)]
    assert said == ["(without a picture) a", "b"]


def test_the_temporary_folder_goes_also_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in FOLDERS:
        monkeypatch.setenv(name, "")
    before = tempfile.gettempdir()
    with pytest.raises(ZeroDivisionError), temporary_folder():
        folder = Path(tempfile.gettempdir())
        (folder / "upload.png").write_text("x")
        assert os.environ["GRADIO_TEMP_DIR"] == str(folder)
        raise ZeroDivisionError
    assert not folder.exists() and tempfile.gettempdir() == before


def test_refusals(
    run_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["serve", f"--model={run_folder / 'stage-3' / 'final'}", "--port=0"]
    for name in (
        *FOLDERS,
        "GRADIO_ANALYTICS_ENABLED",
        "HF_HUB_DISABLE_TELEMETRY",
        "DO_NOT_TRACK",
    ):
        monkeypatch.setenv(name, "")
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        for more, message in [
            (["--max_upload_megabytes=0"], "--max_upload_megabytes is 0"),
            (["--max_new_tokens=0"], "--max_new_tokens is 0"),
            ([f"--port={port}"], f"cannot listen on 127.0.0.1, port {port}"),
            (["--port=99999"], "--port is 99999"),
            (["--api_key=file"], "--api_key is for --api"),
            (["--host=no.such.host.invalid"], "cannot listen on no.such.host.invalid"),
        ]:
            assert main([*command, *more]) == 2
            assert message in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert main(command) == 2
    assert "pip install '.[serve]'" in capsys.readouterr().err


def test_an_ipv6_address_is_printed_in_brackets(
    run_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving, "listen", lambda host, port: listen("127.0.0.1", port))
    monkeypatch.setattr(serving, "run_server", lambda *_: None)
    final, vbpe = run_folder / "stage-3" / "final", run_folder / "vbpe"
    serving.serve(final, vbpe_path=vbpe, api=True, host="::1", port=0, device="cpu")
    assert capsys.readouterr().out.startswith("http://[::1]:")


# ---- in a browser ----

NEW = 70  # tokens of an answer, so that others wait for it and a click can stop it


@pytest.fixture(scope="module")
def serve_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment of its own with gradio and playwright, on top of this one."""
    folder = tmp_path_factory.mktemp("serve") / "venv"
    return own_environment(folder, "gradio>=6.0", "playwright")


def functions_of(url: str) -> tuple[int, int]:
    """The numbers of the page's functions that open a picture: to look at it, and to ask."""
    with urlopen(f"{url}/config") as answer:
        dependencies = json.load(answer)["dependencies"]
    by_sizes = {
        (len(entry["inputs"]), len(entry["outputs"])): entry["id"]
        for entry in dependencies
        if entry["backend_fn"]
    }
    return by_sizes[1, 4], by_sizes[3, 4]


def words(text: str) -> str:
    return " ".join(text.split())


def requested(url: str, function: int, *data: object) -> dict:
    """What the page says when a program calls one of its functions, as its own script does."""
    body = {"data": data, "fn_index": function, "session_hash": uuid.uuid4().hex}
    head = {"Content-Type": "application/json"}
    urlopen(Request(f"{url}/gradio_api/queue/join", json.dumps(body).encode(), head)).close()
    with urlopen(f"{url}/gradio_api/queue/data?session_hash={body['session_hash']}") as lines:
        messages = [json.loads(line[5:]) for line in lines if line.startswith(b"data:")]
    [done] = [message for message in messages if message["msg"] == "process_completed"]
    return done["output"]


@pytest.mark.slow
def test_in_a_browser(serve_python: Path, model: BeingVL, run_folder: Path, tmp_path: Path) -> None:
    chromium = shutil.which("chromium")
    assert chromium, "apt-get install chromium (a test dependency)"
    home, temporary = tmp_path / "home", tmp_path / "tmp"
    home.mkdir(), temporary.mkdir()
    environment = {
        **os.environ,
        "PYTHONPATH": str(REPOSITORY),
        "HOME": str(home),
        "TMPDIR": str(temporary),
    }
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    model_options = [
        f"--model={run_folder / 'stage-3' / 'final'}",
        f"--vbpe_path={run_folder / 'vbpe'}",
        "--device=cpu",
    ]
    limits = [f"--max_new_tokens={NEW}", "--max_upload_megabytes=1", f"--port={port}"]
    server = subprocess.Popen(
        [serve_python, "-m", "beingvl", "serve", *model_options, *limits],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert server.stdout is not None
        url = server.stdout.readline().split()[0]
        listening = [
            entry
            for entry in psutil.Process(server.pid).net_connections()
            if entry.status == psutil.CONN_LISTEN
        ]
        assert [entry.laddr.ip for entry in listening] == ["127.0.0.1"]
        image = run_folder / "data" / "images" / "test" / "0000.png"
        (tmp_path / "text.png").write_text("no image")
        write_images(tmp_path / "large", 1, side=800)
        arguments = [
            chromium,
            url,
            str(image),
            str(tmp_path / "text.png"),
            str(tmp_path / "large/test/0000.png"),
            str(tmp_path / "page"),
        ]
        done = subprocess.run(
            [serve_python, Path(__file__).with_name("browse_page.py"), *arguments],
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, done.stderr
        secret = write_images(tmp_path / "secret", 1) and tmp_path / "secret/test/0000.png"
        look, ask = functions_of(url)
        said = set()
        for path in (str(secret), str(tmp_path / "none.png"), f"{url}/none.png"):
            file = {"path": path, "meta": {"_type": "gradio.FileData"}}
            for function, data in ((look, [file]), (ask, ["hi", None, file]), (ask, [file] * 3)):
                said.add(requested(url, function, *data)["error"])
        assert said == {"only files that were uploaded to this page can be opened"}
        with ThreadPoolExecutor(20) as visitors:
            asked = [f"question {number}" for number in range(20)]
            chats = list(visitors.map(lambda one: requested(url, ask, one, None, None), asked))
        for path in (secret, tmp_path / "none.png", f"{url}/none.png"):
            with pytest.raises(HTTPError, match="403"):
                urlopen(f"{url}/gradio_api/file={path}")
        assert any(temporary.glob("beingvl-serve-*/**/0000.png"))
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(30)
    found = json.loads(done.stdout.splitlines()[-1])
    first = model.generate_with_vbpe(["one"], [image], max_new_tokens=NEW)[0]
    second = model.generate_with_vbpe(
        [[("one", first), ("two", None)]], [image], max_new_tokens=NEW
    )[0]
    assert list(map(words, found["answers"])) == list(map(words, (first, second)))
    assert len(found["seen"]) > 4, "the answers should have grown before the reader's eyes"
    assert found["words"].startswith("16 codes in") and found["width"] == 512
    for said in ("bad", "bad_words"):
        assert "text.png cannot be read as an image" in found[said]
    assert found["bad_gone"] and "exceed the maximum allowed size" in found["large"]
    assert found["without"][0] == "(without a picture) hi"
    assert "a prompt is empty" in found["empty"]
    assert found["after_empty"] == found["before_empty"] and len(found["after_empty"]) == 4
    assert found["raced"] == ["one", found["answers"][0]]
    assert found["phone_width"] == 390
    assert found["places"], "somebody should have seen the place in the queue"
    assert found["example"] == "Describe the picture."
    whole = words(model.generate_with_vbpe([found["example"]], max_new_tokens=NEW)[0])
    assert whole.startswith(words(found["stopped"])) and len(words(found["stopped"])) < len(whole)
    answers = model.generate_with_vbpe(asked, max_new_tokens=NEW)
    for chat, question, answer in zip(chats, asked, answers, strict=True):
        told = [part["text"] for message in chat["data"][2] for part in message["content"]]
        assert told == [f"(without a picture) {question}", answer or "(nothing)"]
    for told, question, answer in zip(found["visitors"], asked, answers, strict=True):
        expected = f"(without a picture) {question}", words(answer) or "(nothing)"
        assert tuple(map(words, told)) == expected
    assert found["elsewhere"] == []
    time.sleep(1)
    assert not list(temporary.glob("beingvl-serve-*")) and not list(home.rglob("*"))
