"""Back ends that use a vLLM or llama.cpp server. Servers never see pictures: they get token ids and
stream token ids back.

    prompt ids ──POST──> their batches ──server-sent events──> new ids
"""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, suppress
from http.client import HTTPConnection, HTTPException, HTTPResponse
from typing import Any
from urllib.parse import urlsplit

from beingvl.data.made_with import ANCHOR
from beingvl.errors import InputError
from beingvl.inference.back_end import Row, Sampling
from beingvl.inference.model import BeingVL

CONNECT_SECONDS = 10


class Vllm:
    """The protocol of `vllm serve`."""

    path, url = "/v1/completions", "http://127.0.0.1:8000"

    @staticmethod
    def body(row: Row, model_name: str, stop_ids: Sequence[int]) -> dict[str, Any]:
        return {
            "model": model_name,
            "max_tokens": row.max_new_tokens,
            "return_token_ids": True,
            "stop_token_ids": stop_ids,
            # otherwise it uses the values in the model folder's generation_config.json
            **{"top_k": 0, "min_p": 0, "repetition_penalty": 1},
        }

    @staticmethod
    def new_ids(events: Iterator[dict[str, Any]], model: BeingVL) -> Iterator[list[int]]:
        for event in events:
            yield from (choice["token_ids"] for choice in event["choices"])


class LlamaCpp:
    """The protocol of llama.cpp's server, which ends answers at its model file's stop tokens."""

    path, url = "/completion", "http://127.0.0.1:8080"

    @staticmethod
    def body(row: Row, model_name: str, stop_ids: Sequence[int]) -> dict[str, Any]:
        return {
            "n_predict": row.max_new_tokens,
            "return_tokens": True,
            "samplers": ["temperature", "top_p"],
        }

    @staticmethod
    def new_ids(events: Iterator[dict[str, Any]], model: BeingVL) -> Iterator[list[int]]:
        """The server holds tokens back until they form whole characters, and then sends only the
        last one's id. So we encode the text of several tokens again.
        """
        num_before = 0
        for event in events:
            num_held_back = event["tokens_predicted"] - num_before - len(event["tokens"])
            num_before = event["tokens_predicted"]
            yield model.encoder.plain(event["content"]) if num_held_back else event["tokens"]


SERVERS: dict[str, type[Vllm] | type[LlamaCpp]] = {"vllm": Vllm, "llama.cpp": LlamaCpp}


class ServerBackEnd:
    """A server reached over HTTP; `name` is one of `SERVERS`.

    Raises InputError if no server answers, or with the server's own words if it refuses a request.
    """

    def __init__(self, name: str, url: str | None, model: BeingVL, with_vbpe: bool) -> None:
        if with_vbpe and model.image_positions == ANCHOR:
            raise InputError(
                f"{model.model_path} has its merged image tokens at anchors, and {name} counts "
                "positions itself; use --backend transformers, or train with --image_positions "
                "running"
            )
        self._words, self._model = SERVERS[name], model
        self._url = (url or self._words.url).rstrip("/")
        if "@" in self._url or "?" in self._url:  # perhaps a password: do not print it
            raise InputError("--backend_url has a user or a query, expected http://HOST:PORT")
        try:
            parts = urlsplit(self._url)
            if parts.scheme != "http" or not parts.hostname:
                raise InputError(f"--backend_url is {self._url}, expected http://HOST:PORT")
            self._address, self._prefix = parts.netloc, parts.path
            with closing(self._connect()) as connection:
                models = json.load(self._ask(connection, "GET", "/v1/models"))
            self.served = str(models["data"][0]["id"])
            """The name of the server's model."""
        except InputError:
            raise
        except (
            ValueError,
            ArithmeticError,
            LookupError,
            TypeError,
            RecursionError,
            OSError,
            HTTPException,
        ) as error:
            raise InputError(
                f"--backend_url is {self._url}, where /v1/models names no model "
                f"({type(error).__name__}: {error}); expected http://HOST:PORT of {name}"
            ) from error

    def answer(
        self, prompt_ids: Sequence[int], max_new_tokens: int, sampling: Sampling
    ) -> Generator[list[int] | int, None, None]:
        """As `BackEnd.answer`; the length of the server's queue is unknown, so it yields 0."""
        row, connection = Row(prompt_ids, max_new_tokens, sampling), self._connect()
        link = connection.sock
        link.settimeout(None)  # a request may wait in the queue for long
        threading.Thread(target=self._hand_out, args=[row, connection], daemon=True).start()
        try:
            yield from row.pieces(lambda: 0)
        finally:
            row.is_over = True
            with suppress(OSError):  # closed already; else this wakes the thread
                link.shutdown(socket.SHUT_RDWR)

    def _hand_out(self, row: Row, connection: HTTPConnection) -> None:
        try:
            with closing(connection):  # closing it ends the work on the server
                events = self._events(connection, row)
                for new_ids in self._words.new_ids(events, self._model):
                    for token in new_ids:
                        if token in self._model.stop_ids:
                            row.end()
                        if row.is_over:
                            return
                        row.new.put(token)
                row.end()
        except Exception as error:  # raised in the reader's thread
            row.end(error)

    def _events(self, connection: HTTPConnection, row: Row) -> Iterator[dict[str, Any]]:
        sampling = row.sampling
        asked = {
            "prompt": list(row.prompt_ids),
            "stream": True,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "seed": sampling.seed,
            **self._words.body(row, self.served, self._model.stop_ids),
        }
        is_whole = False  # http.client does not distinguish a broken connection from the end
        for line in self._ask(connection, "POST", self._words.path, json.dumps(asked)):
            if line.startswith((b"data: {", b"error: {")):
                event = json.loads(line.partition(b": ")[2])
                if "error" in event:
                    raise InputError(f"{self._url} failed: {str(event['error'])[:300]}")
                yield event
                is_whole = event.get("stop") is True  # llama.cpp's last event
            elif line.startswith(b"data: [DONE]"):
                is_whole = True
        if not is_whole:
            raise InputError(f"{self._url} closed the connection in the middle of an answer")

    def _connect(self) -> HTTPConnection:
        connection = HTTPConnection(self._address, timeout=CONNECT_SECONDS)
        try:
            connection.connect()
        except OSError as error:
            raise InputError(
                f"{self._url} does not answer ({error}); is the server running?"
            ) from error
        return connection

    def _ask(
        self, connection: HTTPConnection, method: str, path: str, body: str | None = None
    ) -> HTTPResponse:
        try:
            head = {"Content-Type": "application/json"}
            connection.request(method, self._prefix + path, body, head)
            response = connection.getresponse()
        except (OSError, HTTPException) as error:
            raise InputError(f"{self._url} dropped the connection ({error})") from error
        if response.status != 200:
            refusal = response.read(300).decode(errors="replace")
            raise InputError(f"{self._url} refused the request: {refusal}")
        return response
