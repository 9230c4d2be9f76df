"""The page's interface to the model in `beingvl serve`, for several visitors at once."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from beingvl.errors import InputError
from beingvl.images.pictures import with_borders
from beingvl.inference.back_end import Answer, BackEnd, Sampling
from beingvl.inference.model import BeingVL
from beingvl.vbpe.visual_bpe import VisualBPE, owners

MAX_WAITING = 32  # each occupies one of the web server's 40 threads
MAX_REMEMBERED = 256  # pictures whose tokens are cached
Turns = list[tuple[str, str]]


class Look(NamedTuple):
    """A picture `[H, W, 3]` uint8 as the model sees it, enlarged; the same with the borders of its
    tokens (decoded from its codes if the VQ-GAN has a decoder); a sentence about both.
    """

    original: np.ndarray
    borders: np.ndarray
    words: str


class Progress(NamedTuple):
    """The answer so far, and how many questions are ahead of it."""

    text: str
    num_before: int = 0


class Conversations:
    """Pictures and answers for the page. Pictures go through the VQ-GAN one at a time; the back end
    batches questions.
    """

    def __init__(
        self, model: BeingVL, back_end: BackEnd, with_vbpe: bool, max_new_tokens: int
    ) -> None:
        self._model, self._back_end = model, back_end
        self._with_vbpe, self._max_new_tokens = with_vbpe, max_new_tokens
        self._looking = threading.Lock()
        self._token_ids: OrderedDict[str, np.ndarray] = OrderedDict()
        self._num_asked = 0
        self._is_stopped: dict[str, bool] = {}  # of the visitors with a growing answer

    def facts(self) -> str:
        """The model's properties, in one line."""
        model, layout = self._model, self._model.layout
        height, width = model.vqgan.grid
        dtype = str(model.model.dtype).removeprefix("torch.")
        facts = [
            f"{model.model.num_parameters():,} weights in {dtype} on {model.model.device}",
            f"{layout.num_text:,} text tokens",
            f"{layout.num_vq:,} codes, {layout.num_merges:,} merges",
            f"pictures of {height} x {width} codes" + ("" if self._with_vbpe else ", not merged"),
            f"template {model.template}",
            f"answers of up to {self._max_new_tokens} tokens",
        ]
        return " · ".join(facts)

    def look(self, path: str) -> Look:
        """Read an image file. Raises InputError if it is not one."""
        vqgan = self._model.vqgan
        with self._looking:
            pixels = vqgan.preprocess([path])
            codes = vqgan.encode(pixels)
            token_ids = self._remember(path, codes)
            original = vqgan.to_uint8(pixels)[0]
            picture = vqgan.decode(codes)[0] if vqgan.has_decoder else original
        grid, vbpe = codes[0], self._model.vbpe
        words = f"{grid.size} codes in {len(token_ids)} tokens"
        if not self._with_vbpe:
            picture = with_borders(picture, np.arange(grid.size).reshape(grid.shape))
        elif isinstance(vbpe, VisualBPE):
            ids = self._model.layout.token_to_image_ids(token_ids)
            picture = with_borders(picture, owners(vbpe, ids, *grid.shape))
        else:
            words += "; a published vBPE does not fix each token's cells, so no borders are shown"
        if not vqgan.has_decoder:
            words += "; the VQ-GAN has no decoder, so the borders are drawn on the original"
        return Look(with_borders(original, np.zeros(grid.shape)), picture, words)

    def _remember(self, path: str, codes: np.ndarray) -> np.ndarray:
        (token_ids,) = self._model.codes2tok(codes, self._with_vbpe)
        self._token_ids[path] = token_ids
        while len(self._token_ids) > MAX_REMEMBERED:
            self._token_ids.popitem(last=False)
        return token_ids

    def token_ids(self, path: str) -> np.ndarray:
        """A picture's token ids `[n]` int32; waits while `look` is reading one."""
        with self._looking:
            if path in self._token_ids:
                return self._token_ids[path]
            return self._remember(path, self._model.img2codes([path]))

    def ask(
        self, question: str, turns: Turns, path: str | None, visitor: str = ""
    ) -> Iterator[Progress]:
        """The growing answer to a question about the picture at `path`; `stop(visitor)` ends it
        early. Raises InputError for an invalid question.
        """
        if self._num_asked >= MAX_WAITING:
            raise InputError("too many questions are waiting; ask again in a moment")
        self._num_asked += 1
        self._is_stopped[visitor] = False
        try:
            images = [self.token_ids(path)] if path else []
            with self._looking:  # long texts take memory
                prompt_ids = self._model.tokenize_with_tokens([*turns, (question, None)], images)
            self._model.check_length(prompt_ids, self._max_new_tokens)
            answer, text = Answer(self._model, self._max_new_tokens), ""
            for piece in answer.pieces(self._back_end, prompt_ids, Sampling()):
                if self._is_stopped.get(visitor):
                    break
                if isinstance(piece, int):
                    yield Progress(text, piece)
                else:
                    text += piece
                    yield Progress(text)
        finally:
            self._num_asked -= 1
            self._is_stopped.pop(visitor, None)

    def stop(self, visitor: str) -> None:
        """End the answer that a visitor is waiting for."""
        if visitor in self._is_stopped:
            self._is_stopped[visitor] = True


def refuse_other_files(data: Any, uploads: Path) -> None:
    """Raises InputError if a file that a request names (`{"path": …}`, at any depth) is not inside
    `uploads`, whether it exists or not.
    """
    if isinstance(data, dict):
        if "path" in data:
            path = Path(str(data["path"])).resolve()
            if not path.is_relative_to(uploads.resolve()):
                raise InputError("only files that were uploaded to this page can be opened")
        data = list(data.values())
    for value in data if isinstance(data, list) else []:
        refuse_other_files(value, uploads)


def shown(turns: Turns, has_picture: bool) -> list[dict[str, str]]:
    """The turns in gradio's chat format; those without a picture say so."""
    without = "" if has_picture else "(without a picture) "
    return [
        {"role": role, "content": text}
        for question, answer in turns
        for role, text in (("user", without + question), ("assistant", answer or "(nothing)"))
    ]
