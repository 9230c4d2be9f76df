"""A page to try a model: upload a picture, ask, watch the answer appear, see the borders of the
picture's tokens.

    pip install '.[serve]'
    beingvl serve --model stage-3/final --vbpe_path vbpe.json         then open
        http://127.0.0.1:7860

For one person at this machine: it listens on the loopback address, answers one question at a time,
and asks nothing of any other machine; its pages tell the browser to do the same. Uploads lie in a
temporary folder until it ends. Ctrl-C ends it. docs/Inference.md says how to serve many.
"""

from __future__ import annotations

import argparse
import os
import queue
import signal
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from beingvl.errors import InputError
from beingvl.images.vq_codes import IMAGE_SUFFIXES
from beingvl.images.vqgan import read_image
from beingvl.images.vqgan_pictures import with_borders
from beingvl.inference.model import BeingVL
from beingvl.report.vbpe import owners
from beingvl.vbpe.visual_bpe import VisualBPE

LOOPBACK = ("127.0.0.1", "localhost", "::1")
QUIET = {
    "GRADIO_ANALYTICS_ENABLED": "False",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
}
"""Environment variables that must be there before gradio is imported."""
SAME_ORIGIN = "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:"
"""Content-Security-Policy: gradio's page names fonts and a script of other hosts; the browser
leaves them out.
"""
MAX_WAITING = 16


def run(args: argparse.Namespace) -> None:
    for name in ("max_upload_megabytes", "max_new_tokens"):
        if getattr(args, name) < 1:
            raise InputError(f"--{name} is {getattr(args, name)}, expected at least 1")
    listener = listen(args.host, args.port)
    with listener, temporary_folder():
        os.environ.update(QUIET)
        try:
            import uvicorn
            from gradio import mount_gradio_app
        except ImportError as error:
            needed = "pip install '.[serve]', in an environment of its own"
            raise InputError(f"beingvl serve needs gradio ({error}): {needed}") from error
        model = BeingVL(args.model, args.vbpe_path)
        model.img2codes(
            []
        )  # refuses a VQ-GAN that does not belong to the model now, not at the first picture
        model.load_model(args.torch_dtype, args.device)
        app = mount_gradio_app(
            protected_app(args.host),
            build_page(
                Conversations(model, not args.raw, args.max_new_tokens), args.model.resolve()
            ),
            path="/",
            max_file_size=args.max_upload_megabytes * 1_000_000,
            ssr_mode=False,
            enable_monitoring=False,
            footer_links=[],
            theme=system_theme(),
        )
        print(f"http://{args.host}:{listener.getsockname()[1]}   (Ctrl-C ends it)", flush=True)
        uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=2)).run(
            sockets=[listener]
        )


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
        tempfile.tempdir = os.environ["GRADIO_TEMP_DIR"] = os.environ["MPLCONFIGDIR"] = folder
        try:
            yield
        finally:
            tempfile.tempdir = before
            signal.signal(signal.SIGTERM, handler)


# ---- the model behind the page ----


class Conversations:
    """What the page asks the model for; one question at a time."""

    def __init__(self, model: BeingVL, with_vbpe: bool, max_new_tokens: int) -> None:
        self._model, self._with_vbpe, self._max_new_tokens = model, with_vbpe, max_new_tokens
        self._lock = threading.Lock()

    def look(self, path: str) -> tuple[np.ndarray, list[int], str]:
        """An image file to (its picture with token borders `[H, W, 3]` uint8, its token ids, a
        sentence about both).
        """
        vqgan = self._model.vqgan
        with self._lock:
            pixels = vqgan.preprocess([read_image(path)])
            codes = vqgan.encode(pixels)
            token_ids = self._model.codes2tok(codes, self._with_vbpe)[0]
            picture = vqgan.decode(codes)[0] if vqgan.has_decoder else vqgan.to_uint8(pixels)[0]
        owners = self._owners(token_ids, codes[0])
        words = f"{codes[0].size} codes in {len(token_ids)} tokens"
        if owners is None:
            return (
                picture,
                token_ids.tolist(),
                f"{words}; a published vBPE gives no token its cells, so no borders are shown",
            )
        return with_borders(picture, owners), token_ids.tolist(), words

    def _owners(self, token_ids: np.ndarray, codes: np.ndarray) -> np.ndarray | None:
        if not self._with_vbpe:
            return np.arange(codes.size).reshape(codes.shape)
        vbpe = self._model.vbpe
        return (
            owners(vbpe, self._model.layout.token_to_image_ids(token_ids), *codes.shape)
            if isinstance(vbpe, VisualBPE)
            else None
        )

    def ask(
        self, question: str, turns: list[tuple[str, str]], image: list[int] | None
    ) -> Iterator[str]:
        """The answer so far, again and again while it grows. Raises InputError for what cannot
        be asked.
        """
        images = [np.array(image, np.int32)] if image else []
        prompt_ids = self._model.tokenize_with_tokens([*turns, (question, None)], images)

        def answer(on_text: Callable[[str], None]) -> None:
            with self._lock:
                self._model.answer_token_sequences(
                    [prompt_ids], self._max_new_tokens, on_text=on_text
                )

        text = ""
        for piece in pieces_of(answer):
            text += piece
            yield text


def pieces_of(work: Callable[[Callable[[str], None]], None]) -> Iterator[str]:
    """What `work(on_text)` says, while it works in a thread of its own; its exception, if it
    raises one.
    """
    pieces: queue.SimpleQueue[str | BaseException | None] = queue.SimpleQueue()

    def run_work() -> None:
        try:
            work(pieces.put)
            pieces.put(None)
        except BaseException as error:
            pieces.put(error)

    threading.Thread(target=run_work, daemon=True).start()
    while (piece := pieces.get()) is not None:
        if isinstance(piece, BaseException):
            raise piece
        yield piece


# ---- the page ----


def protected_app(host: str) -> Any:
    """A FastAPI application whose pages load nothing from elsewhere, and which answers to its
    own name only.
    """
    from fastapi import FastAPI, Request, Response
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    if (
        host in LOOPBACK
    ):  # another name for 127.0.0.1 is a foreign page's try to reach this one through the browser
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost", "[::1]"])

    async def add_policy(request: Request, call_next: Callable[[Request], Any]) -> Response:
        response = await call_next(request)
        response.headers["Content-Security-Policy"] = SAME_ORIGIN
        return response

    app.middleware("http")(add_policy)
    return app


def system_theme() -> Any:
    from gradio.themes import Default

    return Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])


def build_page(conversations: Conversations, model_path: Path) -> Any:
    """The gradio page: picture and its tokens on the left, the conversation on the right."""
    import gradio as gr

    def look(path: str | None) -> tuple[Any, list[int] | None, str, list, list]:
        if path is None:
            return None, None, "", [], []
        try:
            picture, token_ids, words = conversations.look(path)
        except InputError as error:
            raise gr.Error(
                str(error).replace(path, Path(path).name), print_exception=False
            ) from error
        return picture, token_ids, words, [], []

    def ask(
        question: str, turns: list, image: list[int] | None
    ) -> Iterator[tuple[str, list, list]]:
        text = ""
        try:
            for text in conversations.ask(question, turns, image):
                yield "", turns, shown([*turns, (question, text)])
        except InputError as error:
            raise gr.Error(str(error), print_exception=False) from error
        done = [*turns, (question, text)]
        yield "", done, shown(done)

    with gr.Blocks(title="Being-VL", analytics_enabled=False, delete_cache=(600, 3600)) as page:
        gr.Markdown(f"# Being-VL\n{model_path.parent.name}/{model_path.name}")
        turns, image = gr.State([]), gr.State(None)
        with gr.Row():
            with gr.Column(scale=2):
                upload = gr.File(
                    label="Picture", file_types=sorted(IMAGE_SUFFIXES), elem_id="upload", height=120
                )
                borders = gr.Image(
                    label="Its tokens",
                    interactive=False,
                    format="png",
                    buttons=[],
                    elem_id="borders",
                )
                words = gr.Markdown(elem_id="words")
            with gr.Column(scale=3):
                chat = gr.Chatbot(
                    label="Conversation",
                    render_markdown=False,
                    buttons=[],
                    feedback_options=None,
                    elem_id="chat",
                )
                question = gr.Textbox(
                    label="Question", placeholder="Ask, then press Enter", elem_id="question"
                )
                again = gr.Button("New conversation")
        upload.change(look, upload, [borders, image, words, turns, chat], api_visibility="private")
        question.submit(
            ask, [question, turns, image], [question, turns, chat], api_visibility="private"
        )
        for cleared in (again.click, chat.clear):
            cleared(lambda: ([], []), None, [turns, chat], api_visibility="private")
    page.queue(max_size=MAX_WAITING, default_concurrency_limit=1)
    return page


def shown(turns: list[tuple[str, str]]) -> list[dict[str, str]]:
    """Turns as gradio's chat shows them."""
    messages = []
    for question, answer in turns:
        messages += [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer or "(nothing)"},
        ]
    return messages
