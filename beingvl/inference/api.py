"""`beingvl serve --api`: OpenAI's chat completions API, in Starlette.

    GET  /health                   health check; the only route that needs no key
    GET  /v1/models                the one model
    POST /v1/chat/completions      body ──Service.read──> prompt ids ──Answer──> JSON, or
                                   server-sent events

Every request is limited in bytes, pictures, new tokens and seconds. At most MAX_REQUESTS are
answered or wait at the same time.
"""

from __future__ import annotations

import hmac
import json
import threading
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import anyio
import numpy as np
from anyio.to_thread import run_sync
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from beingvl.errors import InputError
from beingvl.inference.back_end import Answer, BackEnd
from beingvl.inference.chat_request import (
    ChatRequest,
    RequestError,
    open_images,
    read_chat_request,
)
from beingvl.inference.model import BeingVL
from beingvl.json_file import parse_json

MAX_REQUESTS = 32  # each occupies one of anyio's 40 threads
JSON, CHUNK = "application/json", "chat.completion.chunk"


@dataclass(frozen=True)
class Limits:
    """Limits for one request."""

    body_bytes: int = 20_000_000
    images: int = 8
    new_tokens: int = 128
    seconds: float = 300


class ApiError(Exception):
    """An error response in the format of OpenAI's API."""

    def __init__(self, status: int, message: str, code: str, field: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.field = status, code, field

    def body(self) -> dict[str, Any]:
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        fields = {"message": str(self), "type": kind, "param": self.field, "code": self.code}
        return {"error": fields}


FAILED = ApiError(500, "the server failed; see its log", "internal_error")


class Service:
    """The model and its back end, shared by concurrent requests."""

    def __init__(
        self, model: BeingVL, back_end: BackEnd, with_vbpe: bool, name: str, limits: Limits
    ) -> None:
        self.model, self.back_end, self.name, self.limits = model, back_end, name, limits
        self.started = int(time.time())
        self._with_vbpe = with_vbpe
        self._reading = threading.Lock()

    def read(self, body: bytes) -> tuple[ChatRequest, list[int]]:
        """The parsed request, and its prompt as token ids. Raises ApiError for an invalid one."""
        try:
            fields = parse_json(body, "the body")
            if not isinstance(fields, dict):
                raise InputError("the body is not a JSON object")
            self.check_name(fields.get("model"))
            asked = read_chat_request(fields, self.limits.new_tokens)
            with self._reading:  # one request at a time: pictures and texts take memory
                tokens = self._image_tokens(asked.image_urls)
                prompt_ids = self.model.tokenize_with_tokens(asked.turns, tokens)
            self.model.check_length(prompt_ids, asked.max_new_tokens)
        except InputError as error:
            field = error.field if isinstance(error, RequestError) else None
            raise ApiError(400, str(error), "invalid_value", field) from error
        return asked, prompt_ids

    def _image_tokens(self, image_urls: Sequence[Any]) -> list[np.ndarray]:
        if not image_urls:  # a model without a VQ-GAN answers texts
            return []
        vqgan = self.model.vqgan
        cropped = open_images(image_urls, self.limits.images, vqgan.preprocessing)
        codes = vqgan.encode(vqgan.preprocessing.to_pixels(cropped))
        return self.model.codes2tok(codes, self._with_vbpe)

    def check_name(self, name: Any) -> None:
        """Raises ApiError for a different model name."""
        if name != self.name:
            found = f"there is no model {str(name)[:60]!r}, only {self.name!r}"
            raise ApiError(404, found, "model_not_found", "model")

    def card(self) -> dict[str, Any]:
        return {
            "id": self.name,
            "object": "model",
            "created": self.started,
            "owned_by": "beingvl",
        }


def build_api(service: Service, key: str | None) -> Starlette:
    """The API as a web application; without `key`, anyone who can reach it may use it."""

    async def health(request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def models(request: Request) -> Response:
        check_key(request, key)
        return JSONResponse({"object": "list", "data": [service.card()]})

    async def model(request: Request) -> Response:
        check_key(request, key)
        service.check_name(request.path_params["name"])
        return JSONResponse(service.card())

    return Starlette(
        routes=[
            Route("/health", health),
            Route("/v1/models", models),
            Route("/v1/models/{name:path}", model),
            Route("/v1/chat/completions", Completions(service, key), methods=["POST"]),
        ],
        exception_handlers={
            ApiError: _say_error,
            HTTPException: _say_error,
            Exception: _say_error,
        },
    )


def check_key(request: Request, key: str | None) -> None:
    """Raises ApiError unless the request has the right key. Keys are never shown."""
    given = request.headers.get("authorization", "").removeprefix("Bearer ")
    if key is not None and not hmac.compare_digest(given.encode(), key.encode()):
        raise ApiError(401, "the API key is missing or wrong", "invalid_api_key")


async def _say_error(request: Request, error: Exception) -> Response:
    if isinstance(error, HTTPException):
        code = str(error.detail).lower().replace(" ", "_")
        error = ApiError(error.status_code, str(error.detail), code)
    elif not isinstance(error, ApiError):
        error = FAILED
    retry = {"Retry-After": "1"} if error.status == 429 else None
    return JSONResponse(error.body(), error.status, retry)


async def read_body(request: Request, max_bytes: int) -> bytes:
    """Raises ApiError for any content type but JSON, because a browser sends other types from any
    page without asking; and as soon as there are more than `max_bytes`.
    """
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != JSON:
        raise ApiError(415, f"expected the content type {JSON}", "invalid_content_type")
    too_large = ApiError(413, f"expected at most {max_bytes:,} bytes", "request_too_large")
    size = request.headers.get("content-length", "")
    if size.isdecimal() and int(size) > max_bytes:
        raise too_large
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > max_bytes:
            raise too_large
    return bytes(body)


# ---- one completion ----


class Completions:
    """`POST /v1/chat/completions` as an ASGI application. A request occupies one of MAX_REQUESTS
    slots from the key check to the last event.
    """

    def __init__(self, service: Service, key: str | None) -> None:
        self._service, self._key = service, key
        self._num_requests = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        check_key(request, self._key)
        if self._num_requests >= MAX_REQUESTS:
            raise ApiError(429, "too many requests are waiting; try again", "rate_limit_exceeded")
        self._num_requests += 1
        try:
            response = await self._respond(request)
            await response(scope, receive, send)
        finally:
            self._num_requests -= 1

    async def _respond(self, request: Request) -> Response:
        limits = self._service.limits
        deadline = time.monotonic() + limits.seconds
        try:
            with anyio.fail_after(limits.seconds):
                body = await read_body(request, limits.body_bytes)
        except TimeoutError as error:
            raise ApiError(408, f"no body within {limits.seconds} s", "timeout") from error
        asked, prompt_ids = await run_sync(self._service.read, body)
        completion = Completion(self._service, asked, prompt_ids, deadline)
        if asked.stream:
            return StreamingResponse(completion.events(), media_type="text/event-stream")
        text = ""
        async with aclosing(completion.pieces()) as pieces:
            async for piece in pieces:
                text += piece
                if await request.is_disconnected():
                    return Response(status_code=499)  # the client is gone
        return JSONResponse(completion.whole(text))


class Completion:
    """One answer in the format of OpenAI's API."""

    def __init__(
        self, service: Service, asked: ChatRequest, prompt_ids: list[int], deadline: float
    ) -> None:
        self._service, self._asked, self._prompt_ids = service, asked, prompt_ids
        self._deadline = deadline
        self._answer = Answer(service.model, asked.max_new_tokens, asked.stops)
        self._head = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": service.name,
        }

    async def pieces(self) -> AsyncGenerator[str, None]:
        """Yields new text, and now and then "" while there is none. Raises ApiError when the time
        is up.
        """
        sampling = self._asked.sampling
        pieces = self._answer.pieces(self._service.back_end, self._prompt_ids, sampling)
        try:
            while (piece := await run_sync(next, pieces, None)) is not None:
                if time.monotonic() > self._deadline:
                    limit = f"the answer took more than {self._service.limits.seconds} s"
                    raise ApiError(504, limit, "timeout")
                yield piece if isinstance(piece, str) else ""
        finally:
            pieces.close()

    def whole(self, text: str) -> dict[str, Any]:
        """The response when not streaming."""
        message = {"role": "assistant", "content": text, "refusal": None}
        end = {"finish_reason": self._answer.finish_reason, "logprobs": None}
        choices = [{"index": 0, "message": message, **end}]
        return {
            **self._head,
            "object": "chat.completion",
            "choices": choices,
            "usage": self._usage(),
        }

    async def events(self) -> AsyncIterator[str]:
        """Server-sent events: the role, the text piece by piece, the finish reason, the usage."""
        yield self._chunk({"role": "assistant", "content": ""})
        try:
            async for piece in self.pieces():
                if piece:
                    yield self._chunk({"content": piece})
        except ApiError as error:
            yield _event(error.body())
            return
        except Exception:
            yield _event(FAILED.body())
            raise  # into the server's log
        yield self._chunk({}, self._answer.finish_reason)
        if self._asked.include_usage:
            chunk = {"object": CHUNK, "choices": [], "usage": self._usage()}
            yield _event({**self._head, **chunk})
        yield "data: [DONE]\n\n"

    def _chunk(self, delta: dict[str, str], finish_reason: str | None = None) -> str:
        choice = {"index": 0, "delta": delta, "finish_reason": finish_reason, "logprobs": None}
        return _event({**self._head, "object": CHUNK, "choices": [choice]})

    def _usage(self) -> dict[str, int]:
        prompt, new = len(self._prompt_ids), self._answer.num_tokens
        return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}


def _event(fields: dict[str, Any]) -> str:
    return f"data: {json.dumps(fields)}\n\n"
