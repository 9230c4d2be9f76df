"""What stands around the page of `beingvl serve`: the address, a temporary folder, the web server.
The model behind it is in conversations.py, the page itself in page.py.
"""

from __future__ import annotations

import os
import signal
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from beingvl.errors import InputError, check_at_least
from beingvl.inference.conversations import Conversations
from beingvl.inference.model import BeingVL

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
    host: str = "127.0.0.1",
    port: int = 7860,
    max_upload_megabytes: int = 20,
    max_new_tokens: int = 128,
    torch_dtype: str | None = None,
    device: str | None = None,
) -> None:
    """Serve a page on `host` until it is interrupted. Raises InputError where gradio, an optional
    extra, is not installed.
    """
    check_at_least(1, max_upload_megabytes=max_upload_megabytes, max_new_tokens=max_new_tokens)
    listener = listen(host, port)
    with listener, temporary_folder():
        os.environ.update(QUIET)
        try:  # here, because gradio is an optional extra and reads the environment when imported
            import uvicorn

            from beingvl.inference.page import build_app
        except ImportError as error:
            needed = "pip install '.[serve]', in an environment of its own"
            raise InputError(f"beingvl serve needs gradio ({error}): {needed}") from error
        model = BeingVL(model_path, vbpe_path, template=template)
        model.img2codes([])  # refuses another model's VQ-GAN now, not at the first picture
        model.load_model(torch_dtype, device)
        folder = model.model_path.resolve()
        app = build_app(
            Conversations(model, not raw, max_new_tokens),
            f"{folder.parent.name}/{folder.name}",
            host,
            max_upload_megabytes * 1_000_000,
        )
        print(f"http://{host}:{listener.getsockname()[1]}   (Ctrl-C ends it)", flush=True)
        config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=2)
        uvicorn.Server(config).run(sockets=[listener])


def listen(host: str, port: int) -> socket.socket:
    """Raises InputError when the address cannot be had."""
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
    """Everything that this process and gradio write goes into one folder, which is removed at
    the end, also by SIGTERM.
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
