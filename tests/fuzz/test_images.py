"""Mutated images of every format that Pillow can write: each is read, or rejected by name."""

import io
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from beingvl.images.decode import FORMATS, decode_image
from beingvl.images.preprocess import Preprocess
from beingvl.images.vqgan import make_processor
from tests.fuzz.harness import judged, mutated

MODES = ("RGB", "RGBA", "L", "LA", "P", "1", "I", "I;16", "F", "CMYK")
SEED = 20261130


def written() -> tuple[list[bytes], list[bytes]]:
    """A small picture in every format and mode that can be written, some with EXIF: those that are
    opened, and the others.
    """
    Image.init()
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 256, (40, 48, 3), dtype=np.uint8))
    note = Image.Exif()
    note[0x112] = 6
    opened, others = [], []
    for name in sorted(Image.SAVE):
        for mode in MODES:
            for options in ({}, {"exif": note}, {"progressive": True, "interlace": 1}):
                buffer = io.BytesIO()
                try:
                    picture.convert("L").convert(mode).save(buffer, name, **options)
                except Exception:  # not every format has every mode
                    continue
                (opened if name in FORMATS else others).append(buffer.getvalue())
    return opened, others


@pytest.mark.parametrize("count", [400, pytest.param(20_000, marks=pytest.mark.slow)])
def test_a_mutated_image_is_read_or_rejected_by_name(tmp_path, monkeypatch, count) -> None:
    monkeypatch.chdir(tmp_path)
    opened, others = written()
    seeds = others + opened * (2 * len(others) // len(opened))
    preprocess, outcomes = Preprocess(make_processor(16)), Counter[str]()

    def read(data: bytes) -> None:
        pixels = preprocess.crop(decode_image(data, "a.png"), "a.png")
        assert pixels.shape == (3, 16, 16) and pixels.dtype == np.uint8

    for number, data in enumerate(mutated(seeds, count, SEED)):
        outcomes[judged(f"image {number} of {SEED}", lambda data=data: read(data), tmp_path)] += 1
    print(
        dict(outcomes), len(opened), "pictures of formats that are opened,", len(others), "others"
    )
    assert min(outcomes["returned"], outcomes["refused"]) > count / 20
