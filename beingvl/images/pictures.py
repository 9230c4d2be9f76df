"""Pictures as PNG, and lines between a picture's tokens."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

BORDER = (255, 176, 0)


def to_png(pixels: np.ndarray) -> bytes:
    """A picture `[H, W, 3]` (or 4, with transparency) uint8 as the bytes of a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def with_borders(
    pixels: np.ndarray, owners: np.ndarray, min_side: int = 512, thickness: int = 1
) -> np.ndarray:
    """A picture `[H, W, 3 or 4]` uint8, enlarged to at least `min_side` pixels, with lines of
    `thickness` pixels between tokens. The pixels on both sides are darkened, so that lines are
    visible on any picture.

    `owners` `[h, w]` int is the token that covers each cell of the code grid; H and W are multiples
    of h and w.
    """
    scale = max(1, -(-min_side // min(pixels.shape[:2])))
    large = pixels.repeat(scale, axis=0).repeat(scale, axis=1)
    of_pixel = owners.repeat(large.shape[0] // owners.shape[0], axis=0)
    of_pixel = of_pixel.repeat(large.shape[1] // owners.shape[1], axis=1)
    line = np.zeros(of_pixel.shape, bool)
    line[:-1] = of_pixel[1:] != of_pixel[:-1]
    line[:, :-1] |= of_pixel[:, 1:] != of_pixel[:, :-1]
    for _ in range(thickness - 1):
        line[1:] |= line[:-1].copy()
        line[:, 1:] |= line[:, :-1].copy()
    beside = line.copy()
    beside[1:] |= line[:-1]
    beside[:-1] |= line[1:]
    beside[:, 1:] |= line[:, :-1]
    beside[:, :-1] |= line[:, 1:]
    large[beside, :3] //= 3
    large[line] = (*BORDER, 255)[: large.shape[2]]
    return large
