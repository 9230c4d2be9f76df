"""What the page of `beingvl serve` asks of the model, one question at a time."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from beingvl.errors import InputError
from beingvl.images.pictures import with_borders
from beingvl.inference.model import BeingVL
from beingvl.vbpe.visual_bpe import VisualBPE, owners

Turns = list[tuple[str, str]]


class Conversations:
    """Pictures and answers for the page; the model works for one visitor at a time."""

    def __init__(self, model: BeingVL, with_vbpe: bool, max_new_tokens: int) -> None:
        self._model, self._with_vbpe, self._max_new_tokens = model, with_vbpe, max_new_tokens
        self._lock = threading.Lock()

    def look(self, path: str) -> tuple[np.ndarray, list[int], str]:
        """An image file to (its picture with token borders `[H, W, 3]` uint8, its token ids, a
        sentence about both).
        """
        vqgan = self._model.vqgan
        with self._lock:
            pixels = vqgan.preprocess([path])
            codes = vqgan.encode(pixels)
            (token_ids,) = self._model.codes2tok(codes, self._with_vbpe)
            picture = vqgan.decode(codes)[0] if vqgan.has_decoder else vqgan.to_uint8(pixels)[0]
        grid, vbpe = codes[0], self._model.vbpe
        words = f"{grid.size} codes in {len(token_ids)} tokens"
        if not self._with_vbpe:
            picture = with_borders(picture, np.arange(grid.size).reshape(grid.shape))
        elif isinstance(vbpe, VisualBPE):
            ids = self._model.layout.token_to_image_ids(token_ids)
            picture = with_borders(picture, owners(vbpe, ids, *grid.shape))
        else:
            words += "; a published vBPE gives no token its cells, so no borders are shown"
        return picture, token_ids.tolist(), words

    def ask(self, question: str, turns: Turns, image: list[int] | None) -> Iterator[str]:
        """The answer so far, while it grows. Raises InputError for what cannot be asked."""
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
    """What `work(on_text)` says, while it works in a thread of its own; raises what it raises."""
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


def refuse_other_files(data: Any, uploads: Path) -> None:
    """Raises InputError when a file that a request names (`{"path": …}`, at any depth) does not
    lie in `uploads`, whether it exists or not.
    """
    if isinstance(data, dict):
        if "path" in data:
            path = Path(str(data["path"])).resolve()
            if not path.is_relative_to(uploads.resolve()):
                raise InputError("only files that were uploaded to this page can be opened")
        data = list(data.values())
    for value in data if isinstance(data, list) else []:
        refuse_other_files(value, uploads)


def shown(turns: Turns) -> list[dict[str, str]]:
    """Turns as gradio's chat shows them."""
    return [
        {"role": role, "content": text}
        for question, answer in turns
        for role, text in (("user", question), ("assistant", answer or "(nothing)"))
    ]
