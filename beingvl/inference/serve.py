"""The frame of `beingvl serve`: address, key, temporary folder, web server. The page is in page.py
and conversations.py, the API in api.py.
"""

from __future__ import annotations

import importlib
import os
import signal
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from beingvl.errors import InputError, check_at_least
from beingvl.inference.api_key import KEY
from beingvl.inference.back_end import BackEnd, Sampling, TransformersBackEnd
from beingvl.inference.conversations import Conversations
from beingvl.inference.model import BeingVL
from beingvl.inference.other_servers import ServerBackEnd
from beingvl.vbpe.visual_bpe import VisualBPE

TRANSFORMERS = "transformers"
LOOPBACK = ("127.0.0.1", "localhost", "::1")
OWN_NAMES = ["127.0.0.1", "localhost", "[::1]"]  # as in a request's Host header
FOLDERS = ("GRADIO_TEMP_DIR", "GRADIO_EXAMPLES_CACHE", "MPLCONFIGDIR")
QUIET = {
    "GRADIO_ANALYTICS_ENABLED": "False",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
}


def serve(
    model_path: Path | str,
    *,
    vbpe_path: Path | str | None = None,
    raw: bool = False,
    template: str | None = None,
    api: bool = False,
    api_key: str | None = None,
    backend: str = TRANSFORMERS,
    backend_url: str | None = None,
    host: str = "127.0.0.1",
    port: int = 7860,
    max_upload_megabytes: int = 20,
    max_images: int = 8,
    max_new_tokens: int = 128,
    max_seconds: int = 300,
    torch_dtype: str | None = None,
    device: str | None = None,
) -> None:
    """Serve a page on `host`, or with `api` OpenAI's chat completions, until interrupted.

    With `api_key`, only requests with that key are answered. `backend`: what computes the answers,
    this process or, with `api`, a server of that kind at `backend_url`.
    Raises InputError if an optional extra, gradio or Starlette, is not installed.
    """
    limits = {"images": max_images, "new_tokens": max_new_tokens, "seconds": max_seconds}
    check_at_least(
        1,
        max_upload_megabytes=max_upload_megabytes,
        **{f"max_{name}": value for name, value in limits.items()},
    )
    if api and api_key is None and host not in LOOPBACK:
        raise InputError(f"--host {host} lets others use the model: give --api_key, or {KEY}")
    if backend != TRANSFORMERS and not api:
        raise InputError(f"--backend {backend} is for --api")
    max_bytes = max_upload_megabytes * 1_000_000
    listener = listen(host, port)
    with listener, temporary_folder():
        os.environ.update(QUIET)
        application = import_application(api)
        model = BeingVL(model_path, vbpe_path, template=template)
        model.img2codes([])  # refuse a wrong VQ-GAN now, not at the first picture
        with_vbpe = model.uses_vbpe(False if raw else None)
        answers: BackEnd
        if backend == TRANSFORMERS:
            answers = TransformersBackEnd(model.load_model(torch_dtype, device))
        else:
            answers = ServerBackEnd(backend, backend_url, model, with_vbpe)
        folder = model.model_path.resolve()
        name = f"{folder.parent.name}/{folder.name}"
        warm_up(model, answers)
        if api:
            bounds = application.Limits(max_bytes, **limits)
            service = application.Service(model, answers, with_vbpe, name, bounds)
            app = application.build_api(service, api_key)
        else:
            conversations = Conversations(model, answers, with_vbpe, max_new_tokens)
            app = application.build_app(conversations, name, max_bytes)
        path = "/v1" if api else ""
        shown = f"[{host}]" if ":" in host else host  # IPv6
        print(f"http://{shown}:{listener.getsockname()[1]}{path}   (Ctrl-C ends it)", flush=True)
        run_server(app, host, listener)


def warm_up(model: BeingVL, back_end: BackEnd) -> None:
    """Load and compile what the first visitor would otherwise wait for. The prompt is the last
    token id, which a server with a wrong model, such as the base, does not know.
    """
    side = model.vqgan.image_size
    codes = model.vqgan.encode(torch.zeros(1, 3, side, side))
    if isinstance(model.vbpe, VisualBPE):
        model.vbpe.encode_batch(codes)
    list(back_end.answer([model.layout.size - 1], 1, Sampling()))


def import_application(api: bool) -> Any:
    """The module of the API or of the page. Imported late: they need optional extras, and gradio
    reads the environment on import.
    """
    try:
        return importlib.import_module(f"beingvl.inference.{'api' if api else 'page'}")
    except ImportError as error:
        needed = "pip install '.[api]'" if api else "pip install '.[serve]'"
        what = "--api needs starlette and uvicorn" if api else "needs gradio"
        place = "" if api else ", in an environment of its own"
        raise InputError(f"beingvl serve {what} ({error}): {needed}{place}") from error


def run_server(app: Any, host: str, listener: socket.socket) -> None:
    """Serve until a signal. On a loopback address, only requests to this machine's own names are
    answered; otherwise a foreign web page could reach the server through the user's browser.
    """
    import uvicorn  # an optional extra
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    names = OWN_NAMES if host in LOOPBACK else ["*"]
    guarded = TrustedHostMiddleware(app, allowed_hosts=names)
    config = uvicorn.Config(guarded, log_level="warning", timeout_graceful_shutdown=2)
    uvicorn.Server(config).run(sockets=[listener])


def listen(host: str, port: int) -> socket.socket:
    """Raises InputError if the address is not available."""
    if not 0 <= port <= 65535:
        raise InputError(f"--port is {port}, expected 0 … 65535")
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family)
    except OSError as error:
        raise InputError(
            f"cannot listen on {host}, port {port} ({error}); choose another --port or --host"
        ) from error


@contextmanager
def temporary_folder() -> Iterator[None]:
    """Everything that this process and gradio write goes into one folder, which is removed at the
    end, also after SIGTERM.
    """
    before, handler = tempfile.tempdir, signal.signal(signal.SIGTERM, signal.default_int_handler)
    with tempfile.TemporaryDirectory(prefix="beingvl-serve-", ignore_cleanup_errors=True) as folder:
        tempfile.tempdir = folder
        os.environ.update(dict.fromkeys(FOLDERS, folder))
        try:
            yield
        finally:
            tempfile.tempdir = before
            signal.signal(signal.SIGTERM, handler)
