"""Pictures as PNG files, and image ids back to a small picture inside a page."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import numpy as np
from PIL import Image

from beingvl.errors import InputError
from beingvl.images.vqgan import VQGAN
from beingvl.vbpe.visual_bpe import VisualBPE

BORDER = (255, 176, 0)


def to_png(pixels: np.ndarray) -> bytes:
    """A picture `[H, W, 3]` uint8 as the bytes of a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def with_borders(pixels: np.ndarray, owners: np.ndarray, min_side: int = 512) -> np.ndarray:
    """A picture `[H, W, 3]` uint8, enlarged to at least `min_side` pixels a side, with lines
    between tokens.

    `owners` `[h, w]` int says which token covers each cell of the code grid; H and W are multiples
    of h and w.
    """
    scale = max(1, -(-min_side // min(pixels.shape[:2])))
    large = pixels.repeat(scale, axis=0).repeat(scale, axis=1)
    of_pixel = owners.repeat(large.shape[0] // owners.shape[0], axis=0).repeat(
        large.shape[1] // owners.shape[1], axis=1
    )
    below = np.zeros(of_pixel.shape, bool)
    right = below.copy()
    below[:-1] = of_pixel[1:] != of_pixel[:-1]
    right[:, :-1] = of_pixel[:, 1:] != of_pixel[:, :-1]
    large[below | right] = BORDER
    return large


class Pictures:
    """Decodes with a VQ-GAN and, for merged ids, a vBPE; without a VQ-GAN there are no pictures."""

    def __init__(self, vq_path: Path | None, vbpe_path: Path | None) -> None:
        self._vq = VQGAN.load(vq_path) if vq_path else None
        if self._vq is not None and not self._vq.has_decoder:
            raise InputError(
                f"{vq_path} has no decoder, so it cannot show pixels: leave out --vq_path"
            )
        vbpe = VisualBPE.load(vbpe_path) if vbpe_path else None
        self._vbpe = vbpe if isinstance(vbpe, VisualBPE) else None
        vq_lineage = {str(vq_path): {"vqgan": self._vq.fingerprint()}} if self._vq else {}
        self.lineages = vq_lineage | (
            {str(vbpe_path): {**vbpe.lineage, "vbpe": vbpe.fingerprint()}} if vbpe else {}
        )

    def data_url(self, image_ids: np.ndarray) -> str | None:
        """The picture of the ids `[n]` of one image; None when they are not exactly one grid, or
        merged by an unknown vBPE.
        """
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
        return (
            "data:image/png;base64,"
            + base64.b64encode(to_png(self._vq.decode(grid[None])[0])).decode()
        )
