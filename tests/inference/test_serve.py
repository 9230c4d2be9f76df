"""The page says what the class says, keeps to this machine and its temporary folder; refusals.
The browser's part is slow.
"""

import json
import os
import shutil
import signal
import site
import socket
import subprocess
import sys
import tempfile
import time
import uuid
import venv
from collections.abc import Callable
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
from beingvl.inference.conversations import (
    Conversations,
    pieces_of,
    refuse_other_files,
    shown,
)
from beingvl.inference.model import BeingVL
from beingvl.inference.serve import FOLDERS, listen, temporary_folder
from beingvl.vbpe.published import LegacyVisualBPE
from tests.inference.small_run import write_images

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def model(run_folder: Path) -> BeingVL:
    return BeingVL(run_folder / "stage-3" / "final", run_folder / "vbpe").load_model(device="cpu")


@pytest.mark.parametrize("with_vbpe", [True, False])
def test_answers_and_tokens_are_those_of_the_class(
    model: BeingVL, run_folder: Path, with_vbpe: bool
) -> None:
    image = run_folder / "data" / "images" / "test" / "0000.png"
    method = model.generate_with_vbpe if with_vbpe else model.generate
    page = Conversations(model, with_vbpe, 6)
    picture, token_ids, words = page.look(str(image))
    assert token_ids == model.img2tok([image], with_vbpe)[0].tolist()
    assert words == f"16 codes in {len(token_ids)} tokens" and picture.shape == (512, 512, 3)
    *_, first = page.ask("one", [], token_ids)
    *_, second = page.ask("two", [("one", first)], token_ids)
    assert first.strip() == method(["one"], [image], max_new_tokens=6)[0]
    assert second.strip() == method([[("one", first), ("two", None)]], [image], max_new_tokens=6)[0]
    grown = list(page.ask("hi", [], None))
    assert grown[-1] == method(["hi"], max_new_tokens=6)[0] and all(
        after.startswith(before) for before, after in pairwise(grown)
    )


def test_what_cannot_be_asked_is_refused_with_the_classs_sentences(
    model: BeingVL, tmp_path: Path
) -> None:
    page = Conversations(model, True, 6)
    (tmp_path / "a.png").write_text("no image")
    with pytest.raises(InputError, match=r"a\.png cannot be read as an image"):
        page.look(str(tmp_path / "a.png"))
    for question, message in [
        (" ", "a prompt is empty"),
        ("long " * 200, "do not fit the model's context"),
    ]:
        with pytest.raises(InputError, match=message):
            list(page.ask(question, [], None))


def test_a_published_vbpe_shows_no_borders(run_folder: Path) -> None:
    model = BeingVL(run_folder / "stage-3" / "final")
    model.vbpe = LegacyVisualBPE(16, np.array([[1, 2]]))
    picture, _, words = Conversations(model, True, 6).look(
        str(run_folder / "data" / "images" / "test" / "0000.png")
    )
    assert picture.shape == (16, 16, 3) and "no borders are shown" in words


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


def test_a_failing_worker_fails_the_reader() -> None:
    def work(on_text: Callable[[str], object]) -> None:
        on_text("a")
        raise InputError("no more")

    pieces = pieces_of(work)
    assert next(pieces) == "a"
    with pytest.raises(InputError, match="no more"):
        next(pieces)


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


def test_an_empty_answer_is_shown_as_such() -> None:
    assert [message["content"] for message in shown([("a", "b"), ("c", "")])] == [
        "a",
        "b",
        "c",
        "(nothing)",
    ]


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
            (["--host=no.such.host.invalid"], "cannot listen on no.such.host.invalid"),
        ]:
            assert main([*command, *more]) == 2
            assert message in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert main(command) == 2
    assert "pip install '.[serve]'" in capsys.readouterr().err


# ---- in a browser ----


@pytest.fixture(scope="module")
def serve_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment of its own with gradio and playwright, on top of this one."""
    folder = tmp_path_factory.mktemp("serve") / "venv"
    venv.create(folder, with_pip=True)
    [packages] = (folder / "lib").glob("python*/site-packages")
    (packages / "base.pth").write_text("\n".join(site.getsitepackages()) + "\n")
    python = folder / "bin" / "python"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run(
        [python, "-m", "pip", "install", "-q", "gradio>=6.0", "playwright"],
        check=True,
        env=environment,
    )
    return python


LOOK, ASK = 0, 1  # the page's functions in the order of their events


def requested(url: str, function: int, value: object) -> str:
    """What the page says when a program calls one of its functions, as its own script does."""
    body = {"data": [value, None, None][: 1 + 2 * function], "fn_index": function}
    body["session_hash"] = uuid.uuid4().hex
    head = {"Content-Type": "application/json"}
    urlopen(Request(f"{url}/gradio_api/queue/join", json.dumps(body).encode(), head)).close()
    with urlopen(f"{url}/gradio_api/queue/data?session_hash={body['session_hash']}") as lines:
        messages = [json.loads(line[5:]) for line in lines if line.startswith(b"data:")]
    [done] = [message for message in messages if message["msg"] == "process_completed"]
    return done["output"]["error"]


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
    limits = ["--max_new_tokens=30", "--max_upload_megabytes=1", f"--port={port}"]
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
            str(tmp_path / "page.png"),
        ]
        done = subprocess.run(
            [serve_python, Path(__file__).with_name("browse_page.py"), *arguments],
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert done.returncode == 0, done.stderr
        secret = write_images(tmp_path / "secret", 1) and tmp_path / "secret/test/0000.png"
        said = {
            requested(url, function, {"path": path, "meta": {"_type": "gradio.FileData"}})
            for function in (LOOK, ASK)
            for path in (str(secret), str(tmp_path / "none.png"), f"{url}/none.png")
        }
        assert said == {"only files that were uploaded to this page can be opened"}
        for path in (secret, tmp_path / "none.png", f"{url}/none.png"):
            with pytest.raises(HTTPError, match="403"):
                urlopen(f"{url}/gradio_api/file={path}")
        assert any(temporary.glob("beingvl-serve-*/**/0000.png"))
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(30)
    found = json.loads(done.stdout.splitlines()[-1])
    first = model.generate_with_vbpe(["one"], [image], max_new_tokens=30)[0]
    second = model.generate_with_vbpe(
        [[("one", first), ("two", None)]], [image], max_new_tokens=30
    )[0]
    assert [" ".join(answer.split()) for answer in found["answers"]] == [
        " ".join(answer.split()) for answer in (first, second)
    ]
    assert len(found["seen"]) > 4, "the answers should have grown before the reader's eyes"
    assert found["words"].startswith("16 codes in") and found["width"] == 512
    assert (
        "text.png cannot be read as an image" in found["bad"]
        and "a prompt is empty" in found["empty"]
    )
    assert "exceed the maximum allowed size" in found["large"]
    assert found["elsewhere"] == []
    time.sleep(1)
    assert not list(temporary.glob("beingvl-serve-*")) and not list(home.rglob("*"))
