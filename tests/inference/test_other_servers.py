"""Answers that servers of vLLM and llama.cpp make from token ids: what is asked, what comes back,
what goes wrong. llama.cpp's server itself is slow to install.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from beingvl.artefact.manifest import MANIFEST_FILE, read_manifest, write_manifest
from beingvl.commands.main import main
from beingvl.errors import InputError
from beingvl.inference import other_servers
from beingvl.inference.back_end import Answer, Sampling
from beingvl.inference.model import BeingVL
from beingvl.inference.other_servers import ServerBackEnd
from beingvl.inference.serve import listen
from tests.environments import own_environment
from tests.inference.published_template import taught_to_say
from tests.launcher import free_port
from tests.tiny import LAYOUT

Asked = list[dict[str, Any]]


@pytest.fixture(scope="module")
def model(run_folder: Path) -> BeingVL:
    return BeingVL(run_folder / "stage-3" / "final", run_folder / "vbpe")


@contextmanager
def replay(
    events: list[Any],
    status: int = 200,
    is_whole: bool = True,
    models: bytes = b'{"data": [{"id": "theirs"}]}',
    before: Callable[[], object] = int,
) -> Iterator[tuple]:
    """A server that says these events to everybody, after `before`, and what it was asked."""
    asked: Asked = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._say(200, [models], True, b"%s")

        def do_POST(self) -> None:
            asked.append({"path": self.path, **json.loads(self.rfile.read(self._length()))})
            before()
            told = [json.dumps(event).encode() for event in events]
            self._say(status, told, is_whole, b"data: %s\n\n")

        def _length(self) -> int:
            return int(self.headers["Content-Length"])

        def _say(self, status: int, parts: list[bytes], is_whole: bool, form: bytes) -> None:
            self.send_response(status)
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            for part in parts:
                data = form % part
                self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
            if is_whole:
                self.wfile.write(b"e\r\ndata: [DONE]\n\n\r\n" * form.startswith(b"data"))
                self.wfile.write(b"0\r\n\r\n")
            self.close_connection = True

        def log_message(self, *words: Any) -> None:
            """Nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", asked
        finally:
            server.shutdown()


def by_vllm(*ids: int) -> dict:
    return {"choices": [{"token_ids": list(ids), "text": "?"}]}


def by_llama_cpp(num_predicted: int, content: str, *ids: int) -> dict:
    return {"tokens": list(ids), "content": content, "tokens_predicted": num_predicted}


def new_ids(back_end: ServerBackEnd, sampling: Sampling, max_new_tokens: int = 9) -> list[int]:
    pieces = back_end.answer([256, 5, 6], max_new_tokens, sampling)
    return [token for piece in pieces if isinstance(piece, list) for token in piece]


def test_vllm_is_asked_and_answers_by_ids(model: BeingVL) -> None:
    events = [by_vllm(1, 2), by_vllm(3), by_vllm(model.layout.eos_id), by_vllm(4)]
    with replay(events) as (url, asked):
        back_end = ServerBackEnd("vllm", f"{url}/", model, True)
        assert new_ids(back_end, Sampling(0.5, 0.9, 3)) == [1, 2, 3]
    [found] = asked
    assert found["path"] == "/v1/completions" and found["model"] == back_end.served == "theirs"
    assert found["prompt"] == [256, 5, 6] and found["max_tokens"] == 9 and found["stream"] is True
    assert (found["temperature"], found["top_p"], found["seed"]) == (0.5, 0.9, 3)
    assert found["stop_token_ids"] == model.stop_ids and found["return_token_ids"] is True


def test_llama_cpp_is_asked_and_what_it_holds_back_is_not_lost(model: BeingVL) -> None:
    """It streams "né": the first byte's token is named by no event. The last event counts eos."""
    n, *e = model.encoder.plain("né")
    events = [by_llama_cpp(1, "n", n), by_llama_cpp(3, "é", e[1]), by_llama_cpp(4, "")]
    with replay(events) as (url, asked):
        back_end = ServerBackEnd("llama.cpp", url, model, True)
        assert new_ids(back_end, Sampling()) == [n, *e]
    [found] = asked
    assert found["path"] == "/completion" and found["prompt"] == [256, 5, 6]
    assert found["n_predict"] == 9 and found["temperature"] == 0 and found["seed"] is None
    assert found["samplers"] == ["temperature", "top_p"]


def test_what_goes_wrong_there_is_said(model: BeingVL) -> None:
    refusal = {"error": {"message": "Prompt contains invalid tokens"}}
    for events, status, is_whole, message in [
        ([refusal], 400, True, "refused the request: .*Prompt contains invalid tokens"),
        ([by_vllm(1), refusal], 200, True, "failed: .*Prompt contains invalid tokens"),
        ([by_vllm(1)], 200, False, "closed the connection"),
    ]:
        with replay(events, status, is_whole) as (url, _):
            back_end = ServerBackEnd("vllm", url, model, True)
            with pytest.raises(InputError, match=message):
                new_ids(back_end, Sampling())
    with pytest.raises(InputError, match=r"closed the connection|does not answer"):
        new_ids(back_end, Sampling())


@pytest.mark.parametrize("models", [b"<html>", b"{}", b'{"data": []}', b"[1]", b"null"])
def test_a_server_of_another_kind_is_said(model: BeingVL, models: bytes) -> None:
    with (
        replay([], models=models) as (url, _),
        pytest.raises(InputError, match=f"--backend_url is {url}, where /v1/models names no model"),
    ):
        ServerBackEnd("vllm", url, model, True)


@pytest.mark.parametrize("url", ["http://127.0.0.1:abc", "http://[::1"])
def test_an_address_that_is_none_is_said(model: BeingVL, url: str) -> None:
    with pytest.raises(InputError, match=f"--backend_url is {re.escape(url)}, "):
        ServerBackEnd("vllm", url, model, True)


@pytest.mark.parametrize("url", ["http://me:secret@host", "ftp://secret@host", "http://h?k=secret"])
def test_no_password_of_an_address_is_printed(model: BeingVL, url: str) -> None:
    with pytest.raises(InputError, match="has a user or a query, expected") as error:
        ServerBackEnd("vllm", url, model, True)
    assert "secret" not in str(error.value)


def test_a_server_that_accepts_and_is_silent_is_not_waited_for(
    model: BeingVL, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(other_servers, "CONNECT_SECONDS", 0.2)
    with (
        listen("127.0.0.1", 0) as silent,
        pytest.raises(InputError, match=r"dropped the connection \(timed out\)"),
    ):
        ServerBackEnd("vllm", f"http://127.0.0.1:{silent.getsockname()[1]}", model, True)


def test_nothing_stays_of_a_reader_who_left_before_the_first_token(model: BeingVL) -> None:
    is_asked, may_answer = threading.Event(), threading.Event()

    def before() -> None:
        is_asked.set()
        may_answer.wait(30)

    def readers() -> set[threading.Thread]:
        return {one for one in threading.enumerate() if "_hand_out" in one.name}

    with replay([by_vllm(1)], before=before) as (url, _):
        pieces = ServerBackEnd("vllm", url, model, True).answer([256], 9, Sampling())
        assert next(pieces) == 0 and is_asked.wait(10)
        [reader] = readers()
        pieces.close()
        reader.join(10)
        assert not reader.is_alive()
        may_answer.set()


def test_refusals_at_the_start(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(run_folder / "stage-3" / "final", tmp_path / "final")
    manifest = read_manifest(folder)
    (folder / MANIFEST_FILE).unlink()
    details = {"identity": {}, "image_positions": "anchor"}
    write_manifest(folder, "model", {}, manifest.lineage, details)
    stock, free = run_folder / "stage-3" / "final", f"--backend_url=http://127.0.0.1:{free_port()}"
    for words, message in [
        (["--api", f"--model={folder}"], "counts positions itself; use --backend transformers"),
        (["--api", f"--model={stock}"], "does not answer (Connection refused)"),
        (["--api", f"--model={stock}", "--backend_url=ftp://x"], "is ftp://x, expected http://"),
        ([f"--model={stock}"], "--backend vllm is for --api"),
    ]:
        command = ["serve", "--backend=vllm", "--port=0", free, *words]
        assert main([*command, f"--vbpe_path={run_folder / 'vbpe'}"]) == 2
        assert message in capsys.readouterr().err.replace("[Errno 111] ", "")
    with replay([{"error": "unknown token"}], 400) as (url, _):
        command = ["serve", "--backend=llama.cpp", "--port=0", f"--backend_url={url}", "--api"]
        assert main([*command, f"--model={stock}", f"--vbpe_path={run_folder / 'vbpe'}"]) == 2
        assert "refused the request" in capsys.readouterr().err, (
            "it serves the base, which has fewer ids"
        )


def text_of(model: BeingVL, back_end: ServerBackEnd, prompt: list[int]) -> str:
    pieces = Answer(model, 8).pieces(back_end, prompt, Sampling())
    return "".join(piece for piece in pieces if isinstance(piece, str))


@pytest.mark.slow
def test_llama_cpp_gives_the_ids_of_transformers(run_folder: Path, tmp_path: Path) -> None:
    python = own_environment(tmp_path / "venv", "xllamacpp", "gguf")
    script = Path(__file__).with_name("llama_cpp_server.py")
    folder = shutil.copytree(run_folder / "stage-3" / "final", tmp_path / "final")
    # Answers of two bytes a character, whose first one the server holds back.
    accents = taught_to_say(run_folder, tmp_path / "accents", ["Ġ", "Ã", "©", "Ê", "°", "e"])
    for path in (folder, accents):
        model = BeingVL(path, run_folder / "vbpe").load_model("float32", "cpu")
        prompts = [model.tokenize(f"question {number}") for number in range(12)]
        expected = model.continue_token_sequences(prompts, 8)
        port = free_port()
        server = subprocess.Popen(
            [python, script, path, str(port)], stdout=subprocess.PIPE, text=True
        )
        try:
            assert server.stdout and str(port) in server.stdout.readline()
            back_end = ServerBackEnd("llama.cpp", f"http://127.0.0.1:{port}", model, True)

            with ThreadPoolExecutor(4) as readers:
                texts = list(readers.map(partial(text_of, model, back_end), prompts))
            wanted = [model.decode_answer(ids) for ids in expected]
            # A random model's last character may not be whole, and is never said.
            assert all(map(str.startswith, wanted, texts))
            assert len("".join(texts)) > 0.8 * len("".join(wanted))
            with pytest.raises(InputError, match="invalid tokens"):
                list(back_end.answer([LAYOUT.size], 1, Sampling()))
        finally:
            server.kill()
            server.wait()
