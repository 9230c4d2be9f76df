"""From a decoded picture to the input of the VQ-GAN's encoder.

    picture ──crop──> [3, H, W] uint8 ──to_pixels──> [N, 3, H, W] float32

`crop` turns, converts, resizes and crops. It can run in another process, because its result has
only a quarter of the final size. `to_pixels` is one lookup table of 256 values per channel.
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
"""How the EXIF orientation of an image is treated. The `lineage` of codes, and of everything made
with them, records it as "exif".
"""


def exif_of(lineage: Mapping[str, str]) -> str:
    """How the images of a model or of codes were read. The published data, and ours from before
    this option existed, ignored the orientation.
    """
    return lineage.get("exif", "ignore")


class Preprocess:
    """A VQ-GAN's image processor in two halves; together they give bit-identical results."""

    def __init__(self, processor: ChameleonImageProcessorPil, exif: str = "apply") -> None:
        self.processor, self.exif = processor, exif

    def oriented(self, image: Image.Image) -> Image.Image:
        """The picture to crop, turned if `exif` says so."""
        return upright(image) if self.exif == "apply" else image

    def crop(self, image: Image.Image, name: Path | str) -> np.ndarray:
        """One picture, oriented, on white, resized and cropped: `[3, H, W]` uint8.

        Raises InputError naming the image if it cannot be converted.
        """
        with about_image(name):
            found = self.processor(
                self.oriented(image), do_rescale=False, do_normalize=False, return_tensors="np"
            )
        return found["pixel_values"][0]

    @cached_property
    def _table(self) -> np.ndarray:
        """The value of each byte, `[3, 256]` float32, computed by the processor itself."""
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
