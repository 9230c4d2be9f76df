"""The page of `beingvl serve` in gradio, an optional extra that nothing else imports: a picture and
its tokens on the left, the conversation on the right.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gradio as gr
from fastapi import FastAPI, Request, Response
from gradio.themes import Default
from gradio.utils import get_upload_folder

from beingvl.errors import InputError
from beingvl.images.image_source import IMAGE_SUFFIXES
from beingvl.inference.conversations import Conversations, Turns, refuse_other_files, shown

SAME_ORIGIN = "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:"
"""Content-Security-Policy: gradio's page names fonts and a script of other hosts; the browser
leaves them out.
"""
MAX_WAITING = 16


def build_app(conversations: Conversations, title: str, max_upload_bytes: int) -> FastAPI:
    """The page as a web application."""
    return gr.mount_gradio_app(
        protected_app(),
        build_page(conversations, title),
        path="/",
        max_file_size=max_upload_bytes,
        ssr_mode=False,
        enable_monitoring=False,
        footer_links=[],
        theme=Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
    )


def protected_app() -> FastAPI:
    """Pages load nothing from elsewhere."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)

    async def add_policy(request: Request, call_next: Callable[[Request], Any]) -> Response:
        if "file=http" in request.url.path:  # gradio would fetch it
            return Response(status_code=403)
        response = await call_next(request)
        response.headers["Content-Security-Policy"] = SAME_ORIGIN
        return response

    app.middleware("http")(add_policy)
    return app


class Page(gr.Blocks):
    """A page that opens the files that were uploaded to it and no others.

    gradio copies any file or address that a request names, in whatever field, to where its
    visitors can read it: it checks names only of pages that it started itself.
    """

    async def preprocess_data(
        self, block_fn: Any, inputs: list[Any], *more: Any, **options: Any
    ) -> list[Any]:
        try:
            refuse_other_files(inputs, Path(get_upload_folder()))
        except InputError as error:
            raise gr.Error(str(error), print_exception=False) from error
        return await super().preprocess_data(block_fn, inputs, *more, **options)


def build_page(conversations: Conversations, title: str) -> gr.Blocks:
    def look(path: str | None) -> tuple[Any, list[int] | None, str, list, list]:
        if path is None:
            return None, None, "", [], []
        try:
            picture, token_ids, words = conversations.look(path)
        except InputError as error:
            sentence = str(error).replace(path, Path(path).name)
            raise gr.Error(sentence, print_exception=False) from error
        return picture, token_ids, words, [], []

    def ask(
        question: str, turns: Turns, image: list[int] | None
    ) -> Iterator[tuple[str, Turns, list]]:
        text = ""
        try:
            for text in conversations.ask(question, turns, image):
                yield "", turns, shown([*turns, (question, text)])
        except InputError as error:
            raise gr.Error(str(error), print_exception=False) from error
        done = [*turns, (question, text)]
        yield "", done, shown(done)

    with Page(title="Being-VL", analytics_enabled=False, delete_cache=(600, 3600)) as page:
        gr.Markdown(f"# Being-VL\n{title}")
        turns, image = gr.State([]), gr.State(None)
        with gr.Row():
            with gr.Column(scale=2):
                suffixes = sorted(IMAGE_SUFFIXES)
                upload = gr.File(label="Picture", file_types=suffixes, elem_id="upload", height=120)
                look_of_image = {"interactive": False, "format": "png", "buttons": []}
                borders = gr.Image(label="Its tokens", elem_id="borders", **look_of_image)
                words = gr.Markdown(elem_id="words")
            with gr.Column(scale=3):
                plain = {"render_markdown": False, "buttons": [], "feedback_options": None}
                chat = gr.Chatbot(label="Conversation", elem_id="chat", **plain)
                hint = "Ask, then press Enter"
                question = gr.Textbox(label="Question", placeholder=hint, elem_id="question")
                again = gr.Button("New conversation")
        private = {"api_visibility": "private"}
        upload.change(look, upload, [borders, image, words, turns, chat], **private)
        question.submit(ask, [question, turns, image], [question, turns, chat], **private)
        for cleared in (again.click, chat.clear):
            cleared(lambda: ([], []), None, [turns, chat], **private)
    page.queue(max_size=MAX_WAITING, default_concurrency_limit=1)
    return page
