"""Pictures as PNG files, and image ids back to a small picture inside a page."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import numpy as np
from PIL import Image

from beingvl.errors import InputError
from beingvl.tokenizer.vbpe import VisualBPE
from beingvl.tokenizer.vqgan import VQGAN


def to_png(pixels: np.ndarray) -> bytes:
    """A picture `[H, W, 3]` uint8 as the bytes of a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


class Pictures:
    """Decodes with a VQ-GAN and, for merged ids, a vBPE; without a VQ-GAN there are no pictures."""

    def __init__(self, vq_path: Path | None, vbpe_path: Path | None) -> None:
        self._vq = VQGAN.load(vq_path) if vq_path else None
        if self._vq is not None and not self._vq.has_decoder:
            raise InputError(f"{vq_path} has no decoder, so it cannot show pixels: leave out --vq_path")
        vbpe = VisualBPE.load(vbpe_path) if vbpe_path else None
        self._vbpe = vbpe if isinstance(vbpe, VisualBPE) else None

    def data_url(self, image_ids: np.ndarray) -> str | None:
        """The picture of the ids `[n]` of one image; None when they are not exactly one grid, or merged by an unknown vBPE."""
        if self._vq is None:
            return None
        height, width = self._vq.grid
        if len(image_ids) == height * width and image_ids.max() < self._vq.num_codes:
            grid = image_ids.reshape(height, width)
        elif self._vbpe is not None and image_ids.max() < self._vbpe.num_ids:
            if self._vbpe.sizes[image_ids].sum() != height * width:
                return None
            grid = self._vbpe.decode(image_ids, height, width)
        else:
            return None
        return "data:image/png;base64," + base64.b64encode(to_png(self._vq.decode(grid[None])[0])).decode()
