"""The page of `beingvl serve`: a picture and its tokens on the left, the conversation on the right.
Only this module imports gradio, an optional extra.
"""

from __future__ import annotations

import json
import traceback
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
"""Content-Security-Policy: keeps the browser from loading the fonts and the script from other hosts
that gradio's page names.
"""
NO_PICTURE = "No picture: questions are asked without one."
EXAMPLES = ("What is in the picture?", "Describe the picture.")
LABELS_ABOVE = "#original, #borders { padding-top: 28px }"
"""gradio would put the labels over the pictures' first tokens."""
UPLOADED = """async () => {
    const uploading = () => document.querySelector("#upload .uploading, #upload progress")
    while (uploading()) await new Promise(done => setTimeout(done, 50))
}"""
"""Wait for the upload: until the browser has sent the file, the page does not know about it."""
Talk = tuple[str | None, Turns] | None
"""The picture that a conversation is about, and its turns."""


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
        css=LABELS_ABOVE,
        theme=Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
    )


def protected_app() -> FastAPI:
    """An application whose pages load nothing from other hosts."""
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
    """A page that opens only files that were uploaded to it.

    gradio copies any file or address that a request names, in whatever field, to where visitors can
    read it; it checks names only for pages that it launched itself.
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
    """The page. Its functions never raise: gradio would replace the conversation with an error."""

    def look(path: str | None) -> tuple[Any, Any, str, Any]:
        if path is None:
            return None, None, NO_PICTURE, gr.skip()
        try:
            found = conversations.look(path)
        except Exception as error:  # show the reason instead of the picture
            sentence = explained(error).replace(path, Path(path).name)
            gr.Warning(sentence)
            return None, None, sentence, None
        return found.original, found.borders, found.words, gr.skip()

    def ask(
        question: str, talk: Talk, path: str | None, request: gr.Request
    ) -> Iterator[tuple[str, Talk, list, str]]:
        turns = talk[1] if talk and talk[0] == path else []  # a new picture starts a new chat
        visitor, text = request.session_hash or "", ""
        try:
            for text, num_before in conversations.ask(question, turns, path, visitor):
                status = f"{num_before} ahead of yours" if num_before else "answering"
                yield "", talk, shown([*turns, (question, text or "…")], bool(path)), status
        except Exception as error:
            sentence = explained(error).replace(path or "\0", "the picture")
            gr.Warning(sentence)
            yield question, talk, shown(turns, bool(path)), sentence
            return
        turns = [*turns, (question, text)]
        yield "", (path, turns), shown(turns, bool(path)), ""

    def stop(request: gr.Request) -> None:
        conversations.stop(request.session_hash or "")

    with Page(title="Being-VL", analytics_enabled=False, delete_cache=(600, 3600)) as page:
        gr.Markdown(f"# Being-VL\n{title}: {conversations.facts()}", elem_id="facts")
        talk = gr.State()
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                suffixes = sorted(IMAGE_SUFFIXES)
                upload = gr.File(label="Picture", file_types=suffixes, elem_id="upload", height=120)
                image = {"interactive": False, "format": "png", "buttons": [], "min_width": 130}
                with gr.Row():
                    original = gr.Image(label="Original", elem_id="original", **image)
                    borders = gr.Image(label="Its tokens", elem_id="borders", **image)
                words = gr.Markdown(NO_PICTURE, elem_id="words")
            with gr.Column(scale=3, min_width=300):
                plain = {"render_markdown": False, "buttons": [], "feedback_options": None}
                chat = gr.Chatbot(label="Conversation", elem_id="chat", **plain)
                hint = "Ask, then press Enter"
                question = gr.Textbox(label="Question", placeholder=hint, elem_id="question")
                with gr.Row():
                    small = {"size": "sm", "min_width": 90}
                    send = gr.Button("Send", variant="primary", elem_id="send", **small)
                    halt = gr.Button("Stop", elem_id="stop", **small)
                    again = gr.Button("New chat", **small)
                status = gr.Markdown(elem_id="status")
                with gr.Row():
                    for example in EXAMPLES:
                        button = gr.Button(example, **small)
                        button.click(None, None, question, js=f"() => {json.dumps(example)}")
        private = {"api_visibility": "private", "show_progress": "hidden"}
        gr.on([upload.upload, upload.clear], None, None, chat, js="() => []", **private)
        seen = [original, borders, words, upload]
        gr.on([upload.upload, upload.clear], look, upload, seen, api_visibility="private")
        ready = gr.on([question.submit, send.click], None, js=UPLOADED, **private)
        asked = [question, talk, upload]
        asking = ready.then(ask, asked, [question, talk, chat, status], **private)
        halt.click(stop, None, None, **private)
        for cleared in (again.click, chat.clear):
            cleared(lambda: (None, [], ""), None, [talk, chat, status], cancels=asking, **private)
    page.queue(default_concurrency_limit=None)
    return page


def explained(error: Exception) -> str:
    """The message for an error; for a bug it only points to the log, which has the traceback."""
    if isinstance(error, InputError):
        return str(error)
    traceback.print_exception(error)
    return "the server failed; see its log"
