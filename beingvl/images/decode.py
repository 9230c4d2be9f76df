"""Decode image files.

    decode_image     bytes to a picture of 8-bit values, of one of FORMATS and at most MAX_PIXELS
    upright          the picture turned as viewers show it
    about_image      attributes a decoder's warnings and errors to an image, by name

Images are untrusted: the worst that one can cause is its rejection. Pillow also has plugins for
formats that start other programs (EPS) or are hardly tested; we use none of them.
"""

from __future__ import annotations

import io
import os
import struct
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from beingvl.errors import InputError, is_out_of_files
from beingvl.images.image_source import MAX_FILE_BYTES, read_file
from beingvl.sources.places import as_place, bare, fetch, is_address

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")  # whatever the suffix says
# Decoded into memory as a whole: 150 MB, and a few copies while the image is resized.
MAX_PIXELS = 50_000_000
# Resizing the short edge of a line one pixel high would make it too wide for any memory.
MAX_ASPECT = 100
# libjpeg processes the whole picture for each scan of a progressive file; the usual ten take 3 s.
MAX_PIXELS_IN_SCANS = 100 * MAX_PIXELS
JPEG_SCAN = b"\xff\xda"
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
PNG_NOTES = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")
UPRIGHT = {  # EXIF orientation -> transposition that turns the picture upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
EXIF_FIELDS = ("exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp")


@contextmanager
def about_image(name: Path | str) -> Iterator[None]:
    """Print warnings with the image's name, and turn any exception into an InputError: what
    decoders raise for a damaged file depends on the format and on Pillow's version.
    """
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # we check MAX_PIXELS
        try:
            yield
        except InputError:
            raise
        except Exception as error:
            if is_out_of_files(error):
                raise
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            if isinstance(error, UnidentifiedImageError):
                reason = f"it is in no known format: {', '.join(FORMATS)}"
            raise InputError(f"{name} cannot be read as an image ({reason})") from error
    for warning in found:
        print(f"warning: {name}: {warning.message}", file=sys.stderr)


def read_image(path: Path | str) -> Image.Image:
    """Read and decode an image file. Raises InputError as `decode_image` does."""
    try:
        data = read_file(Path(path))
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from error
    return decode_image(data, path)


def picture_of(image: Any, name: str) -> tuple[Image.Image, str]:
    """A picture and its name, from a PIL image, an array `[H, W]` or `[H, W, 3 | 4]` uint8, a path
    or a URL. Raises InputError for anything else, and as `decode_image` does.
    """
    if isinstance(image, Image.Image):
        return image, name
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8:
            found = f"an array of {image.dtype} {list(image.shape)}"
            raise InputError(f"{name} is {found}, expected uint8 [height, width, 3]")
        with about_image(name):
            return Image.fromarray(image), name
    if not isinstance(image, str | os.PathLike):
        raise InputError(f"{name} is {type(image).__name__}, expected an image, a path or an array")
    place = as_place(Path(image) if isinstance(image, os.PathLike) else image)
    if not is_address(place):
        return read_image(place), place
    return decode_image(fetch(place, MAX_FILE_BYTES), bare(place)), bare(place)


def decode_image(data: bytes, name: Path | str) -> Image.Image:
    """Decode the bytes of an image file. Raises InputError if they are damaged, not an image, or
    too large.

    A JPEG file of more than MAX_PIXELS is decoded at 1/2, 1/4 or 1/8 of its size.
    """
    with about_image(name):
        try:
            return _decode(data, name)
        except ValueError as error:  # perhaps in the metadata, which we do not need
            if not data.startswith(PNG_SIGNATURE) or isinstance(error, InputError):
                raise
            return _decode(_without_notes(data), name)


def _decode(data: bytes, name: Path | str) -> Image.Image:
    Image.init()  # without it, a format that this Pillow lacks raises KeyError
    image = Image.open(io.BytesIO(data), formats=[one for one in FORMATS if one in Image.OPEN])
    if problem := _bound_size(image, data.count(JPEG_SCAN)):
        raise InputError(f"{name} has {image.width} x {image.height} pixels, {problem}")
    with _heard() if image.format == "TIFF" else nullcontext():
        image.load()
    if image.mode[0] not in "IF":
        return image
    values = image.convert(image.mode[0])  # RGB would turn 16-bit values white and 0 … 1 black
    extrema: Any = values.getextrema()  # there is one band
    low, high = extrema
    if values.mode == "F" or low < 0 or high > 255:
        raise InputError(
            f"{name} has one value per pixel, from {low:g} to {high:g}, expected 8 bits; convert it"
        )
    return values.convert("L")


@contextmanager
def _heard() -> Iterator[None]:
    """Turn what libtiff writes to this process's stderr into warnings."""
    with open(os.memfd_create("libtiff"), "rb") as said:
        stderr = os.dup(2)
        os.dup2(said.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
        said.seek(0)
        for line in said.read().decode(errors="replace").splitlines():
            warnings.warn(line, stacklevel=2)


def _without_notes(data: bytes) -> bytes:
    """A PNG file without its texts and colour profile, which may be larger than Pillow allows."""
    kept, place = [PNG_SIGNATURE], len(PNG_SIGNATURE)
    while place + 8 <= len(data):
        size, kind = struct.unpack_from(">I4s", data, place)
        end = place + size + 12
        if kind not in PNG_NOTES:
            kept.append(data[place:end])
        place = end
    return b"".join(kept)


def _bound_size(image: Image.Image, num_scans: int) -> str:
    """Reduce a large JPEG, which has at most `num_scans` scans, before it is decoded; returns what
    is wrong if the size is not allowed.
    """
    width, height = image.size
    if max(width, height) > MAX_ASPECT * min(width, height):
        return f"expected one side at most {MAX_ASPECT} times the other; crop it"
    is_jpeg = image.format in ("JPEG", "MPO")  # MPO: JPEG files from some cameras
    if is_jpeg and width * height * num_scans > MAX_PIXELS_IN_SCANS:
        return f"in {num_scans} scans, which take too long; save it again, not as progressive"
    if width * height <= MAX_PIXELS:
        return ""
    for factor in (2, 4, 8):
        if is_jpeg and width * height / factor**2 <= MAX_PIXELS:
            image.draft(None, (width // factor, height // factor))
            return ""
    return f"expected at most {MAX_PIXELS:,} in all (a JPEG file may have more); shrink it"


def upright(image: Image.Image) -> Image.Image:
    """The picture rotated and mirrored as its EXIF orientation says; unchanged without one."""
    try:
        turn = UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # damaged EXIF data does not make the pixels unusable
        return image
    if turn is None:
        return image
    turned = image.transpose(turn)
    for field in EXIF_FIELDS:  # else it would be turned again
        turned.info.pop(field, None)
    return turned


def as_array(image: Image.Image) -> np.ndarray:
    """A picture `[H, W, 3]` uint8."""
    return np.asarray(image.convert("RGB"))
