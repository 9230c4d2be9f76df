"""The API says what the class says, to OpenAI's own client, streamed or not, to many at once; it
keeps to its limits, its key and this machine.
"""

from __future__ import annotations

import base64
import io
import json
import os
import signal
import socket
import subprocess
import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest
import uvicorn
from PIL import Image

from beingvl.commands.main import main
from beingvl.data.conversation import TextEncoder, build_sequence
from beingvl.evaluation.results import read_predictions
from beingvl.inference import api
from beingvl.inference.api import Limits, Service, build_api
from beingvl.inference.back_end import Answer, Sampling, TransformersBackEnd
from beingvl.inference.model import BeingVL
from beingvl.inference.serve import listen
from tests.inference.published_template import (
    PUBLISHED,
    SAYS_YEP,
    batches_of,
    taught_to_say,
)
from tests.launcher import ENVIRONMENT, PYTHON, free_port, process_of
from tests.tiny import LAYOUT

KEY = "a-key-that-nobody-may-see"
NAME = "stage-3/final"
GREEDY: dict[str, Any] = {"model": NAME, "temperature": 0}


@pytest.fixture(scope="module")
def model(run_folder: Path) -> BeingVL:
    return BeingVL(run_folder / "stage-3" / "final", run_folder / "vbpe").load_model(device="cpu")


@pytest.fixture(scope="module")
def images(run_folder: Path) -> list[Path]:
    return sorted((run_folder / "data" / "images" / "test").glob("*.png"))


@pytest.fixture(scope="module")
def server(
    run_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[int, Path]]:
    """The port of `beingvl serve --api` in a process of its own, and what it prints."""
    folder, port = tmp_path_factory.mktemp("api"), free_port()
    key, writable = os.pipe()  # can be read only once
    os.write(writable, f"{KEY}\n".encode())
    os.close(writable)
    words = ["serve", "--api", f"--model={run_folder / 'stage-3' / 'final'}", f"--port={port}"]
    words += [f"--vbpe_path={run_folder / 'vbpe'}", "--device=cpu", "--api_key=/dev/stdin"]
    words += ["--max_images=2", "--max_upload_megabytes=1", "--max_new_tokens=30"]
    with open(folder / "log", "w") as log:
        started = subprocess.Popen(
            [*PYTHON, "-m", "beingvl", *words],
            env=ENVIRONMENT,
            stdin=key,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
    os.close(key)
    assert started.stdout is not None
    line = started.stdout.readline()
    assert f"http://127.0.0.1:{port}/v1 " in line, (folder / "log").read_text()
    listening = process_of(psutil.Process(started.pid)).net_connections()
    addresses = {entry.laddr.ip for entry in listening if entry.status == psutil.CONN_LISTEN}
    assert addresses == {"127.0.0.1"}
    yield port, folder / "log"
    started.send_signal(signal.SIGTERM)
    rest = started.communicate(timeout=30)[0]
    assert KEY not in line + rest + (folder / "log").read_text()


def client(port: int, key: str = KEY, **options: Any) -> openai.OpenAI:
    return openai.OpenAI(
        base_url=f"http://127.0.0.1:{port}/v1", api_key=key, max_retries=0, **options
    )


def shown(image: Path) -> dict:
    data = base64.b64encode(image.read_bytes()).decode()
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}


def attached(image: Path) -> dict:
    url = shown(image)["image_url"]["url"]
    return {"type": "file", "file": {"filename": image.name, "file_id": None, "file_data": url}}


def said(text: str) -> dict:
    return {"type": "text", "text": text}


def user(*parts: dict) -> dict:
    return {"role": "user", "content": list(parts)}


def ask(port: int, messages: list, **options: Any) -> str:
    asked = client(port).chat.completions.create(messages=messages, **{**GREEDY, **options})
    return asked.choices[0].message.content or ""


def streamed(port: int, messages: list, **options: Any) -> list[Any]:
    asked = {**GREEDY, "stream_options": {"include_usage": True}, **options}
    return list(client(port).chat.completions.create(messages=messages, stream=True, **asked))


def test_streamed_and_whole_answers_are_those_of_the_class(
    server: tuple[int, Path], model: BeingVL, images: list[Path]
) -> None:
    first, second = images[:2]
    turns = [("one", "a seven"), ("two", None)]
    cases = [
        ([{"role": "user", "content": "hi"}], "hi", None),
        ([user(shown(first), said("what?"))], "what?", first),
        ([user(attached(second), said("what?"))], "what?", second),
        (
            [user(said("is"), shown(first), said("more than"), shown(second), said("?"))],
            "is<image>more than<image>?",
            [first, second],
        ),
        (
            [
                user(shown(first), said("one")),
                {"role": "assistant", "content": "a seven"},
                user(said("two")),
            ],
            turns,
            first,
        ),
        (
            [{"role": "system", "content": "Be brief."}, user(said("one"))],
            "Be brief.\n\none",
            None,
        ),
    ]
    for messages, prompt, image in cases:
        expected = model.generate_with_vbpe([prompt], [image], max_new_tokens=30)[0]
        whole = client(server[0]).chat.completions.create(messages=messages, **GREEDY)
        *chunks, last = streamed(server[0], messages)
        pieces = [chunk.choices[0].delta.content or "" for chunk in chunks]
        assert whole.choices[0].message.content == "".join(pieces) == expected
        assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason
        assert whole.usage == last.usage
        assert whole.usage.prompt_tokens == len(model.tokenize(prompt, image))
    assert len(pieces) > 3


def test_many_at_once_get_the_answers_of_evaluate(
    server: tuple[int, Path], run_folder: Path
) -> None:
    """`eval/stage-3` holds what `beingvl evaluate` was answered, 4 tokens each."""
    rows = read_predictions(run_folder / "eval" / "stage-3")
    folder = run_folder / "data" / "images"

    def answer(row: dict) -> str:
        message = user(shown(folder / row["image"]), said(row["question"]))
        return ask(server[0], [message], max_tokens=4)

    with ThreadPoolExecutor(20) as readers:
        answers = list(readers.map(answer, rows))
    assert len(rows) == 24 and answers == [row["prediction"] for row in rows]


def test_stops_and_lengths(server: tuple[int, Path]) -> None:
    port, messages = server[0], [{"role": "user", "content": "hi"}]
    whole = ask(port, messages)
    assert len(whole) > 4
    stop = whole[2:4]
    for one in (stop, ["never", stop], ["n" * 200_000, stop]):
        assert ask(port, messages, stop=one) == whole.split(stop)[0].strip()
        *chunks, usage = streamed(port, messages, stop=one)
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        assert text == whole.split(stop)[0].strip()
        assert chunks[-1].choices[0].finish_reason == "stop" and usage.usage.completion_tokens < 30
    for name in ("max_tokens", "max_completion_tokens"):
        done = client(port).chat.completions.create(messages=messages, **GREEDY, **{name: 3})
        assert done.choices[0].finish_reason == "length" and done.usage.completion_tokens == 3
    drawn = {ask(port, messages, temperature=1.5, top_p=0.9, seed=3) for _ in range(3)}
    assert len(drawn) == 1 and drawn != {whole}
    drawn = {ask(port, messages, temperature=number, seed=3) for number in (2, 2.0)}
    assert len(drawn) == 1 and ask(port, messages, temperature=1e-40) == whole


def test_errors_are_those_of_openai(server: tuple[int, Path], images: list[Path]) -> None:
    port = server[0]
    assert [found.id for found in client(port).models.list()] == [NAME]
    assert client(port).models.retrieve(NAME).owned_by == "beingvl"
    with pytest.raises(openai.AuthenticationError, match="missing or wrong"):
        client(port, key="another").models.list()
    with pytest.raises(openai.NotFoundError, match="no model 'gpt'") as missing:
        ask(port, [user(said("hi"))], model="gpt")
    assert missing.value.code == "model_not_found" and missing.value.param == "model"
    with pytest.raises(openai.NotFoundError):
        client(port).embeddings.create(model=NAME, input="hi")
    picture = shown(images[0])
    urls = [f"file://{images[0]}", str(images[0]), "../a.png", "data:,a", "s3://bucket/a.png"]
    urls += [
        "http://127.0.0.1/a.png",
        "http://169.254.169.254/latest",
        "https://localtest.me/a.png",
    ]
    elsewhere = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    bad: list[tuple[list, dict, str, str]] = [
        ([user(one, said("hi"))], {}, "messages", "image 1 is not a data URL") for one in elsewhere
    ]
    damaged = {"type": "image_url", "image_url": {"url": "data:image/png;base64,aGFsbG8="}}
    stored = {"type": "file", "file": {"file_id": "file-1"}}
    paper = {"type": "file", "file": {"file_data": "data:application/pdf;base64,JVBERi0xLjQK"}}
    strange = {"type": "image_url", "image_url": {"url": "data:image/png;base64,\N{EURO SIGN}"}}
    nowhere = {"type": "image_url", "image_url": {"url": None}}
    hi, ho = user(said("hi")), {"role": "assistant", "content": "ho"}
    system = {"role": "system", "content": "Be brief."}
    for messages, found in [
        ([], "nobody"),
        ([hi, ho], "user, assistant"),
        ([system], "system"),
        ([hi, hi], "user, user"),
        ([hi, system, hi], "user, system, user"),
    ]:
        bad.append((messages, {}, "messages", f"messages are from {found}; expected user, assist"))
    bad += [
        ([user(stored, said("hi"))], {}, "messages", "has a `file_id`, but no files are stored"),
        ([user(paper, said("hi"))], {}, "messages", "image 1 cannot be read as an image"),
        ([user(damaged, said("hi"))], {}, "messages", "image 1 cannot be read as an image"),
        ([user(*[picture] * 3, said("hi"))], {}, "messages", "3 images in one request, expected"),
        ([user(strange, said("hi"))], {}, "messages", "image 1 is not base64"),
        ([user({"type": "image"})], {}, "messages", r"messages\[0\] has an image part without a p"),
        ([user(nowhere)], {}, "messages", r"messages\[0\] has an image part without a picture, in"),
        ([user(said("hi"))], {"n": 2}, "n", "n is 2, which is not supported"),
        ([user(said("hi"))], {"temperature": 3}, "temperature", "expected a number from 0 to 2"),
        ([user(said("hi"))], {"max_tokens": 0}, "max_tokens", "expected an integer at least 1"),
        ([user(said("hi"))], {"stop": [""]}, "stop", "stop is not a text"),
        ([user(said("hi"))], {"tools": [{"type": "function"}]}, "tools", "which is not supported"),
    ]
    for messages, options, field, sentence in bad:
        with pytest.raises(openai.BadRequestError, match=sentence) as refused:
            ask(port, messages, **options)
        assert refused.value.param == field and refused.value.type == "invalid_request_error"
    for messages, sentence in [
        ([user(picture)], "a prompt is empty"),
        ([user(said("IMGIMGAAAAAAZ"))], "spells the reserved token"),
        ([user(said("long " * 120))], "do not fit the model's context"),
        ([user(said("<image>hi"))], "more <image> placeholders than images"),
    ]:
        for stream in (False, True):
            with pytest.raises(openai.BadRequestError, match=sentence):
                ask(port, messages, stream=stream)


def raw(
    port: int, method: str, path: str, body: Any = None, **headers: str
) -> tuple[int, dict | None]:
    """What the server answers a program that is not OpenAI's client."""
    connection = HTTPConnection("127.0.0.1", port, timeout=20)
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request(method, path, body, names, encode_chunked=not isinstance(body, bytes))
    answer = connection.getresponse()
    text = answer.read()
    connection.close()
    is_json = answer.getheader("content-type") == "application/json"
    return answer.status, json.loads(text) if is_json else None


def test_strangers_get_nowhere(server: tuple[int, Path]) -> None:
    port, bearer, chat = server[0], f"Bearer {KEY}", "/v1/chat/completions"
    asked = json.dumps({"model": NAME, "messages": [{"role": "user", "content": "hi"}]}).encode()
    as_json = {"Content_Type": "application/json", "Authorization": bearer}
    assert raw(port, "GET", "/health") == (200, {"status": "ok"})
    assert raw(port, "POST", chat, asked, **as_json)[0] == 200
    for path in ("/v1/models", f"/v1/models/{NAME}"):
        assert raw(port, "GET", path)[0] == 401
    assert raw(port, "POST", chat, asked, Content_Type="application/json")[0] == 401
    for host in ("evil.example", f"evil.example:{port}", "169.254.169.254"):  # DNS rebinding
        assert raw(port, "POST", chat, asked, **as_json, Host=host) == (400, None)
        assert raw(port, "GET", "/health", Host=host) == (400, None)
    # What a foreign page's form can send without the browser asking first.
    assert raw(port, "POST", chat, asked, Content_Type="text/plain", Authorization=bearer)[0] == 415
    for path in ("/", "/docs", "/openapi.json", "/v1/../../etc/passwd", "/v1/models/../../x"):
        status, found = raw(port, "GET", path, Authorization=bearer)
        assert status == 404 and found and set(found) == {"error"}
    assert raw(port, "GET", chat, Authorization=bearer)[0] == 405
    large = b'{"a": "' + b"a" * 1_100_000 + b'"}'
    assert raw(port, "POST", chat, large, **as_json)[0] == 413
    chunks = iter([large[:500_000], large[500_000:]])  # without a length
    assert raw(port, "POST", chat, chunks, **as_json, Transfer_Encoding="chunked")[0] == 413
    for body, sentence in [
        (b"{", "the body is not valid JSON"),
        (b"[]", "the body is not a JSON object"),
        (b"\xff\xfe", "the body is not valid JSON"),
        (b"[" * 100_000, "the body is not valid JSON"),
        (b'{"model": "' + NAME.encode() + b'", "messages": 3}', "messages is not a list"),
    ]:
        status, found = raw(port, "POST", chat, body, **as_json)
        assert status == 400 and found and sentence in found["error"]["message"]


@contextmanager
def served(model: BeingVL, limits: Limits) -> Iterator[int]:
    """The API in a thread of this process, without a key."""
    service = Service(model, TransformersBackEnd(model), True, NAME, limits)
    with listen("127.0.0.1", 0) as listener:
        running = uvicorn.Server(uvicorn.Config(build_api(service, None), log_level="error"))
        thread = threading.Thread(target=running.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            running.should_exit = True
            thread.join()


def test_a_request_takes_no_more_than_its_seconds_and_its_place(
    model: BeingVL, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api, "MAX_REQUESTS", 1)
    with served(model, Limits(new_tokens=400, seconds=0.3)) as port:
        with pytest.raises(openai.InternalServerError, match=r"took more than 0\.3 s") as late:
            ask(port, [user(said("hi"))])
        assert late.value.status_code == 504
        with pytest.raises(openai.APIError, match="took more than"):
            streamed(port, [user(said("hi"))])
    with (
        served(model, Limits(seconds=2)) as port,  # so that the second one comes in time
        socket.create_connection(("127.0.0.1", port)) as slow,
    ):
        head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9"
        slow.sendall(f"{head}\r\nContent-Type: application/json\r\n\r\n{{".encode())
        with pytest.raises(openai.RateLimitError):
            for _ in range(100):  # until the slow one has its place
                ask(port, [user(said("hi"))], max_tokens=1)
        assert b"408" in slow.recv(1000).split(b"\r\n")[0]
        assert ask(port, [user(said("hi"))], max_tokens=1) is not None


def test_questions_meet_in_batches_and_leave_them(
    model: BeingVL, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twelve questions of unlike lengths, two of them drawn, one whose reader leaves at once."""
    batches = batches_of(model, monkeypatch)
    back_end = TransformersBackEnd(model)
    prompts = [model.tokenize("word " * number) for number in range(1, 13)]
    limits = [5 + number for number in range(12)]
    drawn = Sampling(1.0, seed=7)

    def answer(number: int) -> tuple[str, str]:
        one = Answer(model, limits[number])
        pieces = one.pieces(back_end, prompts[number], drawn if number > 9 else Sampling())
        if number == 9:
            next(pieces)
            pieces.close()
            return "", ""
        text = "".join(piece for piece in pieces if isinstance(piece, str))
        return text, one.finish_reason

    with ThreadPoolExecutor(12) as readers:
        found = list(readers.map(answer, range(12)))
    sizes = [len(batch) for batch in batches]
    assert sum(sizes) == 12 and sizes.count(1) >= 2 and len(sizes) <= 5
    for number in range(9):
        expected = model.answer_token_sequences([prompts[number]], limits[number])[0]
        assert found[number] == (expected, "length")
    again = answer(11)
    assert again == found[11] and again[0] != model.answer_token_sequences(prompts[11:], 16)[0]


def test_a_model_of_the_published_template_is_asked_and_stops_in_it(
    run_folder: Path, tmp_path: Path, images: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = taught_to_say(run_folder, tmp_path / "final", SAYS_YEP)
    model = BeingVL(folder, run_folder / "vbpe").load_model(device="cpu")
    batches = batches_of(model, monkeypatch)
    messages = [
        user(shown(images[0]), said("one")),
        {"role": "assistant", "content": "a seven"},
        user(said("two")),
    ]
    with served(model, Limits(new_tokens=40)) as port:
        whole = client(port).chat.completions.create(messages=messages, **GREEDY)
        *chunks, last = streamed(port, messages)
    turns, tokens = [("one", "a seven"), ("two", None)], model.img2tok(images[:1])
    encoder = TextEncoder(folder, LAYOUT)
    expected = build_sequence(turns, tokens, encoder, LAYOUT, PUBLISHED).input_ids
    assert batches == [[expected], [expected]]
    assert whole.choices[0].message.content == "yep" and whole.choices[0].finish_reason == "stop"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "yep"
    assert whole.usage == last.usage and whole.usage.completion_tokens == len("yep</s>")


def test_one_picture_is_large_at_a_time(model: BeingVL) -> None:
    file = io.BytesIO()
    Image.new("RGB", (99, 99)).save(file, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    picture = {"type": "image_url", "image_url": {"url": url}}
    body = json.dumps({"model": NAME, "messages": [user(*[picture, said("hi")] * 3)]}).encode()
    open_: list[weakref.ref] = []

    def crop(image: Image.Image, name: str) -> Any:
        assert not any(earlier() for earlier in open_), "an earlier picture is still there"
        open_.append(weakref.ref(image))
        return real(image, name)

    service = Service(model, TransformersBackEnd(model), True, NAME, Limits())
    preprocessing = model.vqgan.preprocessing
    real = preprocessing.crop
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preprocessing, "crop", crop)
        service.read(body)
    assert len(open_) == 3


def test_a_model_without_a_vqgan_answers_texts(
    model: BeingVL, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model, "vqgan", None)
    service = Service(model, TransformersBackEnd(model), True, NAME, Limits())
    body = {"model": NAME, "messages": [{"role": "user", "content": "hi"}]}
    assert service.read(json.dumps(body).encode())[1]


def test_a_failure_reaches_the_reader_and_the_next_one_is_answered(model: BeingVL) -> None:
    back_end = TransformersBackEnd(model)
    with pytest.raises(IndexError):
        list(back_end.answer([model.layout.size + 9], 2, Sampling()))
    assert [new for new in back_end.answer([1, 2], 2, Sampling()) if new]


def test_a_key_is_never_repeated(
    run_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    command = ["serve", "--api", f"--model={run_folder / 'stage-3' / 'final'}", "--port=0"]
    monkeypatch.delenv("BEINGVL_API_KEY", raising=False)
    assert main([*command, "--host=0.0.0.0"]) == 2
    assert "lets others use the model: give --api_key, or BEINGVL_API_KEY" in (
        capsys.readouterr().err
    )
    (tmp_path / "empty").touch()
    (tmp_path / "two").write_text("a b")
    for value in (KEY, str(tmp_path), str(tmp_path / "empty"), str(tmp_path / "two")):
        assert main([*command, f"--api_key={value}"]) == 2
        said = capsys.readouterr()
        assert "key" in said.err and KEY not in said.err + said.out
    monkeypatch.setenv("BEINGVL_API_KEY", f"{KEY}\N{EURO SIGN}")
    assert main(command) == 2
    assert KEY not in capsys.readouterr().err
