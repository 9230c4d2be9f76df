"""From a decoded picture to what the VQ-GAN's encoder gets.

    picture ──crop──> [3, H, W] uint8 ──to_pixels──> [N, 3, H, W] float32

`crop` turns, converts, resizes and crops; it may run in another process, and what it returns is a
quarter of the pixels' size. What follows is one table of 256 values per channel.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers.models.chameleon.image_processing_pil_chameleon import ChameleonImageProcessorPil

from beingvl.images.decode import about_image, upright

EXIF = ("apply", "ignore")
"""What becomes of the orientation in an image's EXIF note; `lineage` of codes and of all that is
made with them holds it as "exif".
"""


def exif_of(lineage: Mapping[str, str]) -> str:
    """How the images of a model or of codes were read. Published data, and ours of before the
    option, ignored the orientation.
    """
    return lineage.get("exif", "ignore")


class Preprocess:
    """A VQ-GAN's image processor in two halves; together they give its bytes."""

    def __init__(self, processor: ChameleonImageProcessorPil, exif: str = "apply") -> None:
        self.processor, self.exif = processor, exif

    def oriented(self, image: Image.Image) -> Image.Image:
        """The picture that is cropped."""
        return upright(image) if self.exif == "apply" else image

    def crop(self, image: Image.Image, name: Path | str) -> np.ndarray:
        """One picture, oriented, on white, resized and cropped: `[3, H, W]` uint8.

        Raises InputError with the image's name for what cannot be converted.
        """
        with about_image(name):
            found = self.processor(
                self.oriented(image), do_rescale=False, do_normalize=False, return_tensors="np"
            )
        return found["pixel_values"][0]

    @cached_property
    def _table(self) -> np.ndarray:
        """Values `[3, 256]` float32 of each byte, by the processor itself."""
        ramps = np.broadcast_to(np.arange(256, dtype=np.uint8).reshape(16, 16), (3, 16, 16))
        as_it_is = {"do_convert_rgb": False, "do_resize": False, "do_center_crop": False}
        found = self.processor(ramps, return_tensors="np", **as_it_is)
        return found["pixel_values"][0].astype(np.float32).reshape(3, 256)

    def to_pixels(self, cropped: Sequence[np.ndarray]) -> torch.Tensor:
        """`[N, 3, H, W]` uint8 to float32."""
        pixels = np.empty((len(cropped), *cropped[0].shape), np.float32)
        for image, target in zip(cropped, pixels, strict=True):
            for channel, values in enumerate(self._table):
                np.take(values, image[channel], out=target[channel], mode="clip")
        return torch.from_numpy(pixels)
